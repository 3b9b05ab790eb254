"""The comparison page of drafters and plans, from the kept results: `experiments/drafters.md`.

    python -m experiments.drafters_page

Nothing on the page is written by hand: a result that is kept again, or one more of them, changes it the next time. Each
figure stands with the command that measures it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.text_files import read_json
from experiments.calibration import cells, rows_of
from experiments.side_by_side import range_of

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
KEPT = "experiments/results/drafters/smollm2-135m-instruct"
MODELS = {
    "smollm2": ("SmolLM2-135M-Instruct", f"--checkpoint runs/smollm2 --drafter-from {KEPT}"),
    "qwen2_coder": ("Qwen2.5-Coder-1.5B-Instruct", "--checkpoint runs/qwen/distill/checkpoint"),
}
OPENING = """# Drafters and plans compared

Made by `python -m experiments.drafters_page` from `experiments/results/`; do not edit. What was done and tried around
these figures is in [results/README.md](results/README.md), and how checkpoints and texts are made.
"""

Table = list[list[str]]  # rows of cells, the header first


@dataclass(frozen=True)
class Section:
    """What is made of the results whose names match `patterns`, in this order."""

    title: str
    text: str
    patterns: tuple[str, ...]
    command: str
    rows: Callable[[Path, Any], Table]  # of one result, its header first


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = ArgumentParser(prog="python -m experiments.drafters_page", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "drafters.md", metavar="FILE.md")
    options = parser.parse_args(arguments)
    options.out.write_text(page(), encoding="utf-8")
    print(options.out)
    return 0


def page() -> str:
    """The whole page as Markdown."""
    parts = [OPENING]
    for section in SECTIONS:
        paths = [path for pattern in section.patterns for path in sorted(RESULTS.glob(pattern))]
        found = [(path, read_json(path)) for path in paths]
        tables = [section.rows(path, result) for path, result in found]
        if tables:
            header, rows = tables[0][0], [row for table in tables for row in table[1:]]
            parts.append(f"## {section.title}\n\n{section.text}\n\n{section.command}\n\n{markdown([header, *rows])}\n")
    return "\n".join(parts)


def markdown(table: Table) -> str:
    """A table whose columns but the first are numbers."""
    header, *rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def evaluations(path: Path, summary: Any) -> Table:
    """An evaluation's line."""
    settings, overall = summary["settings"], summary["overall"]
    model = next(name for key, (name, _) in MODELS.items() if key in path.stem)
    questions = "HumanEval" if "humaneval" in path.stem else "Spec-Bench"
    plain = overall["fastest_plain"]["tokens_per_second"]
    columns = ["model", "questions", "drafter", "plan", "tokens per round", "accept rate"]
    return [
        [*columns, "plain tokens/s", "times", "identical"],
        [
            model,
            f"{questions}, {overall['questions']}",
            settings["drafter"],
            f"`{settings['plan']}`",
            f"{overall['tokens_per_round']:.2f}",
            f"{overall['accept_rate']:.1%}",
            f"{plain:.0f}",
            f"**{overall['speedup_over_fastest']:.2f}**",
            f"{overall['identical_questions']} of {overall['questions']}",
        ],
    ]


def curves(path: Path, result: Any) -> Table:
    """Tokens per round by drafter and budget."""
    rows = [["drafter", "tokens trained", "tokens per round", "first draft right, held-out rows"]]
    for name, points in result["curves"].items():
        for point in points:
            share = f"{point['agreement'][0]:.1%}"
            rows.append([name, f"{point['tokens'] / 1e6:g}M", f"{point['tokens_per_round']:.2f}", share])
    return rows


def losses(path: Path, result: Any) -> Table:
    """Mean and range over seeds by loss."""
    rows = [["loss", "tokens per round", "first draft right, held-out rows (%)", "seeds"]]
    for name, runs in result["losses"].items():
        rounds = range_of([run["tokens_per_round"] for run in runs], 3)
        rows.append([name, rounds, range_of([100 * run["agreement"][0] for run in runs], 1), str(len(runs))])
    return rows


def calibration(path: Path, result: Any) -> Table:
    """Error before and after by text, draft of a round and kind of prompt."""
    columns = ["text", "drafts", "temperature", "judged", "right", "confidence", "error"]
    rows = [[*columns, "calibrated: confidence", "error", "by chance alone", "95%"]]
    for name, reading in result["readings"].items():
        rows += [[name, drafts, *cells(row)] for drafts, row in rows_of(reading).items()]
    return rows


