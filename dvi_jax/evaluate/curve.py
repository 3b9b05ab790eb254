"""The learning curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvi_jax.evaluate.style import BLUE, GREY, ORANGE, mark_equal, new_figure, save_picture
from dvi_jax.learn.metrics import read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_learning_curve(metrics: str | Path, picture: str | Path, break_even: float | None = None) -> None:
    """Draw a run's metrics.jsonl over its updates: tokens per round and accept rate of what is held out, loss terms.

    `break_even`: tokens per round from which speculation is faster than the fastest plain decoding, where it is known.
    """
    records = read_records(Path(metrics))
    save_picture(lambda: _curve(records, break_even), picture)


def _curve(records: list[dict[str, Any]], break_even: float | None) -> Figure:
    rollouts = [record for record in records if record["kind"] == "train"]
    updates = [record for record in rollouts if "kl" in record]  # the others had no update of their own
    evaluations = [record for record in records if record["kind"] == "eval"]
    steps = [record["step"] for record in evaluations]
    figure = new_figure(8, 8)
    tokens, accepted, losses = figure.subplots(3, 1, sharex=True)
    tokens.plot(steps, [r["tokens_per_round"] for r in evaluations], color=BLUE, marker="o", label="held-out prompts")
    if break_even is not None:
        mark_equal(tokens, break_even, label="as fast as the fastest plain decoding")
    tokens.set_ylim(1, 1.08 * max([1.2, break_even or 0.0, *(r["tokens_per_round"] for r in evaluations)]))
    tokens.set_ylabel("tokens per round")
    rates = [100 * record["accept_rate"] for record in rollouts]
    accepted.plot([r["step"] for r in rollouts], rates, color=GREY, linewidth=1, label="rollouts")
    held_out = [100 * record["accept_rate"] for record in evaluations]
    accepted.plot(steps, held_out, color=BLUE, marker="o", label="held-out prompts")
    accepted.set_ylim(0, 1.08 * max([10.0, *rates, *held_out]))
    accepted.set_ylabel("accepted / judged drafts (%)")
    for name, color, label in (("kl", BLUE, "KL(verifier || drafter), nats"), ("pg", ORANGE, "policy-gradient term")):
        losses.plot([r["step"] for r in updates], [r[name] for r in updates], color=color, label=label)
    losses.set_ylabel("loss terms")
    losses.set_xlabel("fast updates")
    for axes in (tokens, accepted, losses):
        axes.grid()
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    return figure
