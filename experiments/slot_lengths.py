"""How much memory an engine's slots hold for nothing, on a log of conversations: equal slots, and several lengths.

    python -m experiments.slot_lengths --model CKPT --data conversations.json --contexts 1024 2048 4096

Every answer of the log is a request: what was said before is its prompt, and it takes a slot for as long as it has
tokens. What a slot holds are the positions of its context; used of them are those that the sequence has at each moment.
Requests that do not fit into the longest slot are left out and counted. Slots of several lengths are the best that
there can be: as many of each as there are requests at every moment, and a request's length is known when it comes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.importing.cache import open_checkpoint
from experiments.measure import write_result

STEP = 128  # lengths of slots to choose from are multiples of this
MOST_LENGTHS = 3  # that slots have together


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the log, print a line for each context."""
    options = _parser().parse_args(arguments)
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(options.model))
    lengths = np.array(list(itertools.islice(read_lengths(options.data, tokenizer), options.requests)))
    if not len(lengths):
        raise UserError("--data holds no answer")
    rows = [row for context in options.contexts for row in waste(lengths, context)]
    table = Table("context", "slots of", "left out", "held for nothing", "memory", title=f"{len(lengths)} requests")
    for row in rows:
        shown = ", ".join(map(str, row["slots"]))
        wasted, memory = f"{row['wasted']:.0%}", f"{row['memory']:.2f}"
        table.add_row(str(row["context"]), shown, f"{row['left_out']:.1%}", wasted, memory)
    Console().print(table)
    if options.out:
        quantiles = {str(share): np.percentile(lengths, share, axis=0).tolist() for share in (50, 90, 99)}
        write_result(options.out, {"requests": len(lengths), "prompt_and_reply_quantiles": quantiles, "rows": rows})
    return 0


def read_lengths(data: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Tokens of the prompt and of the reply of every answer of the log."""
    for conversation in ConversationStream(tuple(data)):
        for place, message in enumerate(conversation.messages):
            if message.role == "assistant" and place:
                try:
                    prompt = len(tokenizer.chat(conversation.messages[:place]))
                except TemplateRefusedError:
                    break
                yield prompt, max(len(tokenizer.encode(message.content)), 1)


def waste(lengths: np.ndarray, context: int) -> list[dict[str, Any]]:
    """Of requests int [N, 2], prompts and replies: what one, two and three lengths of slots hold.

    `wasted`: share of the positions that are held, over time, which no token is in. `memory`: what is held, beside
    equal slots.
    """
    if context < MOST_LENGTHS * STEP:
        raise UserError(f"--contexts {context}: slots of {MOST_LENGTHS} lengths need at least {MOST_LENGTHS * STEP}")
    fitting = lengths[lengths.sum(axis=1) <= context]
    if not len(fitting):
        raise UserError(f"--contexts {context}: no request of the log fits")
    prompts, replies = fitting.T.astype(float)
    used = replies @ (prompts + replies / 2)  # a reply grows by one position at a time
    whole = prompts + replies
    # Token-time of the requests whose whole length is at most k steps.
    steps = np.arange(STEP, context + STEP, STEP)
    below = np.array([replies[whole <= step].sum() for step in steps])
    rows: list[dict[str, Any]] = []
    for count in range(1, MOST_LENGTHS + 1):
        held, slots = min(
            (float(np.diff(below[[*places, -1]], prepend=0) @ steps[[*places, -1]]), (*steps[[*places]], steps[-1]))
            for places in itertools.combinations(range(len(steps) - 1), count - 1)
        )
        rows.append(
            {
                "context": context,
                "slots": [int(length) for length in slots],
                "left_out": 1 - len(fitting) / len(lengths),
                "wasted": float(1 - used / held),
                "memory": held / (context * replies.sum()),
            }
        )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.slot_lengths", description=__doc__)
    parser.add_argument("--model", required=True, metavar="MODEL", help="whose tokenizer and template are used")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="conversations")
    parser.add_argument("--requests", type=at_least_one, default=20_000, metavar="N", help="the first N answers")
    parser.add_argument("--contexts", type=at_least_one, nargs="+", default=[1024, 2048, 4096], metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