def shifts(path: Path, result: Any) -> Table:
    """Frozen against online by domain, and what learning cost."""
    settings, cost = result["settings"], f"{result['cost']['share']:.1%}"
    cost += "" if "shares" in result["cost"] else " (two runs)"
    how = f"{Path(settings['checkpoint']).name}, rate {settings['optimizer']['head_lr']:g}"
    rows = [["began with", "domain", "frozen (%)", "online (%)", "cost of learning"]]
    for domain, row in result["summary"].items():
        rows.append([how, domain, f"{100 * row['frozen']:.1f}", range_of([100 * x for x in row["online"]], 1), cost])
    return rows


def drafters(path: Path, result: Any) -> Table:
    """Kinds and exit layers after the same little text."""
    rows = [["drafter, exit layer", "trained weights", "first draft right, held-out rows", "tokens per round"]]
    for name, run in result["runs"].items():
        decoded = run.get("decoded")
        rounds = f"{decoded['tokens_per_round']:.2f}" if decoded else ""
        weights = f"{run['parameters'] / 1e6:.2f}M"
        rows.append([name, weights, f"{run['held_out'][0]:.1%}", rounds])
    return rows


def command(*lines: str) -> str:
    """A command as a block of code."""
    return "\n".join(f"    {line}" for line in lines)


QUESTIONS = "--questions question.jsonl"
DECODED = f"\\\n        --plan PLAN --max-new-tokens 128 {QUESTIONS} --out DIR"
SECTIONS = (
    Section(
        "Speed and equality",
        "Times: tokens per second over those of the fastest plain decoding in the same run; batch 1, 128 new tokens,"
        " bfloat16, one H100. An output is identical if every token is plain decoding's.",
        ("spec_bench_smollm2_*.json", "spec_bench_qwen*.json", "humaneval_*.json"),
        command(
            *(f"python -m dvi_jax.evaluate {arguments} {DECODED}" for _, arguments in MODELS.values()),
        ),
        evaluations,
    ),
    Section(
        "Tokens per round over training tokens",
        "The same rows of the verifier's own replies, in the same order; each point is a run of its own. Four drafts in"
        " a round: one after the other, or a block in one pass.",
        ("curves_*.json",),
        command(
            "python -m experiments.curves --config experiments/configs/losses.yaml --tokens 1000000 2000000 5000000 \\",
            f"    {QUESTIONS} --out FILE.json",
        ),
        curves,
    ),
    Section(
        "Losses at equal tokens",
        "The same rows and first weights for every loss of a seed; mean, lowest and highest of the seeds.",
        ("losses_*.json",),
        command(
            "python -m experiments.losses --config experiments/configs/losses.yaml --seeds 3 \\",
            f"    {QUESTIONS} --out FILE.json",
        ),
        losses,
    ),
    Section(
        "Kinds and exit layers",
        "After 2M tokens of other people's text.",
        ("drafters_smollm2_h100.json",),
        command("python -m experiments.drafters --config experiments/configs/drafters.yaml --out DIR"),
        drafters,
    ),
    Section(
        "How sure a drafter may be",
        "The kept drafter on text that nothing was fitted to: other held-out prompts of the log, and Spec-Bench's"
        " questions. Drafts 1 to 3 of a round, each where those before it were right; all of them, and by kind of"
        " prompt. Error: expected calibration error in 15 bins.",
        ("calibration_*.json",),
        command(
            f"python -m experiments.calibration --checkpoint runs/smollm2 --drafter-from {KEPT} \\",
            f"    --fit runs/heldout.jsonl {QUESTIONS} --draft-steps 3 --batch 40 --out FILE.json",
        ),
        calibration,
    ),
    Section(
        "Learning while the traffic changes",
        "Accept rate over the second half of each domain; online: mean, lowest and highest of the seeds. Cost: share of"
        " tokens per second, the median of pairs of stretches; where it was the difference of two runs, these differ by"
        " several per cent among themselves.",
        ("domain_shift_*_h100.json",),
        command(
            "python -m experiments.domain_shift --config experiments/configs/domain_shift.yaml --per-domain 512 \\",
            f"    [--drafter-from {KEPT}] --out DIR",
        ),
        shifts,
    ),
)


if __name__ == "__main__":
    sys.exit(run_cli(main))
