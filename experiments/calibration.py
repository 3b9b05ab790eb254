"""How far a drafter's confidence is the share of its drafts that are right, before and after temperatures are fitted.

    python -m experiments.calibration --checkpoint CKPT --drafter-from DIR --fit heldout.jsonl \\
        --questions question.jsonl --write CALIBRATED --out FILE.json

The model replies to prompts of held-out conversations (`--fit`). To every other one the temperatures of the drafts of
a round are fitted (`dvi_jax/learn/calibration.py`); on the others, and on `--questions`, another kind of text, the
expected calibration error is measured, draft by draft, each where those before it were right. It stands beside the
error that chance alone would make of so many drafts and a 95% interval over replies, and is told by kind of prompt,
too. `--write` keeps the drafter with its temperatures, for `--drafter-from`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dvi_jax.config import DecodeConfig
from dvi_jax.data.conversations import Message
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.batch import generate_batch
from dvi_jax.directories import require_new
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.evaluate.spec_bench import read_questions
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.calibration import (
    Judged,
    error_by_chance,
    error_interval,
    expected_calibration_error,
    fit_temperatures,
    judge,
)
from dvi_jax.learn.packing import Packed
from dvi_jax.loading import LoadedModel, enable_compilation_cache, from_checkpoint
from dvi_jax.trained_parts import with_drafter_from, write_drafter
from experiments.measure import environment, settings_of, write_result
from experiments.sweep import every_prompt

Prompts = list[tuple[str, list[int]]]  # kind and ids of each


def main(arguments: Sequence[str] | None = None) -> int:
    """Reply, fit, measure, print a table."""
    options = parse(arguments)
    if options.write:
        require_new(options.write)
    enable_compilation_cache()
    checkpoint = open_checkpoint(options.checkpoint)
    if options.drafter_from:
        checkpoint = with_drafter_from(checkpoint, options.drafter_from)
    if checkpoint.drafter is None:
        raise UserError(f"{options.checkpoint} has no trained drafter: name one by --drafter-from")
    # Temperatures that the drafter has already play no part here: its logits are asked.
    model = from_checkpoint(checkpoint)
    tokenizer = model.need_tokenizer(f"{options.checkpoint} has no tokenizer")
    found = every_prompt(str(options.fit), tokenizer, options.prompts, options.longest_prompt)
    held_out = [(name.rsplit("-", 1)[0], prompt) for name, prompt in found.items()]
    if len(held_out) < 2:
        raise UserError(f"one prompt of {options.fit} cannot be fitted to and measured on as well: take two")
    unseen = {"conversations": held_out[1::2], "questions": questions(options, tokenizer)}
    fitted = replies(model, held_out[::2], options)
    temperatures = fit_temperatures(model, fitted, options.draft_steps, options.batch)
    readings = {name: read(model, one, temperatures, options) for name, one in unseen.items()}
    show(readings)
    if options.out:
        result = {"environment": environment(), "settings": settings_of(options), "readings": readings}
        write_result(options.out, result)
    if options.write:
        manifest = replace(checkpoint.manifest, calibration=temperatures)
        write_drafter(options.write, replace(checkpoint, manifest=manifest))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(prog="python -m experiments.calibration", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--drafter-from", metavar="DIR")
    parser.add_argument(
        "--fit", required=True, type=Path, help="held-out prompts as experiments.prompts writes them (heldout.jsonl)"
    )
    parser.add_argument(
        "--questions", required=True, type=Path, help="Spec-Bench questions, whose first turns are replied to"
    )
    parser.add_argument("--prompts", type=at_least_one, default=320, help="of each file at most, spread over it")
    parser.add_argument("--longest-prompt", type=at_least_one, default=128, help="longer prompts are left out")
    parser.add_argument("--new-tokens", type=at_least_one, default=128)
    parser.add_argument("--batch", type=at_least_one, default=16)
    parser.add_argument("--draft-steps", type=at_least_one, default=4, help="a block drafter has as many as its block")
    parser.add_argument("--write", type=Path, metavar="DIR", help="the drafter with its temperatures")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(arguments)


def questions(options: argparse.Namespace, tokenizer: Tokenizer) -> Prompts:
    """First turns of at most so many tokens, spread over the file's categories, which are their kinds."""
    asked = [
        (question.category, tokenizer.chat([Message("user", question.turns[0])]))
        for question in read_questions(options.questions)
    ]
    short = [(kind, prompt) for kind, prompt in asked if len(prompt) <= options.longest_prompt]
    if not short:
        raise UserError(f"{options.questions} has no question of at most {options.longest_prompt} tokens")
    return short[:: -(-len(short) // options.prompts)]


def replies(model: LoadedModel, asked: Prompts, options: argparse.Namespace) -> Packed:
    """The model's greedy replies, a row each, whose tokens are marked."""
    settings = DecodeConfig(draft_steps=0, max_new_tokens=options.new_tokens)
    prompts = [prompt for _, prompt in asked]
    tokens = np.zeros((len(prompts), options.longest_prompt + options.new_tokens), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for begin in range(0, len(prompts), options.batch):
        batch = prompts[begin : begin + options.batch]
        # The last batch is filled up, so that all have one shape.
        filled = batch + batch[:1] * (options.batch - len(batch))
        found, _ = generate_batch(model, filled, settings, plain=True, longest_prompt=options.longest_prompt)
        for row, (prompt, reply) in enumerate(zip(batch, found, strict=False), begin):
            length = len(reply.output_ids)
            tokens[row, :length], mask[row, len(prompt) : length] = reply.output_ids, True
    return Packed(tokens, mask)


def read(
    model: LoadedModel, asked: Prompts, temperatures: tuple[float, ...], options: argparse.Namespace
) -> dict[str, Any]:
    """What is told of the replies to `asked`: of each draft of a round, of all, of all after a kind of prompt."""
    both = np.stack([np.ones(len(temperatures)), np.array(temperatures)], axis=1)
    judged = judge(model, replies(model, asked, options), options.draft_steps, both, options.batch)
    if not all(len(one.right) for one in judged):
        raise UserError("no place in the replies has every draft of a round: give more prompts or fewer --draft-steps")
    every = Judged(*(np.concatenate(parts) for parts in zip(*judged, strict=True)))
    kinds = np.array([kind for kind, _ in asked])[every.row]
    return {
        "drafts": [row_of(one, temperature) for one, temperature in zip(judged, temperatures, strict=True)],
        "all": row_of(every),
        "kinds": {str(kind): row_of(Judged(*(x[kinds == kind] for x in every))) for kind in np.unique(kinds)},
    }


def row_of(judged: Judged, temperature: float | None = None) -> dict[str, Any]:
    """What is told of the drafts of one number: before and after, column by column of their confidences.

    `chance` and `interval` are those of the error after.
    """
    before, after = judged.confidence.T
    return {
        "temperature": temperature,
        "judged": len(judged.right),
        "replies": len(np.unique(judged.row)),
        "right": float(np.mean(judged.right)),
        "confidence": [float(np.mean(before)), float(np.mean(after))],
        "error": [expected_calibration_error(column, judged.right) for column in (before, after)],
        "chance": error_by_chance(after),
        "interval": error_interval(after, judged.right, judged.row),
    }


def show(readings: dict[str, Any]) -> None:
    """A line for each draft of a round, one for all and one for each kind of prompt, of each text."""
    table = Table()
    before = ("text", "drafts", "temperature", "judged", "right", "confidence", "error")
    for column in (*before, "calibrated", "error", "by chance", "95%"):
        table.add_column(column, justify="right")
    for name, reading in readings.items():
        for drafts, row in rows_of(reading).items():
            table.add_row(name, drafts, *cells(row))
    Console(width=140).print(table)


def rows_of(reading: dict[str, Any]) -> dict[str, Any]:
    """Name -> row, in the order of a table."""
    numbered = {str(number): row for number, row in enumerate(reading["drafts"], 1)}
    return numbered | {"all": reading["all"]} | reading["kinds"]


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    temperature, (said, calibrated), (error, left) = row["temperature"], row["confidence"], row["error"]
    return [
        "" if temperature is None else f"{temperature:.2f}",
        str(row["judged"]),
        *(f"{share:.3f}" for share in (row["right"], said, error, calibrated, left, row["chance"])),
        "{:.3f} to {:.3f}".format(*row["interval"]) if row["replies"] > 1 else "",  # of one reply there is none
    ]


if __name__ == "__main__":
    sys.exit(run_cli(main))
