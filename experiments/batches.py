"""Speculative against plain decoding of the same batch, and what `--plan auto` makes of it.

    python -m experiments.batches --checkpoint CKPT --drafter-from DIR --questions FILE.jsonl --batches 4 16 32

Each batch decodes the same questions, first turns, padded to one length; a batch goes on until its last sequence is
done, plain or not. Plain decoding of the same row class is what outputs must equal. A plan's time is the sum over
all batches of the median of its repetitions; the repetition that compiles is not counted. `auto` has seen one pass over
the questions before it is measured. Trees that a batch may not have are left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dvi_jax.config import DecodeConfig
from dvi_jax.data.conversations import Message
from dvi_jax.decode.batch import Generation, generate_batch
from dvi_jax.decode.choosing import PlanChooser
from dvi_jax.decode.plan import Plan, drafts_of, trees_are_plain
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.evaluate.spec_bench import read_questions
from dvi_jax.loading import LoadedModel, enable_compilation_cache, load
from experiments.measure import environment, settings_of, write_result

AUTO = "auto"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every batch size, print a table, keep the result."""
    options = parse(arguments)
    enable_compilation_cache()
    model = load(options.checkpoint, drafter_from=options.drafter_from)
    prompts = read_prompts(model, options.questions, options.longest_prompt)[: options.questions_used]
    rows = []
    for size in options.batches:
        rows += measure(model, [prompts[i : i + size] for i in range(0, len(prompts) - size + 1, size)], options)
        print(f"batch {size}: {len(prompts) // size} batches measured", file=sys.stderr, flush=True)
    show(rows)
    if options.out:
        write_result(options.out, environment() | {"settings": settings_of(options), "rows": rows})
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(prog="python -m experiments.batches", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--drafter-from", metavar="DIR")
    parser.add_argument("--questions", required=True)
    parser.add_argument("--questions-used", type=int, default=64)
    parser.add_argument("--longest-prompt", type=int, default=256, help="longer prompts are left out")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--plans", nargs="+", default=["chain:2", "tree:8", AUTO], help="beside plain")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(arguments)


def read_prompts(model: LoadedModel, questions: str, longest: int) -> list[list[int]]:
    """The first turns' token ids, in the file's order."""
    if model.tokenizer is None:
        raise UserError("the checkpoint has no tokenizer")
    found = [model.tokenizer.chat([Message("user", question.turns[0])]) for question in read_questions(questions)]
    return [prompt for prompt in found if len(prompt) <= longest]


def measure(model: LoadedModel, batches: list[list[list[int]]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for plain decoding and one for each plan, of batches of one size."""
    if not batches:
        raise UserError("there are fewer questions than a batch has sequences: lower --batches")
    size = len(batches[0])
    most = DecodeConfig(draft_steps=6, max_new_tokens=options.new_tokens)
    named = {plan: Plan.parse(plan) for plan in options.plans if plan != AUTO}
    shape = model.config, model.manifest.dtype
    plans = {name: plan for name, plan in named.items() if plan.kind != "tree" or trees_are_plain(size, plan, *shape)}
    widest = max([*(drafts_of(plan) + 1 for plan in plans.values()), most.width])
    of_plain = DecodeConfig(draft_steps=widest - 1, max_new_tokens=options.new_tokens)
    plain = _timed(model, batches, of_plain, options, plain=True)
    rows = [_row(size, "plain", *plain, plain)]
    for name in (name for name in options.plans if name == AUTO or name in plans):
        if name == AUTO:
            chooser = PlanChooser.measured(model, most, batches[0][0], batch=size)
            found = _timed(model, batches, most, options, chooser=chooser)
            rows.append(_row(size, name, *found, plain) | {"begins": str(chooser.begin().plan)})
        else:
            settings = DecodeConfig(draft_steps=drafts_of(plans[name]), plan=name, max_new_tokens=options.new_tokens)
            rows.append(_row(size, name, *_timed(model, batches, settings, options), plain))
    return rows


Timed = tuple[list[Generation], float]  # of all batches in order, and the seconds that decoding took


def _timed(
    model: LoadedModel,
    batches: list[list[list[int]]],
    settings: DecodeConfig,
    options: argparse.Namespace,
    *,
    plain: bool = False,
    chooser: PlanChooser | None = None,
) -> Timed:
    """All batches, one after the other; the first repetition compiles, and lets a chooser learn."""
    generations: list[Generation] = []
    seconds: list[list[float]] = [[] for _ in batches]
    for repeat in range(options.repeats + 1):
        generations = []
        for number, batch in enumerate(batches):
            found, took = generate_batch(
                model, batch, settings, plain=plain, longest_prompt=options.longest_prompt, chooser=chooser
            )
            generations += found
            if repeat:
                seconds[number].append(took)
    return generations, sum(statistics.median(times) for times in seconds)


def _row(size: int, plan: str, generations: list[Generation], seconds: float, plain: Timed) -> dict[str, Any]:
    """What a plan came to, beside plain decoding."""
    tokens, rounds = sum(sum(g.accept_lengths) for g in generations), sum(g.rounds for g in generations)
    same = sum(a.new_ids == b.new_ids for a, b in zip(generations, plain[0], strict=True))
    return {
        "batch": size,
        "plan": plan,
        "tokens_per_second": tokens / seconds,
        "times_plain": plain[1] / seconds,
        "tokens_per_round": tokens / rounds,
        "identical": same,
        "sequences": len(generations),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """A table on stdout."""
    table = Table("batch", "plan", "tokens per second", "times plain", "tokens per round", "identical")
    for row in rows:
        plan = f"{row['plan']} ({row['begins']})" if "begins" in row else row["plan"]
        table.add_row(
            str(row["batch"]),
            plan,
            f"{row['tokens_per_second']:.0f}",
            f"{row['times_plain']:.2f}",
            f"{row['tokens_per_round']:.2f}",
            f"{row['identical']} of {row['sequences']}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
