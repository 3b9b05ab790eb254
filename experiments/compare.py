"""Puts several evaluations side by side: a markdown table and a picture.

    python -m experiments.compare --out DIR [NAME=]EVALUATION [[NAME=]EVALUATION ...]

EVALUATION is a folder that `python -m dvi_jax.evaluate --out` wrote (or its summary.json); NAME defaults to the
folder's name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli
from dvi_jax.evaluate.plots import category_rows
from dvi_jax.evaluate.style import CYCLE, mark_equal, new_figure, save_picture
from dvi_jax.evaluate.summary import FORMAT_VERSION
from dvi_jax.text_files import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Results that differ in one of these do not measure the same thing; it is said above the table.
SAME_EVERYWHERE = ("source", "dtype", "max_new_tokens", "questions_sha256", "questions_chosen", "device")
PANELS = {
    "speedup_over_fastest": "speed-up over the fastest plain",
    "speedup": "speed-up over plain of equal width",
    "tokens_per_round": "tokens per round",
}


def read_summaries(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> summary, in the order given; raises `UserError` naming the first that is no evaluation."""
    summaries: dict[str, dict[str, Any]] = {}
    for argument in arguments:
        name, path = _split(argument)
        if name in summaries:
            raise UserError(f"two evaluations are called {name!r}; give names: first={argument} ...")
        summary = read_json(path)
        if not isinstance(summary, dict) or summary.get("format_version") != FORMAT_VERSION or "overall" not in summary:
            raise UserError(f"{path} is not a summary of format {FORMAT_VERSION} written by python -m dvi_jax.evaluate")
        summaries[name] = summary
    return summaries


def overview(summaries: dict[str, dict[str, Any]]) -> str:
    """The markdown: a warning where settings differ, overall results, speed-ups and tokens per round by category."""
    parts = ["# Evaluations compared"]
    differing = [key for key in SAME_EVERYWHERE if len({str(s["settings"].get(key)) for s in summaries.values()}) > 1]
    if differing:
        parts.append(f"**Not directly comparable**: these evaluations differ in {', '.join(differing)}.")
    parts.append(_overall_table(summaries))
    for key, title in PANELS.items():
        parts += [f"## {title.capitalize()}, by category", _category_table(summaries, key)]
    return "\n\n".join(parts) + "\n"


def plot_comparison(summaries: dict[str, dict[str, Any]], picture: Path) -> None:
    """Speed-ups and tokens per round by category, one bar per evaluation; what tells nothing is left out.

    That is what none of them measured, and equal-width plain decoding where it is the fastest everywhere.
    """
    save_picture(lambda: _comparison(summaries), picture)


def _comparison(summaries: dict[str, dict[str, Any]]) -> Figure:
    keys = [key for key in PANELS if any(key in summary["overall"] for summary in summaries.values())]
    overall = [summary["overall"] for summary in summaries.values()]
    if all(row.get("speedup_over_fastest") == row.get("speedup") for row in overall):
        keys.remove("speedup")
    labels = list(dict.fromkeys(label for summary in summaries.values() for label in category_rows(summary)))
    labels.sort(key=lambda label: label == "overall")  # stable: only moves the last row to the end
    figure = new_figure(2.5 + 3.5 * len(keys), 1.4 + len(labels) * (0.16 + 0.17 * len(summaries)))
    panels = figure.subplots(1, len(keys), sharey=True)
    height, size = 0.8 / len(summaries), 9 if len(summaries) < 3 else 7
    for axes, key in zip(panels, keys, strict=True):
        for index, (name, summary) in enumerate(summaries.items()):
            rows = category_rows(summary)
            values = [rows.get(label, {}).get(key) or 0 for label in labels]
            places = [place - 0.4 + height * (index + 0.5) for place in range(len(labels))]
            bars = axes.barh(places, values, height, color=CYCLE[index % len(CYCLE)], label=name)
            axes.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], fontsize=size, padding=2)
        if key != "tokens_per_round":
            mark_equal(axes, upright=True, label="as fast")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel(PANELS[key])
        axes.margins(x=0.12, y=0.01)
        axes.grid(axis="x")
    panels[0].invert_yaxis()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4))
    return figure


def _overall_table(summaries: dict[str, dict[str, Any]]) -> str:
    header = ["evaluation", "drafter", "exit layer", "plan", "draft steps", "threshold", "tokens per round"]
    header += [
        "accept rate",
        "fastest plain tokens/s",
        "equal-width plain tokens/s",
        "speculative tokens/s",
        "speed-up",
    ]
    header += ["over equal width", "identical questions"]
    rows = []
    for name, summary in summaries.items():
        settings, overall = summary["settings"], summary["overall"]
        rows.append(
            [
                name,
                *(str(settings.get(key, "-")) for key in ("drafter", "exit_layer", "plan", "draft_steps", "threshold")),
                _number(overall["tokens_per_round"]),
                "-" if overall["accept_rate"] is None else f"{overall['accept_rate']:.1%}",
                *(
                    _number(overall.get(mode, {}).get("tokens_per_second"), 1)  # kept results lack the fastest plain
                    for mode in ("fastest_plain", "plain", "speculative")
                ),
                _number(overall.get("speedup_over_fastest")),
                _number(overall["speedup"]),
                f"{overall['identical_questions']} of {overall['questions']}",
            ]
        )
    return _markdown(header, rows)


def _category_table(summaries: dict[str, dict[str, Any]], key: str) -> str:
    tables = [category_rows(summary) for summary in summaries.values()]
    labels = list(dict.fromkeys(label for table in tables for label in table))
    labels.sort(key=lambda label: label == "overall")
    rows = [[label, *(_number(table.get(label, {}).get(key)) for table in tables)] for label in labels]
    return _markdown(["category", *summaries], rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _split(argument: str) -> tuple[str, Path]:
    """Name and summary.json of one argument; a path that exists is never cut at its `=`."""
    name, separator, rest = argument.partition("=")
    if not separator or Path(argument).exists():
        name, rest = "", argument
    path = Path(rest)
    folder = path.parent if path.name == "summary.json" else path
    return name or folder.resolve().name, folder / "summary.json" if path.is_dir() else path


def main(arguments: list[str] | None = None) -> int:
    """Read the summaries, write comparison.md and comparison.png, print the table."""
    parser = ArgumentParser(prog="python -m experiments.compare", description="Put several evaluations side by side.")
    parser.add_argument("evaluations", nargs="+", metavar="[NAME=]EVALUATION")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets comparison.md and comparison.png")
    add_debug(parser)
    options = parser.parse_args(arguments)
    summaries = read_summaries(options.evaluations)
    text, out = overview(summaries), Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.md").write_text(text, encoding="utf-8")
        plot_comparison(summaries, out / "comparison.png")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
