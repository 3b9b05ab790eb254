"""SIGKILL a training run at random moments, resume it each time, and compare with the run that was never killed.

    python -m experiments.kill --kills 100 [--out FILE.json]

A tiny model learns online from a fixed stream and saves every other rollout. Each life is killed after a time drawn
uniformly from how long the whole run takes, start-up included; when a life gets to the end, its parameters, its last
snapshot and its metrics are compared in every bit, and a new run begins, until there were enough kills. A life is a
fork of this process, which has imported everything and touched no device: it starts within a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.config import TrainConfig
from dvi_jax.directories import PARTIAL
from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli
from dvi_jax.learn.online import train_online
from dvi_jax.learn.snapshot import ARRAYS, read_arrays
from dvi_jax.loading import enable_compilation_cache
from dvi_jax.settings import from_dict
from experiments.measure import environment, write_result
from experiments.tiny import write_tiny_run

FORK = multiprocessing.get_context("fork")
DIFFERENT = 1  # exit status when a resumed run ended elsewhere
ENDING = "digest.json"


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: after how long, what the run was doing, and the newest snapshot it left (None: none yet)."""

    seconds: float
    moment: str
    snapshot: int | None


@dataclass(frozen=True)
class Trajectory:
    """A run from its start to its end, with the kills on the way; `differences` names what ended otherwise."""

    kills: list[Kill]
    differences: list[str]


def main(arguments: list[str] | None = None) -> int:
    """Kill and compare; exit status 1 if anything differs."""
    options = _parser().parse_args(arguments)
    # The parent of the forks never runs jax; the warning is about parents that do.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    enable_compilation_cache()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = _prepare(folder, options.questions)
        _live(config, folder / "reference")  # compiles
        began = time.perf_counter()
        _live(config, folder / "timed")
        duration = time.perf_counter() - began
        reference, timed = _ending(folder / "reference"), _ending(folder / "timed")
        trajectories = [Trajectory([], differences(reference, timed))]
        rng, kills = random.Random(options.seed), 0
        while kills < options.kills:
            out = folder / f"run-{len(trajectories)}"
            made = _kill_until_done(config, out, lambda: rng.uniform(0, duration), options.kills - kills)
            trajectories.append(Trajectory(made, differences(reference, _ending(out))))
            kills += len(made)
            print(f"{kills} kills, {len(trajectories) - 1} runs ended", flush=True)
    report = {"environment": environment()} | summarise(trajectories, duration)
    show(report, Console())
    if options.out:
        write_result(Path(options.out), report)
    return DIFFERENT if report["differences"] else 0


def _prepare(folder: Path, questions: int) -> TrainConfig:
    config = folder / "config.json"
    writer = FORK.Process(target=_write_tiny_run, args=(folder, questions, config))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise UserError("the tiny model could not be written (see the traceback above)")
    return from_dict(TrainConfig, json.loads(config.read_text(encoding="utf-8")), str(config))


def _write_tiny_run(folder: Path, questions: int, config: Path) -> None:
    """In a child, since it runs jax."""
    settings = asdict(write_tiny_run(folder, questions=questions, save_every=2, layers=2))
    config.write_text(json.dumps(settings), encoding="utf-8")


def _live(config: TrainConfig, out: Path, seconds: float | None = None) -> bool:
    """One life of the run in `out`; killed after `seconds`. Whether it came to its end before."""
    child = FORK.Process(target=_run, args=(replace(config, out=str(out)),))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    if child.exitcode not in (0, -signal.SIGKILL):
        raise UserError(f"a life in {out} ended with an error (see the traceback above)")
    return child.exitcode == 0


def _run(config: TrainConfig) -> None:
    """In the child: train or go on, then leave the digest of what came of it."""
    result = train_online(config, resume=True)
    document = json.dumps(digest(Path(config.out), result.checkpoint))
    (Path(config.out) / ENDING).write_text(document, encoding="utf-8")


def _ending(out: Path) -> dict[str, Any]:
    return json.loads((out / ENDING).read_text(encoding="utf-8"))


