"""Draft steps and threshold against speed, on held-out prompts of a conversation file.

    python -m experiments.sweep --checkpoint CKPT --drafter-from DIR --data FILE --out sweep.json
    python -m experiments.sweep --checkpoint CKPT --drafter-from DIR --data heldout.jsonl --all --out sweep.json

Used to choose the two settings without touching evaluation questions. The threshold and the number of drafts are
run-time arguments; only a wider round is another program. Speed-ups are over the fastest plain decoding (width 1), and
over plain decoding of the same width. `--all` takes every conversation of the file, up to its last
question (experiments/prompts.py writes such a file), and tells tokens per round by the kind of prompt, too. With
`--out`, the JSON is written after every setting and a picture beside it at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from dvi_jax.config import DataConfig, DecodeConfig
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import PromptStream, context_of_turn
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.acceptance import measure_acceptance
from dvi_jax.decode.batch import Generation, generate_batch
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.evaluate.style import CYCLE, mark_equal, new_figure, save_picture
from dvi_jax.loading import LoadedModel, enable_compilation_cache, load
from experiments.measure import environment, settings_of, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every pair, print a table, write the JSON after each."""
    parser = ArgumentParser(prog="python -m experiments.sweep", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--drafter-from")
    parser.add_argument("--data", required=True)
    parser.add_argument("--all", action="store_true", help="every conversation of the file, not its held-out share")
    parser.add_argument("--prompts", type=int, default=16, help="prompts at most")
    parser.add_argument("--max-prompt-tokens", type=int, default=192)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--draft-steps", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.0, 0.2, 0.3, 0.4, 0.5, 0.6])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    enable_compilation_cache()
    model = load(options.checkpoint, drafter_from=options.drafter_from)
    tokenizer = model.need_tokenizer(f"{options.checkpoint} has no tokenizer")
    read = every_prompt if options.all else held_out_prompts
    prompts = read(options.data, tokenizer, options.prompts, options.max_prompt_tokens)
    fastest = decode_all(
        model, list(prompts.values()), DecodeConfig(draft_steps=0, max_new_tokens=options.new_tokens), plain=True
    )
    rows: list[dict[str, Any]] = []
    result = {"environment": environment(), "settings": settings_of(options), "prompts": len(prompts), "rows": rows}
    for steps in options.draft_steps:
        plain = decode_all(
            model,
            list(prompts.values()),
            DecodeConfig(draft_steps=steps, max_new_tokens=options.new_tokens),
            plain=True,
        )
        for threshold in options.thresholds:
            settings = DecodeConfig(draft_steps=steps, threshold=threshold, max_new_tokens=options.new_tokens)
            fast = decode_all(model, list(prompts.values()), settings, plain=False)
            row = {"draft_steps": steps, "threshold": threshold, **compare(plain, fastest, fast)}
            if options.all:
                row["tokens_per_round_by_kind"] = by_kind(list(prompts), fast["generations"])
            rows.append(row)
            if options.out:
                write_result(options.out, result)
    if options.out:
        draw(rows, options.out.with_suffix(".png"))
    show(rows)
    return 0


def held_out_prompts(file: str, tokenizer: Tokenizer, count: int, longest: int) -> dict[str, list[int]]:
    """Conversation id -> ids of the first held-out prompts of a stream."""
    stream = PromptStream(
        ConversationStream(file), tokenizer, DataConfig(max_prompt_tokens=longest, held_out_fraction=0.02)
    )
    found = {prompt.conversation_id: list(prompt.ids) for prompt in stream.held_out_prompts(count)}
    return found or _refuse(file, longest)


def every_prompt(file: str, tokenizer: Tokenizer, count: int, longest: int) -> dict[str, list[int]]:
    """Conversation id -> ids up to the last question, of the conversations that fit, evenly over the whole file."""
    found = {}
    for conversation in ConversationStream(file):
        turns = sum(message.role == "user" for message in conversation.messages)
        ids = tokenizer.chat(context_of_turn(conversation.messages, turns - 1))
        if len(ids) <= longest:
            found[conversation.id] = ids
    chosen = list(found)[:: max(-(-len(found) // count), 1)]
    return {name: found[name] for name in chosen} or _refuse(file, longest)


def _refuse(file: str, longest: int) -> dict[str, list[int]]:
    raise UserError(f"{file} has no held-out prompt of at most {longest} tokens")


def decode_all(model: LoadedModel, prompts: list[list[int]], settings: DecodeConfig, *, plain: bool) -> dict[str, Any]:
    """Every prompt alone; seconds of decoding and acceptance over all. The first prompt is decoded once before."""
    generations, seconds, longest = [], [], max(map(len, prompts))
    for prompt in [prompts[0], *prompts]:
        (generation,), took = generate_batch(model, [prompt], settings, plain=plain, longest_prompt=longest)
        generations.append(generation)
        seconds.append(took)
    tokens = sum(sum(generation.accept_lengths) for generation in generations[1:])
    return {"generations": generations[1:], "seconds": sum(seconds[1:]), "tokens_per_second": tokens / sum(seconds[1:])}


def by_kind(names: list[str], generations: list[Generation]) -> dict[str, float]:
    """Mean tokens per round of the prompts whose ids have the same beginning, as in `summary-12`."""
    kinds: dict[str, list[Generation]] = {}
    for name, generation in zip(names, generations, strict=True):
        kinds.setdefault(name.rsplit("-", 1)[0], []).append(generation)
    return {kind: measure_acceptance(found).tokens_per_round for kind, found in kinds.items()}


def compare(plain: dict[str, Any], fastest: dict[str, Any], fast: dict[str, Any]) -> dict[str, Any]:
    """Speed and acceptance of one setting against plain decoding of the same width, and against the fastest.

    The fastest may give other tokens and another number of them, so it is compared by tokens per second.
    """
    acceptance = measure_acceptance(fast["generations"])
    pairs = zip(plain["generations"], fast["generations"], strict=True)
    return {
        "tokens_per_round": acceptance.tokens_per_round,
        "drafts_per_round": acceptance.drafted / max(acceptance.rounds, 1),
        "accept_rate": acceptance.accept_rate,
        "plain_seconds": plain["seconds"],
        "seconds": fast["seconds"],
        "fastest_plain_tokens_per_second": fastest["tokens_per_second"],
        "speedup": plain["seconds"] / fast["seconds"],
        "speedup_over_fastest": fast["tokens_per_second"] / fastest["tokens_per_second"],
        "identical": sum(a.output_ids == b.output_ids for a, b in pairs),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up, and tokens and drafts of a round, over the threshold: one line for each number of draft steps."""
    save_picture(lambda: _panels(rows), path)


def _panels(rows: list[dict[str, Any]]) -> Figure:
    figure = new_figure(8, 3.6)
    left, right = figure.subplots(1, 2)
    over_fastest = all("speedup_over_fastest" in row for row in rows)  # kept results may lack it
    key, over = ("speedup_over_fastest", "the fastest plain") if over_fastest else ("speedup", "equal-width plain")
    for color, steps in zip(CYCLE, sorted({row["draft_steps"] for row in rows}), strict=False):
        own = sorted((row for row in rows if row["draft_steps"] == steps), key=lambda row: row["threshold"])
        places = [row["threshold"] for row in own]
        left.plot(places, [row[key] for row in own], "o-", color=color, label=f"{steps} draft steps")
        for count, style, name in (("tokens_per_round", "o-", "committed"), ("drafts_per_round", "s--", "drafted")):
            label = f"{name}, {steps} draft steps"
            right.plot(places, [row[count] for row in own], style, color=color, label=label)
    left.set_ylabel(f"speed-up over {over}")
    right.set_ylabel("tokens per round")
    mark_equal(left, label="as fast")
    for axes in (left, right):
        axes.set_xlabel("threshold (drafting stops below this probability)")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.grid()
        axes.legend(loc="lower left")
    return figure


def show(rows: list[dict[str, Any]]) -> None:
    """One line for each setting."""
    table = Table()
    for column in (
        "draft steps",
        "threshold",
        "drafts / round",
        "tokens / round",
        "speed-up",
        "over equal width",
        "identical",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["draft_steps"]),
            f"{row['threshold']:g}",
            f"{row['drafts_per_round']:.2f}",
            f"{row['tokens_per_round']:.3f}",
            f"{row['speedup_over_fastest']:.3f}",
            f"{row['speedup']:.3f}",
            str(row["identical"]),
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
