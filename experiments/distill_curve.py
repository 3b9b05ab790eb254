"""The curve of a drafter's distillation, over one run or several that follow each other: thinned metrics, a picture.

    python -m experiments.distill_curve TEXT=runs/distill/metrics.jsonl REPLIES=runs/distill_replies/metrics.jsonl \\
        --out distill.json

A stage is NAME=METRICS, in the order of training. Agreement on training batches depends on the text, so it jumps where
a stage begins. `--seen NAME` says that a stage's held-out rows were also learned from (a packed file given twice): the
picture then shows them hollow. Writes the JSON and a PNG beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.evaluate.style import CYCLE, GREY, new_figure, page_color, save_picture
from experiments.measure import write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 60  # of a stage, at most
INSIDE = 0.5  # million tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the stages, write both files, print a line for each stage."""
    parser = ArgumentParser(prog="python -m experiments.distill_curve", description=__doc__)
    parser.add_argument("stages", nargs="+", metavar="NAME=METRICS")
    parser.add_argument(
        "--seen", nargs="*", default=[], metavar="NAME", help="stages whose held-out rows were trained on"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    stages = []
    for argument in options.stages:
        name, separator, path = argument.partition("=")
        if not separator:
            raise UserError(f"a stage is NAME=METRICS, got {argument!r}")
        stages.append(read_stage(name, Path(path), seen=name in options.seen))
    write_result(options.out, {"stages": stages})
    draw(stages, options.out.with_suffix(".png"))
    for stage in stages:
        begin, end = stage["held_out"]
        print(
            f"{stage['name']}: {stage['tokens'][-1] / 1e6:.1f}M tokens, {stage['tokens_per_second']:.0f} tokens/s",
            end="",
        )
        print(
            f", held-out agreement {begin[0]:.3f} -> {end[0]:.3f}" + (" (rows learned from)" if stage["seen"] else "")
        )
    return 0


def read_stage(name: str, path: Path, *, seen: bool) -> dict[str, Any]:
    """One stage of a result: means over as many updates as `POINTS` asks for, and both evaluations."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        updates = [record for record in records if record["kind"] == "train"]
        held_out = [record["agreement"] for record in records if record["kind"] == "eval"]
        rates = [record["tokens_per_second"] for record in updates[1:]]  # the first counts compilation
        groups = thinned(updates)
        stage = {
            "name": name,
            "tokens": [group[-1]["tokens"] for group in groups],
            "agreement": [mean([update["agreement"] for update in group]) for group in groups],
            "loss": [statistics.mean(update["loss"] for update in group) for group in groups],
            "held_out": [held_out[0], held_out[-1]],
            "seen": seen,
            "tokens_per_second": statistics.median(rates),
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, statistics.StatisticsError) as error:
        raise UserError(f"{path} is not the metrics.jsonl of a finished distillation: {error}") from error
    return stage


def thinned(updates: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The updates in order, in at most `POINTS` groups of one size (the last may be smaller)."""
    size = -(-len(updates) // POINTS)
    return [updates[begin : begin + size] for begin in range(0, len(updates), size)]


def mean(vectors: list[list[float]]) -> list[float]:
    """Of equally long lists, place by place."""
    return [statistics.mean(values) for values in zip(*vectors, strict=True)]


def draw(stages: list[dict[str, Any]], path: Path) -> None:
    """Agreement of every unrolled draft with the verifier over the tokens of all stages; dots for held-out rows."""
    save_picture(lambda: _curves(stages), path)


def _curves(stages: list[dict[str, Any]]) -> Figure:
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    start = 0.0
    for stage in stages:
        millions = [start + tokens / 1e6 for tokens in stage["tokens"]]
        for index, (color, values) in enumerate(zip(CYCLE, zip(*stage["agreement"], strict=True), strict=False)):
            label = f"draft {index + 1}" if stage is stages[0] else None
            axes.plot(millions, [100 * value for value in values], color=color, label=label)
            ends = [100 * evaluation[index] for evaluation in stage["held_out"]]
            face = page_color() if stage["seen"] else color
            # A little inside the stage, so that one's end and the next one's beginning stay apart.
            places = [start + INSIDE, millions[-1] - INSIDE]
            axes.plot(places, ends, "o", color=color, markerfacecolor=face, markersize=5.5, zorder=3, clip_on=False)
        if stage is not stages[0]:
            axes.axvline(start, color=GREY, linewidth=1)
        middle = (start + millions[-1]) / 2
        axes.text(
            middle, 1.01, stage["name"], transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=9
        )
        start = millions[-1]
    axes.plot([], [], "o", color=GREY, label="held-out rows, before and after a stage")
    if any(stage["seen"] for stage in stages):
        axes.plot([], [], "o", color=GREY, markerfacecolor=page_color(), label="the same rows, also learned from")
    axes.set_xlim(0, start)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of teacher forcing (millions)")
    axes.set_ylabel("draft = verifier's token (%)")
    axes.grid()
    figure.legend(loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    sys.exit(run_cli(main))
