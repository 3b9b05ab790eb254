"""The picture of the speed results: rounds over drafts, tokens over context, throughput over batch, compile times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvi_jax.evaluate.style import BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
COLORS = {"7b": BLUE, "smollm2": ORANGE, "13b": GREEN, "1b": PURPLE, "tiny": GREY}


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a picture of four panels; one without rows says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(lambda: _panels(result), path)


def _panels(result: dict[str, Any]) -> Figure:
    figure = new_figure(9.6, 7.2)
    panels: tuple[tuple[Callable[[Axes, Any], bool], str, Any], ...] = (
        (_drafts, "A round (dashed: its floor), batch 1", result["rows"]),
        (_contexts, "A plain token (dashed: its floor), batch 1", result["rows"]),
        (_batches, "Plain throughput", result["rows"]),
        (_compile, "Start of a new process: seconds to compile", result["compile"]),
    )
    for axes, (panel, title, rows) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        axes.set_title(title)
        axes.grid()
        if not panel(axes, rows):
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=GREY)
        elif axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, ncols=2)
    facts = result["environment"]
    figure.suptitle(f"{facts['device']}, jax {facts['jax']}", fontsize=10)
    return figure


def _drafts(axes: Axes, rows: Rows) -> bool:
    """Milliseconds of a round over its drafts: the widest program of every shape, at its short context."""
    found = [row for row in rows if row["batch"] == 1 and row["width"] > 1 and not row["part"].endswith("-context")]
    for shape, own in _by_shape(found):
        widest = max(row["width"] for row in own)
        _lines(axes, shape, "drafted_per_round", [row for row in own if row["width"] == widest])
    axes.set_xlabel("drafts per round (measured mean)")
    axes.set_ylabel("ms per round")
    axes.set_yscale("log")
    if found:  # room for the names above the lines
        axes.set_ylim(top=4 * max(row["round_ms"] for row in found))
    return bool(found)


def _contexts(axes: Axes, rows: Rows) -> bool:
    """Milliseconds of a plain token over the context, in the longest caches of every shape."""
    found = [row for row in rows if row["batch"] == 1 and row["width"] == 1 and row["part"].endswith("-context")]
    for shape, own in _by_shape(found):
        longest = max(row["slots"] for row in own)
        _lines(axes, shape, "context", [row for row in own if row["slots"] == longest])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("ms per token")
    axes.set_ylim(bottom=0)
    return bool(found)


def _batches(axes: Axes, rows: Rows) -> bool:
    """Tokens per second over the batch, both axes logarithmic, and what scaling with the batch would give."""
    found = [row for row in rows if row["width"] == 1 and row["slots"] == 512]
    for shape, own in _by_shape(found):
        points = sorted((row["batch"], row["tokens_per_second"]) for row in own)
        axes.plot(*zip(*points, strict=True), marker="o", color=COLORS[shape], label=shape)
        first = points[0][1] / points[0][0]
        ideal = [(batch, first * batch) for batch, _ in points]
        axes.plot(*zip(*ideal, strict=True), linestyle="--", linewidth=1, color=COLORS[shape])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("batch (dashed: in proportion to it)")
    axes.set_ylabel("tokens per second")
    return bool(found)


def _compile(axes: Axes, rows: Rows) -> bool:
    """Stacked seconds of tracing, prefill and decoding, with an empty cache on disk and with a full one."""
    left = [0.0] * len(rows)
    names = [f"{row['shape']}, {row['cache']} cache" for row in rows]
    for part, color in (("trace", GREY), ("prefill", ORANGE), ("decode", BLUE)):
        seconds = [row[f"{part}_seconds"] for row in rows]
        axes.barh(names, seconds, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    return bool(rows)


def _lines(axes: Axes, shape: str, over: str, rows: Rows) -> None:
    ordered = sorted(rows, key=lambda row: row[over])
    places, color = [row[over] for row in ordered], COLORS[shape]
    axes.plot(places, [row["round_ms"] for row in ordered], marker="o", color=color, label=shape)
    axes.plot(places, [row["floor_ms"] for row in ordered], color=color, linestyle="--")


def _by_shape(rows: Rows) -> list[tuple[str, Rows]]:
    return [(shape, [row for row in rows if row["shape"] == shape]) for shape in sorted({r["shape"] for r in rows})]
