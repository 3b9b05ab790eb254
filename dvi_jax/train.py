"""Command line of online training: python -m dvi_jax.train --config FILE.yaml [--set key=value ...] [--resume]"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dvi_jax.config import TrainConfig, load_train_config
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.evaluate.curve import plot_learning_curve
from dvi_jax.learn.online import RunResult, train
from dvi_jax.load import enable_compilation_cache

PLAIN_EVERY = 10  # updates between two lines where the output is not a terminal


class Display:
    """Shows a run: a progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, config: TrainConfig, console: Console):
        self.console = console
        self.config = config
        self.bar = Progress(
            TextColumn("prompts"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=config.prompts, note="compiling")

    def __call__(self, kind: str, record: dict[str, Any]) -> None:
        if kind == "eval":
            self.console.print(
                f"update {record['step']:5d}  held-out accept rate {record['accept_rate']:6.1%}"
                f"  tokens per round {record['tokens_per_round']:.3f}"
            )
        elif kind == "resume":
            self.console.print(f"resumed at update {record['step']}, after {record['prompts']} prompts")
        elif kind == "train":
            note = f"kl {record['kl']:.3f}  accept rate {record['accept_rate']:.1%}"
            self.bar.update(self.task, completed=record["prompts"], note=note)
            if not self.console.is_terminal and record["step"] % PLAIN_EVERY == 0:
                self.console.print(f"update {record['step']:5d}  {record['prompts']} prompts  {note}")


def run(config: TrainConfig, *, resume: bool, console: Console) -> RunResult:
    """Train with a display and leave the learning curve beside the metrics."""
    display = Display(config, console)
    with display.bar:
        result = train(config, resume=resume, report=display)
    plot_learning_curve(f"{config.out}/metrics.jsonl", f"{config.out}/curve.png")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, train, and say what came of it."""
    parser = ArgumentParser(prog="python -m dvi_jax.train", description="Learn online while decoding.")
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="settings (experiments/configs/)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--resume", action="store_true", help="go on from the newest snapshot in the run's `out`")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    config = load_train_config(options.config, options.set)
    enable_compilation_cache()
    console = Console()
    result = run(config, resume=options.resume, console=console)
    console.print(f"read: {result.stream['conversations']}")
    console.print(f"held-out accept rate {result.before.accept_rate:.1%} -> {result.after.accept_rate:.1%}")
    console.print(f"metrics {config.out}/metrics.jsonl  curve {config.out}/curve.png  checkpoint {result.checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
