"""`python -m experiments.fuzz.ranges`: settings and manifests with random values within and beyond their ranges.

A case passes if it is refused in one line, or if the run that it describes can begin: its model is loaded, its data are
read, its arrays are made. Exit status 1 if one does neither.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from dvi_jax.checkpoint import MANIFEST, read_checkpoint
from dvi_jax.config import TrainConfig, load_train_config
from dvi_jax.errors import ArgumentParser, UserError, add_debug, at_least_one, one_line, run_cli
from dvi_jax.learn.new_drafter import kept_or_new_drafter
from dvi_jax.learn.online import OnlineRun, with_new_lora_d
from dvi_jax.learn.run_directory import RunDirectory
from dvi_jax.loading import load
from experiments.tiny import write_tiny_run

WITHIN = (0, 1, 2, 3, 8, 0.5, 1e-3, 1.0)
BEYOND = (-1, 2**31 - 1, 2**31, 2**32, 2**63, 10**30, -0.5, 1e39, 1e-300, float("nan"), float("inf"))
OTHER: tuple[Any, ...] = (None, True, "", "x", "a\0b", [], [1], {}, {"x": 1})
DRAFTERS = (
    {"drafter": "kangaroo", "drafter_config": {"num_heads": 2, "num_kv_heads": 1, "rms_norm_eps": 1e-5}},
    {"drafter": "fused", "drafter_config": {"taps": [1, 2]}},
    {"drafter": "medusa", "drafter_config": {"heads": 2, "markov_rank": 2}},
    {"drafter": "exit_head", "drafter_config": {"rank": 2, "alpha": 2.0}},
)


def main(arguments: list[str] | None = None) -> int:
    """Try them, say what failed."""
    options = _parser().parse_args(arguments)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        config = write_tiny_run(Path(scratch), questions=100)
        for kind, attempt in (("settings", try_settings), ("manifest", try_manifest)):
            for number in range(options.cases):
                outcome, detail = judged(attempt, config, random.Random(f"{kind} {options.seed} {number}"))
                counts[f"{kind} {outcome}"] += 1
                if outcome == "FAILED":
                    print(f"{kind} {number}: {detail}", flush=True)
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    return int(any(name.endswith("FAILED") for name in counts))


def judged(
    attempt: Callable[[TrainConfig, random.Random, Path], None], config: TrainConfig, rng: random.Random
) -> tuple[str, str]:
    """What came of a case: begun, refused or FAILED, and what it said."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            attempt(config, rng, Path(scratch))
        except UserError as error:
            is_short = len(str(error)) < 2000 and one_line(str(error))
            return ("refused" if is_short else "FAILED"), str(error)
        except Exception as error:  # all others are findings
            return "FAILED", f"{type(error).__name__}: {str(error)[:200]}"
    return "begun", ""


def try_settings(config: TrainConfig, rng: random.Random, scratch: Path) -> None:
    """A settings file whose run is begun, up to its first rollout."""
    document = json.loads(json.dumps(asdict(config))) | {"out": str(scratch / "run")}
    spoil(document, rng)
    path = scratch / "run.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    read = load_train_config(path)
    assert isinstance(read, TrainConfig)
    if Path(read.out).parent != scratch:  # no file of anybody else's
        read = replace(read, out=str(scratch / "run"))
    with RunDirectory(read.out, keep=1, keep_best=0, resume=False, report=lambda kind, record: None) as directory:
        checkpoint = kept_or_new_drafter(
            read_checkpoint(read.checkpoint), read.drafter, read.drafter_options, read.exit_layer
        )
        OnlineRun(read, with_new_lora_d(checkpoint, read), directory).restore()


def try_manifest(config: TrainConfig, rng: random.Random, scratch: Path) -> None:
    """A checkpoint with that manifest, loaded."""
    source = Path(config.checkpoint)
    for path in source.iterdir():
        (scratch / path.name).symlink_to(path)
    document = json.loads((source / MANIFEST).read_text(encoding="utf-8")) | rng.choice(DRAFTERS)
    document |= {"lora": {"rank_s": 0, "rank_d": 2, "alpha_d": 2.0}}
    del document["checksums"]
    spoil(document, rng)
    (scratch / MANIFEST).unlink()
    (scratch / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
    load(scratch)


def spoil(document: dict[str, Any], rng: random.Random) -> None:
    """Put random values in place of one to three of a document's, inside its sections too; mostly of numbers."""
    places = list(_places(document))
    numbers = [(holder, name) for holder, name in places if isinstance(holder[name], (int, float))]
    for holder, name in rng.sample(numbers if rng.random() < 0.8 else places, rng.randint(1, 3)):
        holder[name] = rng.choice(rng.choice((WITHIN, WITHIN, WITHIN, BEYOND, OTHER)))


def _places(document: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    inner = [place for value in document.values() if isinstance(value, dict) for place in _places(value)]
    return [(document, name) for name in document] + inner


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.fuzz.ranges", description="Random settings and manifests.")
    parser.add_argument("--cases", type=at_least_one, default=200, metavar="N", help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    add_debug(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
