"""`python -m conversion.parity`: does the JAX port do what the PyTorch Kangaroo does?

The same weights, adapter and prompts go through `kangaroo_ref`, JAX, transformers and, where a checkout is given,
upstream itself, all in float32. Stage tensors may differ by 2e-4, ids and accept lengths by nothing.
Exit status: 0 all agree, 1 something differs, 2 the check could not be made.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table

from dvi_jax.config import DecodeConfig
from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli

if TYPE_CHECKING:  # they pull in jax and torch: imported where used, so that --help does not wait for them
    from conversion.parity.compare import Comparison, Row
    from conversion.parity.inputs import Case
    from conversion.parity.runs import Implementation, Reference, Settings


@dataclass
class Report:
    """One case's outcome."""

    name: str
    exit_layer: int
    prompts: int
    settings: Settings
    comparison: Comparison
    not_run: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rounds: int = 0
    committed: int = 0  # tokens the reference committed in its rounds


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, compare, print the tables; 1 unless all agree."""
    options = _parser().parse_args(arguments)
    DecodeConfig(
        draft_steps=options.draft_steps, threshold=options.threshold, max_new_tokens=options.max_new_tokens
    )  # refuses what is out of range
    if options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {options.limit}")
    if importlib.util.find_spec("torch") is None:
        raise UserError("parity needs torch: pip install 'dvi-jax[ref]'")
    from kangaroo_ref.upstream import read_checkout

    if options.kangaroo_dir is not None:
        read_checkout(options.kangaroo_dir)  # an altered checkout is refused before anything is converted
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        reports = [_check(case, options) for case in _cases(options, Path(scratch))]
    console = Console(width=None if sys.stdout.isatty() else 140)
    for report in reports:
        _print(report, console)
    agree = all(report.comparison.agrees for report in reports)
    console.print("[bold]all agree[/bold]" if agree else "[bold]they do not agree[/bold]")
    if options.json is not None:
        _write_json(options.json, reports)
    return 0 if agree else 1


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m conversion.parity",
        description="Compare the JAX port with the PyTorch Kangaroo, stage by stage and token for token.",
    )
    parser.add_argument(
        "--hf", type=Path, metavar="DIR", help="Hugging Face Llama, or a GGUF file (default: tiny ones)"
    )
    parser.add_argument("--exit-layer", type=int, metavar="K", help="layers that draft (default: 2)")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="Kangaroo adapter (default: random, fixed seed)")
    parser.add_argument("--checkpoint", type=Path, metavar="CKPT", help="compare this import instead of a fresh one")
    parser.add_argument("--kangaroo-dir", type=Path, metavar="DIR", help="untouched upstream checkout to run as well")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt-ids", action="append", metavar="1,2,3", help="token ids; may be given several times")
    prompts.add_argument("--questions", type=Path, metavar="FILE", help="Spec-Bench question.jsonl")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="how many questions to use")
    parser.add_argument("--draft-steps", type=int, default=6, metavar="S", help="most drafts of a round")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.6,
        metavar="TAU",
        help="stop drafting after a draft less probable than this",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest reply, in tokens")
    parser.add_argument("--eos-id", type=int, metavar="N", help="end of sequence (default: the model's); -1 for none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    add_debug(parser)
    return parser


def _cases(options: argparse.Namespace, scratch: Path) -> list[Case]:
    from conversion.parity.inputs import TINY_CONFIGS, make_case, write_tiny_model

    if options.hf is not None:
        return [
            make_case(
                options.hf,
                scratch,
                adapter=options.adapter,
                exit_layer=options.exit_layer,
                checkpoint=options.checkpoint,
            )
        ]
    for name in ("adapter", "checkpoint", "questions"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} belongs to a model: give --hf as well")
    cases: list[Case] = []
    for seed, (name, config) in enumerate(TINY_CONFIGS.items()):
        write_tiny_model(scratch / name / "model", config, seed)
        case = make_case(scratch / name / "model", scratch / name, exit_layer=options.exit_layer)
        cases.append(replace(case, name=name))
    return cases


def _check(case: Case, options: argparse.Namespace) -> Report:
    from conversion.parity.compare import Comparison
    from conversion.parity.inputs import choose_prompts
    from conversion.parity.runs import HuggingFace, Jax, Reference, Settings, open_upstream, why_not_transformers

    prompts = choose_prompts(case, options, options.max_new_tokens)
    eos_id = next(iter(case.config.eos_token_ids), -1) if options.eos_id is None else options.eos_id
    settings = Settings(options.draft_steps, options.threshold, options.max_new_tokens, eos_id)
    report = Report(case.name, case.exit_layer, len(prompts), settings, Comparison())
    with ExitStack() as stack:
        reference = Reference(case)
        others: list[Implementation] = [Jax(case)]
        reason = why_not_transformers(case.config)
        if reason is None:
            others.append(HuggingFace(case))
        else:
            report.not_run["hf"] = reason
        if options.kangaroo_dir is None:
            report.not_run["upstream"] = "give --kangaroo-dir"
        else:
            others.append(stack.enter_context(open_upstream(case, options.kangaroo_dir)))
        for number, prompt in enumerate(_with_progress(prompts, case.name), 1):
            _compare_prompt(report, number, prompt, reference, others)
        _explain_first_mismatch(report, reference, prompts)
    return report


def _with_progress(prompts: Sequence[list[int]], name: str) -> Iterable[list[int]]:
    console = Console(stderr=True)
    return track(prompts, name, console=console, transient=True, disable=not console.is_terminal)


def _compare_prompt(
    report: Report, number: int, prompt: list[int], reference: Reference, others: Sequence[Implementation]
) -> None:
    from conversion.parity.compare import stop_at_first_token

    comparison = report.comparison
    comparison.add_stages(number, reference.stages(prompt), {other.name: other.stages(prompt) for other in others})
    decoded = {it.name: it.decode(prompt, report.settings) for it in (reference, *others)}
    expected = decoded[reference.name]
    accept_lengths = expected.accept_lengths or []
    report.rounds += len(accept_lengths)
    report.committed += sum(accept_lengths)
    if expected.output_ids[len(prompt)] == report.settings.eos_id:
        report.notes.append(
            f"prompt {number}: the first new token is eos; JAX stops there, the original does not: compared up to it"
        )
        decoded = stop_at_first_token(len(prompt), decoded)
    comparison.add_decoded(number, len(prompt), decoded, others)


def _explain_first_mismatch(report: Report, reference: Reference, prompts: Sequence[list[int]]) -> None:
    from conversion.parity.compare import IDS

    first = report.comparison.first_mismatch
    if first is None:
        return
    row, mismatch = first
    where = f"prompt {mismatch.prompt}, round {mismatch.round}, position {mismatch.position}"
    report.notes.append(
        f"first difference: {where}: {mismatch.what} of {row.name} {mismatch.found}, of {row.against}"
        f" {mismatch.expected}"
    )
    if mismatch.what == IDS and mismatch.expected is not None:
        prompt = prompts[mismatch.prompt - 1]
        ids = reference.decode(prompt, report.settings).output_ids[: mismatch.position]
        if len(ids) == mismatch.position:
            report.notes.append(f"the reference's two best logits there are {reference.margin(ids):.1e} apart")


def _print(report: Report, console: Console) -> None:
    settings = report.settings
    table = Table(
        title=f"{report.name}: exit layer {report.exit_layer}, {report.prompts} prompts,"
        f" {settings.max_new_tokens} new tokens, {settings.draft_steps} draft steps, threshold {settings.threshold:g}",
        caption="float32; relative: to the largest magnitude in the same row",
    )
    for heading in ("stage", "compared", "largest absolute", "relative", "where", ""):
        table.add_column(heading, justify="right" if heading in ("largest absolute", "relative") else "left")
    for row in report.comparison.rows.values():
        table.add_row(row.stage, f"{row.name} - {row.against}", *_cells(row), "agree" if row.agrees else "DIFFER")
    console.print(table)
    if report.rounds:
        console.print(
            f"{report.rounds} rounds in the reference, {report.committed / report.rounds:.2f} tokens per round"
        )
    for name, reason in report.not_run.items():
        console.print(f"{name}: not run ({reason})")
    for note in report.notes:
        console.print(note)


def _cells(row: Row) -> tuple[str, str, str]:
    place, where = row.place, ""
    if place is not None:
        where = f"prompt {place.prompt}, position {place.position}, index {place.index}"
        return f"{row.absolute:.1e}", f"{row.relative:.1e}", where
    if row.mismatch is not None:
        where = f"prompt {row.mismatch.prompt}, round {row.mismatch.round}, position {row.mismatch.position}"
    return f"{row.equal} of {row.prompts} equal", "", where


def _write_json(path: Path, reports: Sequence[Report]) -> None:
    from conversion.parity.compare import TOLERANCE

    cases = []
    for report in reports:
        comparison = report.comparison
        first = comparison.first_mismatch
        cases.append(
            {
                "name": report.name,
                "exit_layer": report.exit_layer,
                "prompts": report.prompts,
                "settings": asdict(report.settings),
                "agree": comparison.agrees,
                "stages": [asdict(row) | {"agrees": row.agrees} for row in comparison.rows.values()],
                "first_difference": None if first is None else {"implementation": first[0].name, **asdict(first[1])},
                "rounds": report.rounds,
                "committed": report.committed,
                "not_run": report.not_run,
                "notes": report.notes,
            }
        )
    result = {"agree": all(case["agree"] for case in cases), "tolerance": TOLERANCE, "cases": cases}
    try:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(run_cli(main))
