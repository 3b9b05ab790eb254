"""`python -m experiments.fuzz --cases 10000`: damaged and invented files for every parser of files from outside.

A parser passes if each case returns or raises `UserError`, within a second and a GiB. A failure is printed reduced,
with the numbers that bring it back: `--parser NAME --seed S --first N --cases 1`.
"""

from __future__ import annotations

import base64
import collections
import json
import os
import platform
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvi_jax.errors import ArgumentParser, run_cli
from experiments.fuzz.harness import ACCEPTED, FAILED, REFUSED
from experiments.fuzz.parsers import PARSERS

SILENCE_SECONDS = 60.0  # a worker that says nothing for so long hangs in its case
MAX_DEATHS = 20  # of a parser's workers


@dataclass
class Result:
    """What the cases of one parser came to."""

    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest: float = 0.0
    peak: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """The result's numbers, named with their units."""
        return {
            "cases": sum(self.kinds.values()),
            "accepted": self.kinds[ACCEPTED],
            "refused": self.kinds[REFUSED],
            "failed": self.kinds[FAILED],
            "slowest_ms": round(1e3 * self.slowest, 1),
            "peak_mib": round(self.peak / 2**20, 1),
        }


def main() -> int:
    """Fuzz the parsers; exit status 1 if one fails."""
    parser = ArgumentParser(prog="python -m experiments.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="for each parser")
    parser.add_argument("--parser", nargs="+", choices=list(PARSERS), default=list(PARSERS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    rows = {}
    for name in options.parser:
        result = fuzz(name, options.seed, options.first, options.cases)
        rows[name] = result.row()
        print(f"{name:16}", *(f"{key} {value}" for key, value in rows[name].items()), flush=True)
        for failure in result.failures:
            print_failure(name, options.seed, failure)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        summary = {"python": platform.python_version(), "seed": options.seed, "parsers": rows}
        Path(options.out).write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if any(row["failed"] for row in rows.values()) else 0


def fuzz(name: str, seed: int, first: int, count: int) -> Result:
    """Run `count` cases in worker processes, one after the other; a new one goes on where one has died."""
    result, end = Result(), first + count
    for _ in range(MAX_DEATHS):
        last = _run_worker(result, name, seed, first, end - first)
        first = end if last is None else last + 1
        if first >= end:
            break
    return result


def print_failure(name: str, seed: int, failure: dict[str, Any]) -> None:
    """The fault, how to see it again, and the reduced files."""
    print(f"  {failure['detail']}\n    --parser '{name}' --seed {seed} --first {failure['failure']} --cases 1")
    for file, content in failure.get("files", {}).items():
        data = base64.b64decode(content)
        print(f"    {file} ({len(data)} bytes): {data[:300]!r}")


def _run_worker(result: Result, name: str, seed: int, first: int, count: int) -> int | None:
    """Read one worker's lines into `result`; the number of the case that it died of, None if it came to its end."""
    command = [sys.executable, "-m", "experiments.fuzz.worker", name, str(seed), str(first), str(count)]
    environment = {**os.environ, "RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"}
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_forward, args=(worker, lines), daemon=True).start()
    case = first
    try:
        while (line := lines.get(timeout=SILENCE_SECONDS)) is not None:
            message = json.loads(line)
            case = message.get("case", case)
            if "failure" in message:
                result.failures.append(message)
            if "kinds" in message:
                result.kinds.update(message["kinds"])
                result.slowest = max(result.slowest, message["slowest"])
                result.peak = max(result.peak, message["peak"])
                return None
        detail = f"the process ended with status {worker.wait()}"
    except queue.Empty:
        detail = f"it hung for {SILENCE_SECONDS:.0f} seconds"
    finally:
        worker.kill()
        worker.wait()
    result.failures.append({"failure": case, "detail": detail})
    result.kinds.update({FAILED: 1, "lost": case - first})  # how those before it ended, the worker took with it
    return case


def _forward(worker: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert worker.stdout is not None  # opened as a pipe
    for line in worker.stdout:
        lines.put(line)
    lines.put(None)


if __name__ == "__main__":
    sys.exit(run_cli(main))