def digest(out: Path, checkpoint: Path) -> dict[str, Any]:
    """SHA-256 of every array of the checkpoint and of the newest snapshot; metrics without what a clock gave."""
    read = read_checkpoint(checkpoint)
    newest = max((path for path in (out / "snapshots").iterdir() if path.name.isdecimal()), key=lambda p: int(p.name))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "checkpoint": _hashes({"base": read.base, "drafter": read.drafter, "lora": read.lora}),
        "snapshot": {"name": newest.name} | _hashes(read_arrays(newest / ARRAYS)),
        "metrics": [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines],
    }


def _hashes(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _hashes(value, f"{prefix}{name}/")
        elif value is not None:
            kind = f"{value.dtype} {value.shape} ".encode()
            found[prefix + name] = hashlib.sha256(kind + np.ascontiguousarray(value).tobytes()).hexdigest()
    return found


def differences(reference: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The arrays and metrics records that are not equal in every bit."""
    found = []
    for part in ("checkpoint", "snapshot"):
        names = sorted(reference[part].keys() | other[part].keys())
        found += [f"{part}: {name}" for name in names if reference[part].get(name) != other[part].get(name)]
    if len(reference["metrics"]) != len(other["metrics"]):
        found.append(f"metrics: {len(other['metrics'])} records, not {len(reference['metrics'])}")
    pairs = enumerate(zip(reference["metrics"], other["metrics"], strict=False))
    return found + [f"metrics: record {index}" for index, (mine, theirs) in pairs if mine != theirs]


def _kill_until_done(config: TrainConfig, out: Path, draw: Callable[[], float], most: int) -> list[Kill]:
    """Live and kill in `out` until a life gets to the end; after `most` kills the next is left alone."""
    kills: list[Kill] = []
    while True:
        seconds, left = draw() if len(kills) < most else None, _partial(out)
        if _live(config, out, seconds) or seconds is None:
            return kills
        snapshots = [int(path.name) for path in (out / "snapshots").glob("*") if path.name.isdecimal()]
        kills.append(Kill(seconds, _moment(out, _partial(out) - left), max(snapshots, default=None)))


def _partial(out: Path) -> set[str]:
    """What is half written in a run's directory."""
    return {str(path.relative_to(out)) for path in out.glob(f"**/.*{PARTIAL}")}


def _moment(out: Path, left: set[str]) -> str:
    """What a run was doing when it was killed, from what it `left` half written."""
    if any(name.startswith("snapshots/") for name in left):
        return "writing or removing a snapshot"
    if left:
        return "writing the checkpoint"
    if list(out.glob("checkpoint*")):
        return "ending"
    return "learning, or starting again"


def summarise(trajectories: list[Trajectory], duration: float) -> dict[str, Any]:
    """Counts, and every difference there was."""
    kills = [kill for trajectory in trajectories for kill in trajectory.kills]
    moments = sorted({kill.moment for kill in kills})
    return {
        "kills": len(kills),
        "runs": len(trajectories) - 1,
        "whole_run_seconds": round(duration, 2),
        "moments": {moment: sum(kill.moment == moment for kill in kills) for moment in moments},
        "before_the_first_snapshot": sum(kill.snapshot is None for kill in kills),
        "kill_seconds": " ".join(f"{kill.seconds:.2f}" for kill in kills),
        "differences": [difference for trajectory in trajectories for difference in trajectory.differences],
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The table of kills and what came of them."""
    table = Table(title=f"{report['kills']} SIGKILLs, {report['runs']} runs resumed to their end")
    table.add_column("killed while")
    table.add_column("times", justify="right")
    for moment, count in report["moments"].items():
        table.add_row(moment, str(count))
    table.add_section()
    table.add_row("of these before the first snapshot", str(report["before_the_first_snapshot"]))
    console.print(table)
    ended = "all bit-equal to the run never killed" if not report["differences"] else "DIFFERENT"
    console.print(f"parameters, last snapshot and metrics: {ended}", soft_wrap=True)
    for difference in report["differences"]:
        console.print(difference, soft_wrap=True, markup=False, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.kill", description="SIGKILL training at random moments.")
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--questions", type=int, default=500, metavar="N", help="length of the stream")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", metavar="FILE.json", help="write what the table says, too")
    add_debug(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
