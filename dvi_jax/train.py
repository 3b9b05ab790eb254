"""Command line of training: python -m dvi_jax.train --config FILE.yaml [--set key=value ...] [--resume]

The file's key `trainer` chooses: `online` (learn while decoding) or `distill` (teacher forcing over given text).
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from rich.console import Console

from dvi_jax.command_line import progress_bar
from dvi_jax.config import TRAINERS, DistillConfig, TrainConfig, load_train_config
from dvi_jax.display import unfailing_console
from dvi_jax.errors import ArgumentParser, UserError, add_debug, one_line, run_cli
from dvi_jax.evaluate.curve import plot_learning_curve
from dvi_jax.learn.offline import train_offline
from dvi_jax.learn.online import OnlineResult, train_online
from dvi_jax.loading import enable_compilation_cache
from dvi_jax.processes import add_process_options, check_alike, is_first, one_of_several
from dvi_jax.settings_list import list_settings

PLAIN_EVERY = 10  # updates between two lines where the output is not a terminal


class GoingOn(NamedTuple):
    """What the user of a command does to go on with a run that ended early, as its notices say it."""

    after_limit: str  # its time was over
    after_stop: str  # a signal stopped it
    anew: str  # so did one, before there was anything to go on from


WITH_RESUME = GoingOn("--resume with more goes on", "--resume goes on", "--resume begins again")


def notice(kind: str, record: dict[str, Any], going_on: GoingOn = WITH_RESUME) -> str | None:
    """The line for a record that both trainers have, None for one that is not news."""
    lines = {
        "resume": "resumed at update {step}",
        "changed_setting": "{setting} is now {now}, it was {before}",
        "damaged_snapshot": "{reason}; going on from the snapshot of update {snapshot}",
        "failed_save": "warning: the snapshot of update {snapshot} could not be saved ({reason}), {count} so far;"
        " earlier ones stay, learning goes on",
        "no_events": "warning: no TensorBoard events from update {step} on ({reason}); metrics.jsonl has all",
        "rollback": "update {step}: {reason}, rolled back to {back_to} (rollback {rollbacks})",
        "traffic_changed": "update {step}: the accept rate fell to {accept_rate:.1%}, but the best snapshot's drafter"
        " has {good_accept_rate:.1%} on the same prompts: the traffic changed",
        "time_limit": "update {step}: the {minutes:g} minutes of learning are over; {after_limit}",
        "stopped": "stopped by {signal} after update {step}; newest snapshot: update {snapshot}; {after_stop}",
    }
    if kind not in lines:
        return None
    if kind == "stopped" and record["snapshot"] is None:
        return f"stopped by {record['signal']} before the first snapshot; {going_on.anew}"
    back_to = "the start" if record.get("snapshot") is None else f"the snapshot of update {record['snapshot']}"
    return lines[kind].format(**record, **going_on._asdict(), back_to=back_to)


class Display:
    """Shows a run: a progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, config: TrainConfig, console: Console, going_on: GoingOn):
        self.console, self.config, self.going_on = console, config, going_on
        self.bar = progress_bar("prompts", console)
        self.task = self.bar.add_task("train", total=config.prompts, note="compiling")

    def __call__(self, kind: str, record: dict[str, Any]) -> None:
        line = notice(kind, record, self.going_on)
        if line:
            say(self.console, line)
        elif kind == "eval":
            self.console.print(
                f"update {record['step']:5d}  held-out accept rate {record['accept_rate']:6.1%}"
                f"  tokens per round {record['tokens_per_round']:.3f}"
            )
        elif kind == "train":
            kl = f"kl {record['kl']:.3f}  " if "kl" in record else ""
            note = f"{kl}accept rate {record['accept_rate']:.1%}"
            self.bar.update(self.task, completed=record["prompts"], note=note)
            if not self.console.is_terminal and record["step"] % PLAIN_EVERY == 0:
                self.console.print(f"update {record['step']:5d}  {record['prompts']} prompts  {note}")


