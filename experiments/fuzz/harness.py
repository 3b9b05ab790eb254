"""One fuzz case: making it from its number, running it, judging it, and reducing one that fails.

A case passes if the parser returns or raises `UserError`. Anything else that it raises, more than a second of
processor time, or an end of the process is a failure.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
from hypothesis import strategies as st

from dvi_jax.errors import UserError
from experiments.fuzz.mutate import TEXT_WORDS, mutate
from experiments.fuzz.parsers import Parser

MAX_SECONDS = 1.0
BLOCK = 50  # cases that share one run of hypothesis
ACCEPTED, REFUSED, FAILED = "accepted", "refused", "failed"
Files = dict[str, bytes]

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "float32", "linear", "BPE", "llama", "online"])
)
JSON_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


@dataclass(frozen=True)
class Outcome:
    """How a case ended; `detail` names the fault, `seconds` are processor time."""

    kind: str
    detail: str
    seconds: float


def cases(parser: Parser, seed: int, first: int, count: int) -> Iterator[tuple[int, Files]]:
    """(number, files) of `count` cases from number `first` on; a number gives the same files in any range."""
    for block in range(first // BLOCK, (first + count - 1) // BLOCK + 1):
        values = _json_values(f"{parser.name}/{seed}/{block}")
        for number, value in enumerate(values, block * BLOCK):
            if first <= number < first + count:
                yield number, _make(parser, random.Random(f"{parser.name}/{seed}/{number}"), value)


def run_case(parser: Parser, files: Files) -> Outcome:
    """Write the files, call the parser on their folder and judge."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        began = time.process_time()
        kind, detail = _call(parser, folder)
        seconds = time.process_time() - began
    if kind != FAILED and seconds > MAX_SECONDS:
        kind, detail = FAILED, "slow"
    return Outcome(kind, detail, seconds)


def reduce(files: Files, fails: Callable[[Files], bool], attempts: int = 400) -> Files:
    """`files` with as much cut away as `fails` allows: halves, then quarters, and so on of each file."""
    for name in sorted(files, key=lambda name: -len(files[name])):
        size = max(len(files[name]) // 2, 1)
        while size and attempts > 0:
            start = 0
            while start < len(files[name]) and attempts > 0:
                smaller = {**files, name: files[name][:start] + files[name][start + size :]}
                attempts -= 1
                if fails(smaller):
                    files = smaller
                else:
                    start += size
            size //= 2
    return files


def _call(parser: Parser, folder: Path) -> tuple[str, str]:
    try:
        parser.run(folder)
    except UserError:
        return REFUSED, ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also MemoryError and the panics of compiled libraries: all are findings
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else "?"
        return FAILED, f"{type(error).__name__} at {place}: {str(error)[:120]}"
    return ACCEPTED, ""


def _make(parser: Parser, rng: random.Random, value: bytes) -> Files:
    seeds = rng.choice(parser.seeds)
    files = {name: seed.whole() for name, seed in seeds.items()}
    words = (*TEXT_WORDS, *parser.words, *[value] * (len(TEXT_WORDS) // 4))
    for name in rng.sample(sorted(seeds), 1 if rng.random() < 0.8 else len(seeds)):
        is_generated = rng.random() < 0.15
        files[name] = seeds[name].pack(value) if is_generated else mutate(rng, seeds[name], words)
    return files


def _json_values(name: str) -> list[bytes]:
    """`BLOCK` JSON texts by hypothesis, always the same ones for a name."""
    found: list[bytes] = []

    @hypothesis.seed(name)
    @hypothesis.settings(
        max_examples=BLOCK, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(JSON_VALUES)
    def collect(value: object) -> None:
        found.append(json.dumps(value).encode())

    collect()
    return [found[index % len(found)] for index in range(BLOCK)]
