"""Command line of evaluation: python -m dvi_jax.evaluate --checkpoint CKPT --questions question.jsonl --out DIR"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from dvi_jax.command_line import (
    AUTO,
    add_model_options,
    check_engine_options,
    decode_settings,
    load_model,
    memory_limit,
    progress_bar,
)
from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import choose_plan
from dvi_jax.decode.choosing import PlanChooser
from dvi_jax.decode.cost import with_measured_cost
from dvi_jax.decode.plan import row_class
from dvi_jax.directories import require_new
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.evaluate.batched import BatchedDecoder
from dvi_jax.evaluate.report import render_report
from dvi_jax.evaluate.runner import Answered, Decoder, PairedDecoder, first_prompt
from dvi_jax.evaluate.spec_bench import Question, answer_line, read_questions, sha256_of
from dvi_jax.evaluate.style import new_figure
from dvi_jax.evaluate.summary import measure, summarise
from dvi_jax.evaluate.trace import LinesFile, trace_line
from dvi_jax.loading import LoadedModel
from dvi_jax.processes import add_process_options, check_alike, is_first, one_of_several
from dvi_jax.texts import usual_drafting

MAX_NEW_TOKENS = 128
PLAIN_EVERY = 10  # questions between two lines where the output is not a terminal
DIFFERENT = 1  # exit status when an answer differs from plain decoding


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, write the files, print the outcome; status 1 unless all answers are equal."""
    options = _parser().parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {options.limit}")
    if options.batch is not None:
        check_engine_options(options, "--batch")
    new_figure(1, 1)  # without matplotlib there is no report: say so before the work, not after
    with one_of_several(options):
        settings = decode_settings(options)  # asks for the backend, which several processes begin together
        if settings.draft_steps < 1:
            raise UserError(
                "a plan that drafts is needed: without drafts there is nothing to compare with plain decoding"
            )
        check_alike(
            measured=(options.plan == AUTO and options.batch is None) or options.adaptive,
            instead="name a --plan other than auto, and leave out --adaptive, as both measure times",
        )
        return measure_questions(options, settings)


def measure_questions(options: argparse.Namespace, settings: DecodeConfig) -> int:
    """Measure what the options ask for and write it; the exit status."""
    questions = read_questions(options.questions)[: options.limit]
    out = Path(options.out)
    if is_first():
        require_new(out)
    model = load_model(options)
    if options.plan is None and options.draft_steps is None and model.drafter_is_trained:
        settings = usual_drafting(model, settings)
    if options.batch is not None:
        plan = AUTO if options.plan == AUTO else str(choose_plan(model, settings))
        batched = BatchedDecoder(model, settings, plan, options.batch)
        about = describe_run(model, settings, options, len(questions), (options.batch, batched.width))
        return report(batched, questions, about | {"batch": options.batch}, out)
    if options.adaptive:
        settings = with_measured_cost(model, first_prompt(PairedDecoder(model, settings), questions), settings)
    chooser = None
    if options.plan == AUTO:
        prompt = first_prompt(PairedDecoder(model, settings), questions)
        chooser = PlanChooser.measured(model, settings, prompt)
    about = describe_run(model, settings, options, len(questions), (1, settings.width))
    return report(PairedDecoder(model, settings, memory_limit(options), chooser), questions, about, out)


def report(decoder: Decoder, questions: Sequence[Question], about: dict[str, Any], out: Path) -> int:
    """Measure, and print the outcome; the exit status. Other processes than the first only decode along."""
    if not is_first():
        first_prompt(decoder, questions)
        for _ in decoder.run(questions):
            pass
        return 0
    summary = evaluate(decoder, questions, about, out, Console(stderr=True))
    print(outcome(summary, out))
    return DIFFERENT if summary["differences"] else 0


def evaluate(
    decoder: Decoder, questions: Sequence[Question], about: dict[str, Any], out: Path, console: Console
) -> dict[str, Any]:
    """Measure all questions; write answers, traces and metrics as they come, then summary.json and report.html."""
    first_prompt(decoder, questions)
    answers, began = [], time.perf_counter()
    draft_steps = decoder.settings.draft_steps
    display = Display(len(questions), console)
    _make_folder(out)
    with (
        LinesFile(out / "answers.jsonl") as answer_file,
        LinesFile(out / "answers_plain.jsonl") as plain_answer_file,
        LinesFile(out / "traces.jsonl") as trace_file,
        LinesFile(out / "metrics.jsonl") as metrics_file,
        display.bar,
    ):
        for answered in decoder.run(questions):
            answers.append(answered)
            if answered.turns:
                question, texts = answered.question, answered.texts
                speculative, plain = zip(*[(turn.speculative, turn.plain) for turn in answered.turns], strict=True)
                answer_file.append(answer_line(question, about["model_id"], texts, speculative))
                plain_texts = [decoder.tokenizer.decode(trace.new_ids) for trace in plain]
                plain_answer_file.append(answer_line(question, about["model_id"] + "-plain", plain_texts, plain))
            for turn in answered.turns:
                for trace in (turn.plain, turn.speculative, *([turn.narrow] if turn.narrow else [])):
                    trace_file.append(trace_line(trace))
            metrics_file.append(question_metrics(len(answers), answered, draft_steps))
            display.update(answers, draft_steps)
        turns = [turn for answered in answers for turn in answered.turns]
        skipped = [skip for answered in answers for skip in answered.skipped]
        summary = summarise(turns, skipped, draft_steps, about | {"seconds": round(time.perf_counter() - began, 1)})
        metrics_file.append({"kind": "summary", "step": len(answers), **summary["overall"]})
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (out / "report.html").write_text(render_report(summary, turns), encoding="utf-8")
    return summary