def say(console: Console, text: str) -> None:
    """Print a line as it is: not wrapped, so that paths can be copied."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def run(config: TrainConfig, *, resume: bool, console: Console, going_on: GoingOn = WITH_RESUME) -> OnlineResult:
    """Train with a display and leave the learning curve beside the metrics."""
    display = Display(config, console, going_on)
    with display.bar:
        result = train_online(config, resume=resume, report=display)
    if not is_first():
        return result
    try:
        plot_learning_curve(f"{config.out}/metrics.jsonl", f"{config.out}/curve.png")
    except (UserError, OSError, MemoryError) as error:  # the run is done and saved; matplotlib is an extra
        say(console, f"no curve: {one_line(str(error) or 'out of memory')}")
    return result


def run_distillation(config: DistillConfig, *, resume: bool, console: Console) -> None:
    """Distil with a line now and then, and say what came of it."""

    def report(kind: str, record: dict[str, Any]) -> None:
        line = notice(kind, record)
        if line:
            say(console, line)
            return
        agreement = " ".join(f"{rate:.3f}" for rate in record["agreement"])
        if kind == "eval":
            console.print(
                f"held out: agreement {agreement}  expected tokens per round {record['tokens_per_round']:.3f}"
            )
        elif record["step"] % (PLAIN_EVERY * config.log_every) == 0:
            console.print(
                f"update {record['step']:5d}  {record['tokens'] / 1e6:.1f}M tokens"
                f"  {record['tokens_per_second']:.0f} tokens/s  loss {record['loss']:.3f}  agreement {agreement}"
            )

    result = train_offline(config, resume=resume, report=report)
    console.print(
        f"{result.tokens / 1e6:.1f}M tokens in {result.seconds:.0f} s"
        f" ({result.tokens / result.seconds:.0f} tokens/s, compilation included)"
    )
    console.print(f"metrics {config.out}/metrics.jsonl  checkpoint {result.checkpoint}")


def show_settings() -> None:
    """Print the settings of both trainers."""
    for trainer, settings in TRAINERS.items():
        print(f"trainer: {trainer}")
        for setting in list_settings(settings):
            print(f"  {setting.name:32}{setting.default:12}  {setting.meaning}")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, train, and say what came of it."""
    parser = ArgumentParser(prog="python -m dvi_jax.train", description="Train a drafter, online or on given text.")
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="file of settings, or the name of a shipped one, such as demo"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting; may be repeated"
    )
    parser.add_argument("--list-settings", action="store_true", help="name, default and meaning of every setting")
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write TensorBoard events (--set tensorboard=true)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest snapshot in the run's `out`")
    add_process_options(parser)
    add_debug(parser)
    options = parser.parse_args(arguments)
    if options.list_settings:
        show_settings()
        return 0
    if options.config is None:
        raise UserError("--config is needed: a file of settings, or the name of a shipped one (see --list-settings)")
    config = load_train_config(options.config, options.set + ["tensorboard=true"] * options.tensorboard)
    with one_of_several(options):
        return _train(config, resume=options.resume)


def _train(config: TrainConfig | DistillConfig, *, resume: bool) -> int:
    """Run it, and say what came of it."""
    enable_compilation_cache()
    console = unfailing_console()
    if isinstance(config, DistillConfig):
        run_distillation(config, resume=resume, console=console)
        return 0
    check_alike(measured=config.max_minutes > 0, instead="leave out max_minutes, as clocks differ")
    result = run(config, resume=resume, console=console)
    console.print(f"read: {result.stream['conversations']}", soft_wrap=True)
    console.print(f"held-out accept rate {result.before.accept_rate:.1%} -> {result.after.accept_rate:.1%}")
    for name, path in (("metrics", "metrics.jsonl"), ("curve", "curve.png"), ("checkpoint", result.checkpoint.name)):
        say(console, f"{name:10} {config.out}/{path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
