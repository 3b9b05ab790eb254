"""The report's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dvi_jax.evaluate.style import BLUE, GREY, ORANGE, mark_equal, new_figure
from dvi_jax.evaluate.summary import turn_speedup
from dvi_jax.evaluate.trace import FASTEST, SPECULATIVE, Turn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = (4.4, 3.4)  # three beside each other


def category_rows(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Label -> numbers of every row of a report, in order: the categories, MT-Bench together, all together."""
    rows = dict(summary["categories"])
    if "mt_bench" in summary:
        rows["MT-Bench together"] = summary["mt_bench"]
    return rows | {"overall": summary["overall"]}


def plot_speed(summary: dict[str, Any]) -> Figure:
    """Tokens per second of fastest plain and speculative decoding, a pair of bars per category, and their ratio."""
    rows = category_rows(summary)
    figure = new_figure(9.0, 1.2 + 0.34 * len(rows))
    axes = figure.subplots()
    for offset, mode, color in ((0.2, FASTEST, GREY), (-0.2, SPECULATIVE, BLUE)):
        values = [row[mode]["tokens_per_second"] or 0 for row in rows.values()]
        places = [len(rows) - 1 - index + offset for index in range(len(rows))]
        axes.barh(places, values, height=0.38, color=color, label=mode.replace("_", " "))
    for index, row in enumerate(rows.values()):
        if row["speedup_over_fastest"] is not None:
            longest = max(row[FASTEST]["tokens_per_second"], row[SPECULATIVE]["tokens_per_second"])
            axes.text(longest, len(rows) - 1 - index, f"  {row['speedup_over_fastest']:.2f}x", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [_shorten(label) for label in reversed(rows)])
    axes.margins(x=0.12, y=0.01)
    axes.set_xlabel("tokens per second, decoding at batch 1")
    figure.legend(loc="outside upper right", ncols=2)
    axes.grid(axis="x")
    return figure


def plot_accept_lengths(summary: dict[str, Any]) -> Figure:
    """Share of rounds that committed 1, 2, ... tokens."""
    counts, rounds = summary["overall"]["accept_length_histogram"], max(summary["overall"]["rounds"], 1)
    figure = new_figure(*SMALL)
    axes = figure.subplots()
    lengths = range(1, len(counts) + 1)
    bars = axes.bar(lengths, [100 * count / rounds for count in counts], color=BLUE)
    axes.bar_label(bars, [f"{100 * count / rounds:.0f}%" for count in counts], fontsize=9, padding=2)
    axes.set_xticks(lengths)
    axes.set_xlabel("accept length: tokens committed by one round")
    axes.set_ylabel(f"share of {summary['overall']['rounds']:,} rounds (%)")
    axes.margins(y=0.1)
    axes.grid(axis="y")
    return figure


def plot_positions(summary: dict[str, Any]) -> Figure:
    """Accept rate of the j-th draft alone, and of the first j drafts in a row (CTAR)."""
    overall = summary["overall"]
    figure = new_figure(*SMALL)
    axes = figure.subplots()
    for key, color, marker, label in (
        ("accept_rate_per_position", BLUE, "o", "the j-th draft, the ones before it accepted"),
        ("ctar", ORANGE, "s", "all of the first j drafts (CTAR)"),
    ):
        points = [(place, 100 * rate) for place, rate in enumerate(overall[key], start=1) if rate is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], color=color, marker=marker, label=label)
    axes.set_xticks(range(1, len(overall["ctar"]) + 1))
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    axes.set_xlabel("j, draft position in the round")
    axes.set_ylabel("accepted (%)")
    figure.legend(loc="outside upper left")
    axes.grid(axis="y")
    return figure


def plot_turns(turns: Sequence[Turn]) -> Figure:
    """One dot per answer: its speed-up over its tokens per round. The height at a given x is what a round costs."""
    figure = new_figure(*SMALL)
    axes = figure.subplots()
    points = []
    for turn in turns:
        rounds, speedup = len(turn.speculative.accept_lengths), turn_speedup(turn)
        if speedup is not None:
            points.append((turn.speculative.decoded_tokens / rounds, speedup))
    mark_equal(axes, label="as fast as the fastest plain decoding")
    axes.scatter([x for x, _ in points], [y for _, y in points], s=14, color=BLUE, alpha=0.5, linewidths=0)
    axes.set_xlim(0.9, max([2.0, *[1.05 * x for x, _ in points]]))
    axes.set_ylim(0, max([1.2, *[1.05 * y for _, y in points]]))
    figure.legend(loc="outside upper left")
    axes.set_xlabel("tokens per round of one answer")
    axes.set_ylabel("speed-up over the fastest plain")
    axes.grid()
    return figure


def _shorten(label: str, longest: int = 24) -> str:
    return label if len(label) <= longest else label[: longest - 1] + "…"
