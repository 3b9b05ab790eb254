"""Draft steps and threshold against speed, on held-out prompts of a conversation file.

    python -m experiments.sweep --checkpoint CKPT --drafter-from DIR --data FILE --out sweep.json

Used to choose the two settings without touching evaluation questions. The threshold and the number of drafts are
run-time arguments; only a wider round is another program.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dvi_jax.config import DecodeConfig
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import PromptSettings, PromptStream
from dvi_jax.decode.generate import generate
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.evaluate.acceptance import measure_acceptance
from dvi_jax.load import LoadedModel, enable_compilation_cache, load
from experiments.measure import environment, settings_of

MAX_PROMPT_TOKENS = 192


def main() -> int:
    """Measure every pair, print a table, write the JSON."""
    parser = ArgumentParser(prog="python -m experiments.sweep", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--drafter-from")
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--draft-steps", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.0, 0.2, 0.3, 0.4, 0.5, 0.6])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    enable_compilation_cache()
    model = load(options.checkpoint, drafter_from=options.drafter_from)
    if model.tokenizer is None:
        raise UserError(f"{options.checkpoint} has no tokenizer")
    settings = PromptSettings(MAX_PROMPT_TOKENS, held_out_fraction=0.02)
    stream = PromptStream(ConversationStream(options.data), model.tokenizer, settings)
    prompts = [list(prompt.ids) for prompt in stream.held_out_prompts(options.prompts)]
    rows = []
    for steps in options.draft_steps:
        plain = decode_all(model, prompts, DecodeConfig(steps, 0.0, options.new_tokens), plain=True)
        for threshold in options.thresholds:
            fast = decode_all(model, prompts, DecodeConfig(steps, threshold, options.new_tokens), plain=False)
            rows.append({"draft_steps": steps, "threshold": threshold, **compare(plain, fast)})
    result = {"environment": environment(), "prompts": len(prompts), "settings": settings_of(options), "rows": rows}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    show(rows)
    return 0


def decode_all(model: LoadedModel, prompts: list[list[int]], settings: DecodeConfig, *, plain: bool) -> dict[str, Any]:
    """Every prompt alone; seconds of decoding and acceptance over all. The first prompt is decoded once before."""
    generations, seconds = [], 0.0
    for prompt in [prompts[0], *prompts]:
        (generation,), took = generate(model, [prompt], settings, plain=plain, longest_prompt=MAX_PROMPT_TOKENS)
        generations.append(generation)
        seconds += took
        if len(generations) == 1:
            warm_up = took
    return {"generations": generations[1:], "seconds": seconds - warm_up}


def compare(plain: dict[str, Any], fast: dict[str, Any]) -> dict[str, Any]:
    """Speed and acceptance of one setting against plain decoding of the same width."""
    acceptance = measure_acceptance(fast["generations"])
    pairs = zip(plain["generations"], fast["generations"], strict=True)
    return {
        "tokens_per_round": acceptance.tokens_per_round,
        "drafts_per_round": acceptance.drafted / max(acceptance.rounds, 1),
        "accept_rate": acceptance.accept_rate,
        "plain_seconds": plain["seconds"],
        "seconds": fast["seconds"],
        "speedup": plain["seconds"] / fast["seconds"],
        "identical": sum(a.output_ids == b.output_ids for a, b in pairs),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """One line for each setting."""
    table = Table()
    for column in ("draft steps", "threshold", "drafts / round", "tokens / round", "speed-up", "identical"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["draft_steps"]),
            f"{row['threshold']:g}",
            f"{row['drafts_per_round']:.2f}",
            f"{row['tokens_per_round']:.3f}",
            f"{row['speedup']:.3f}",
            str(row["identical"]),
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
