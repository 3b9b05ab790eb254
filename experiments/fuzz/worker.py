"""A process of its own that runs a range of cases with little memory, and tells its parent how each one ended.

Run as `python -m experiments.fuzz.worker PARSER SEED FIRST COUNT`. Each line that it writes is a JSON object: the
number of a case before it runs, its outcome if it failed, and at the end the sums.
"""

from __future__ import annotations

import base64
import collections
import json
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.fuzz.harness import FAILED, Files, Outcome, cases, reduce, run_case
from experiments.fuzz.parsers import PARSERS, Parser

MAX_MEMORY = 1 << 30  # on top of what the interpreter and the libraries take


def main(name: str, seed: int, first: int, count: int) -> None:
    """Run the cases; the first failure at a place is reduced and reported, all are counted."""
    parser = PARSERS[name]()
    run_case(parser, {file: content.whole() for file, content in parser.seeds[0].items()})  # imports everything
    before = limit_memory()
    kinds: collections.Counter[str] = collections.Counter()
    slowest, seen = 0.0, set()
    for number, files in cases(parser, seed, first, count):
        say(case=number)
        outcome = settled(parser, files)
        kinds[outcome.kind] += 1
        slowest = max(slowest, outcome.seconds)
        if outcome.kind == FAILED and place(outcome) not in seen:
            seen.add(place(outcome))
            smallest = reduced(parser, files, outcome, partial(say, case=number))
            say(failure=number, detail=outcome.detail, files=encoded(smallest))
    say(kinds=kinds, slowest=slowest, peak=peak_bytes() - before)


def settled(parser: Parser, files: Files) -> Outcome:
    """The outcome, of a second try where the first was slow: another process may have had the caches."""
    outcome = run_case(parser, files)
    return run_case(parser, files) if outcome.detail == "slow" else outcome


def reduced(parser: Parser, files: Files, outcome: Outcome, sign_of_life: Callable[[], None]) -> Files:
    """The smallest files found that fail in the same way; `sign_of_life` is called before each try."""

    def same(smaller: Files) -> bool:
        sign_of_life()
        again = run_case(parser, smaller)
        return again.kind == FAILED and place(again) == place(outcome)

    attempts = 30 if outcome.detail == "slow" else 400
    return reduce(files, same, attempts)


def place(outcome: Outcome) -> str:
    """The kind of a fault and the line that it comes from: one fault is reported once."""
    return " ".join(outcome.detail.split(":")[:2])


def encoded(files: Files) -> dict[str, str]:
    """Files as JSON can hold them."""
    return {name: base64.b64encode(content).decode() for name, content in files.items()}


def limit_memory() -> int:
    """Allow `MAX_MEMORY` bytes more than now; return the peak so far."""
    limit = _status("VmSize") + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return peak_bytes()


def peak_bytes() -> int:
    """The most memory that this process has had resident (`getrusage` begins with its parent's)."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def _speaker() -> Callable[..., None]:
    # Compiled libraries write their panics to stderr; what is said goes where stdout pointed at the start.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def speak(**message: object) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    return speak


if __name__ == "__main__":
    say = _speaker()
    main(sys.argv[1], *map(int, sys.argv[2:]))
