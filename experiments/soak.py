"""Online learning for a long time on the CPU: what must not grow, does not.

    python -m experiments.soak --minutes 30 --out DIR [--config FILE.yaml --set key=value ...]

Once a minute: resident memory, live device buffers, open files, the median time of a step and the programs compiled.
After a warm-up, the slope of each by least squares; DIR gets soak.json and soak.png. Without --config it trains a tiny
model on questions of its own, some hundred prompts a second, so that what leaks per prompt shows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from dvi_jax.config import TrainConfig, load_train_config
from dvi_jax.data.conversations import StreamLimits
from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli
from dvi_jax.evaluate.style import BLUE, GREY, new_figure, save_picture
from dvi_jax.learn.online import train_online
from dvi_jax.loading import enable_compilation_cache
from experiments.measure import environment, write_result
from experiments.tiny import write_tiny_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPILED = "/jax/core/compile/backend_compile_duration"
QUESTIONS_PER_MINUTE = 30_000  # more than two cores get through
MOST_MEMORY_SLOPE = 1.0  # MiB a minute
MOST_STEP_DRIFT = 0.05  # of the median step, over the whole time
GREW = 1  # exit status


@dataclass(frozen=True)
class Sample:
    """The process at one moment; `step_ms` is the median since the sample before."""

    minutes: float
    updates: int
    resident_mib: float
    buffers: int
    buffers_mib: float
    open_files: int
    step_ms: float
    compiled: int


class Sampler:
    """Called with every metrics record, takes a sample every `seconds`."""

    def __init__(self, seconds: float, console: Console):
        self.seconds, self.console = seconds, console
        self.samples: list[Sample] = []
        self.events: list[dict[str, Any]] = []  # what is neither an update nor an evaluation
        self._began = self._last = time.perf_counter()
        self._steps: list[float] = []
        self._compiled = 0

    def __call__(self, kind: str, record: dict[str, Any]) -> None:
        if kind not in ("train", "eval"):
            self.events.append({"kind": kind} | record)
        if kind != "train":
            return
        self._steps.append(record["rollout_seconds"] + record["update_seconds"])
        now = time.perf_counter()
        if now - self._last >= self.seconds:
            self._last = now
            self.samples.append(self._sample(now, record["step"]))
            self._steps = []
            self.console.print(str(self.samples[-1]), soft_wrap=True, highlight=False)

    def count_compilation(self, event: str, duration_secs: float, **details: object) -> None:
        """A listener of `jax.monitoring`."""
        self._compiled += event == COMPILED

    def _sample(self, now: float, updates: int) -> Sample:
        buffers = jax.live_arrays()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return Sample(
            minutes=round((now - self._began) / 60, 3),
            updates=updates,
            resident_mib=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            buffers=len(buffers),
            buffers_mib=sum(buffer.nbytes for buffer in buffers) / 2**20,
            open_files=len(os.listdir("/proc/self/fd")),
            step_ms=1000 * statistics.median(self._steps),
            compiled=self._compiled,
        )


def main(arguments: list[str] | None = None) -> int:
    """Train and sample; exit status 1 if something grew."""
    options = _parser().parse_args(arguments)
    enable_compilation_cache()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(options.sample_seconds, console)
    jax.monitoring.register_event_duration_secs_listener(sampler.count_compilation)
    with tempfile.TemporaryDirectory() as scratch:
        config = replace(_config(options, Path(scratch)), max_minutes=options.minutes)
        train_online(config, report=sampler)
    jax.monitoring.unregister_event_duration_listener(sampler.count_compilation)
    settled = [sample for sample in sampler.samples if sample.minutes >= options.warm_up]
    if len(settled) < 3:
        raise UserError(f"{len(settled)} samples after the warm-up are too few for a slope: raise --minutes")
    report = {
        "environment": environment(),
        "config": options.config or "tiny",
        "warm_up_minutes": options.warm_up,
        "slopes_per_minute": slopes(settled),
        "step_drift": step_drift(settled),
        "grew": grown(settled),
        "events": sampler.events,
        "samples": [asdict(sample) for sample in sampler.samples],
    }
    write_result(options.out / "soak.json", report)
    draw(sampler.samples, options.warm_up, options.out / "soak.png")
    show(report, console)
    return GREW if report["grew"] else 0


def _config(options: argparse.Namespace, scratch: Path) -> TrainConfig:
    if not options.config:
        tiny = write_tiny_run(scratch, questions=int(QUESTIONS_PER_MINUTE * max(options.minutes, 1)))
        return replace(tiny, data=replace(tiny.data, files=(_write_filler(scratch), *tiny.data.files)))
    config = load_train_config(options.config, options.set)
    if not isinstance(config, TrainConfig):
        raise UserError(f"{options.config} must be of an online run")
    return replace(config, out=str(scratch / "run"))


def _write_filler(scratch: Path) -> str:
    """As many conversations as a stream remembers ids, each too long to be a prompt.

    That memory is bounded (`StreamLimits.remembered_ids`), but grows until it is full: at the tiny model's pace for a
    quarter of an hour, at a real one's for days.
    """
    path = scratch / "filler.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(StreamLimits().remembered_ids):
            message = {"role": "user", "content": f"{index} " + "long " * 20}
            file.write(json.dumps({"messages": [message]}) + "\n")
    return str(path)


def slopes(samples: Sequence[Sample]) -> dict[str, float]:
    """Growth per minute of everything sampled, by least squares."""
    minutes = [sample.minutes for sample in samples]
    names = ("resident_mib", "buffers", "buffers_mib", "open_files", "step_ms", "compiled")
    return {name: float(np.polyfit(minutes, [getattr(s, name) for s in samples], 1)[0]) for name in names}


def step_drift(samples: Sequence[Sample]) -> float:
    """How much longer a step takes at the end than at the beginning, by the slope, as a share of the median."""
    span = samples[-1].minutes - samples[0].minutes
    return slopes(samples)["step_ms"] * span / statistics.median(sample.step_ms for sample in samples)


def grown(samples: Sequence[Sample]) -> list[str]:
    """What grew beyond its bound; counts may not grow at all."""
    found = ["resident memory"] if slopes(samples)["resident_mib"] >= MOST_MEMORY_SLOPE else []
    if abs(step_drift(samples)) > MOST_STEP_DRIFT:
        found.append("step time")
    half = len(samples) // 2
    for name in ("buffers", "open_files", "compiled"):
        # A save that runs while the sample is taken holds buffers and files of its own.
        early, late = (min(getattr(s, name) for s in part) for part in (samples[:half], samples[half:]))
        if late > early:
            found.append(name.replace("_", " "))
    return found


def draw(samples: Sequence[Sample], warm_up: float, picture: Path) -> None:
    """The samples over time."""
    save_picture(lambda: _panels(samples, warm_up), picture)


def _panels(samples: Sequence[Sample], warm_up: float) -> Figure:
    panels = {
        "resident memory (MiB)": "resident_mib",
        "live device buffers (MiB)": "buffers_mib",
        "live device buffers": "buffers",
        "open files": "open_files",
        "median step (ms)": "step_ms",
        "programs compiled": "compiled",
    }
    figure = new_figure(10, 5)
    for panel, (label, name) in zip(np.ravel(figure.subplots(2, 3)), panels.items(), strict=True):
        panel.plot([s.minutes for s in samples], [getattr(s, name) for s in samples], color=BLUE, marker=".")
        panel.axvline(warm_up, color=GREY, zorder=0)
        panel.set_ylabel(label)
        panel.set_xlabel("minutes")
        panel.grid(axis="y")
        # Compiling, before the warm-up is over, would flatten the rest.
        settled = [getattr(s, name) for s in samples if s.minutes >= warm_up]
        panel.set_ylim(0, 1.2 * max(settled, default=1) or 1)
    return figure


def show(report: dict[str, Any], console: Console) -> None:
    """First and last sample after the warm-up and the slope between."""
    settled = [s for s in report["samples"] if s["minutes"] >= report["warm_up_minutes"]]
    table = Table(title=f"{settled[-1]['minutes']:.0f} minutes, {settled[-1]['updates']} updates")
    for name in ("", f"minute {settled[0]['minutes']:.0f}", "end", "slope per minute"):
        table.add_column(name, justify="right" if name else "left")
    for name, slope in report["slopes_per_minute"].items():
        table.add_row(name, f"{settled[0][name]:.1f}", f"{settled[-1][name]:.1f}", f"{slope:+.4f}")
    console.print(table)
    console.print(f"step time drifted by {report['step_drift']:+.1%}")
    console.print(f"grew: {', '.join(report['grew']) or 'nothing'}")


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.soak", description="Learn for long; nothing may grow.")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M")
    parser.add_argument("--warm-up", type=float, default=5.0, metavar="M", help="minutes left out of the slopes")
    parser.add_argument("--sample-seconds", type=float, default=60.0, metavar="S")
    parser.add_argument("--config", metavar="FILE.yaml", help="settings of an online run (default: a tiny model)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_debug(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