def question_metrics(step: int, answered: Answered, draft_steps: int) -> dict[str, Any]:
    """The line of metrics.jsonl about one question: its numbers over its turns, and the turns left out."""
    question = answered.question
    about = {"kind": "question", "step": step, "question_id": question.question_id, "category": question.category}
    skipped = [{"turn": skip.turn, "reason": skip.reason} for skip in answered.skipped]
    return about | {"skipped": skipped} | (measure(answered.turns, draft_steps) if answered.turns else {})


def describe_run(
    model: LoadedModel, settings: DecodeConfig, options: argparse.Namespace, questions: int, rows: tuple[int, int]
) -> dict[str, Any]:
    """What was measured: the report's settings table. `rows`: sequences of a pass, and rows of each."""
    manifest, device = model.manifest, jax.devices()[0]
    return {
        "model_id": Path(options.checkpoint).resolve().name,
        "source": manifest.source,
        "verifier": manifest.verifier,
        "dtype": manifest.dtype,
        "kv": model.kv,
        "drafter": manifest.drafter,
        "exit_layer": manifest.exit_layer,
        "num_layers": model.config.num_layers,
        "training_step": manifest.training_step,
        "plan": AUTO if options.plan == AUTO else str(choose_plan(model, settings)),
        "row_class": row_class(*rows, model.config, manifest.dtype),
        "draft_steps": settings.draft_steps,
        "threshold": settings.threshold,
        "draft_cost": settings.draft_cost,
        "max_new_tokens": settings.max_new_tokens,
        "questions_file": Path(options.questions).name,
        "questions_sha256": sha256_of(options.questions),
        "questions_chosen": questions,
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def outcome(summary: dict[str, Any], out: Path) -> str:
    """The few lines printed at the end."""
    overall, skipped = summary["overall"], summary["skipped"]
    lines = [
        f"tokens per round {_show(overall['tokens_per_round'], '.2f')}"
        f"  accept rate {_show(overall['accept_rate'], '.1%')}",
        f"tokens per second: fastest plain {_show(overall['fastest_plain']['tokens_per_second'], '.1f')},"
        f" speculative {_show(overall['speculative']['tokens_per_second'], '.1f')}"
        f"  ({_show(overall['speedup_over_fastest'], '.2f')}x; plain of equal width"
        f" {_show(overall['plain']['tokens_per_second'], '.1f')}, {_show(overall['speedup'], '.2f')}x)",
        f"identical outputs: {overall['identical_questions']} of {overall['questions']} questions",
    ]
    if skipped["turns"]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped["reasons"].items())
        lines.append(f"skipped {skipped['turns']} turns ({reasons})")
    return "\n".join([*lines, f"report {out / 'report.html'}"])


class Display:
    """Shows a run on stderr: a progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, questions: int, console: Console):
        self.console = console
        self.bar = progress_bar("questions", console)
        self.task = self.bar.add_task("evaluate", total=questions, note="compiling")
        self.questions = questions

    def update(self, answers: Sequence[Answered], draft_steps: int) -> None:
        """Show the numbers so far."""
        so_far = measure([turn for answered in answers for turn in answered.turns], draft_steps)
        note = (
            f"{_show(so_far['tokens_per_round'], '.2f')} tokens per round"
            f"  {_show(so_far['speedup_over_fastest'], '.2f')}x"
            f"  {so_far['identical_questions']} of {so_far['questions']} identical"
        )
        self.bar.update(self.task, completed=len(answers), note=note)
        if not self.console.is_terminal and (len(answers) % PLAIN_EVERY == 0 or len(answers) == self.questions):
            self.console.print(f"{len(answers)} of {self.questions} questions  {note}")


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m dvi_jax.evaluate", description="Measure a drafter on Spec-Bench questions: speed and equality."
    )
    add_model_options(parser)
    parser.add_argument(
        "--questions", required=True, metavar="FILE.jsonl", help="an object with question_id, category and turns a line"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for report, answers and traces")
    parser.add_argument(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="longest answer, in tokens"
    )
    parser.add_argument(
        "--batch",
        type=at_least_one,
        metavar="N",
        help="so many prompts at a time, with speeds of a sequence among them (default: each prompt alone)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    add_process_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
