"""Command line of generation: python -m dvi_jax.generate --checkpoint CKPT --prompt TEXT --max-new-tokens N"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from dvi_jax.command_line import add_model_options, load_model
from dvi_jax.config import DecodeConfig
from dvi_jax.data.conversations import Message
from dvi_jax.decode.generate import Generation, generate
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.load import LoadedModel


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, decode one prompt, print its text (or with --json one object)."""
    options = _parser().parse_args(arguments)
    model = load_model(options)
    if options.drafter not in (None, model.manifest.drafter):
        raise UserError(f"--drafter {options.drafter}: this checkpoint's drafter is {model.manifest.drafter}")
    settings = DecodeConfig(options.draft_steps, options.threshold, options.max_new_tokens)
    (generation,), seconds = generate(
        model, [_prompt_ids(options, model)], settings, plain=options.plain, eos_ids=_eos_ids(options, model)
    )
    result = describe(generation, seconds, model)
    if options.json:
        print(json.dumps(result))
    else:
        print(result["text"])
        print(
            f"{len(generation.new_ids)} tokens in {generation.rounds} rounds,"
            f" {generation.accepted} of {sum(generation.drafted)} drafts accepted,"
            f" {result['tokens_per_second']:.1f} tokens per second ({generation.finish_reason})",
            file=sys.stderr,
        )
    return 0


def describe(generation: Generation, seconds: float, model: LoadedModel) -> dict[str, Any]:
    """The object that --json prints; `seconds` covers decoding, not the prefill and its compilation."""
    text = model.tokenizer.decode(generation.new_ids) if model.tokenizer else ""
    return {
        "output_ids": generation.output_ids,
        "new_ids": generation.new_ids,
        "text": text,
        "accept_lengths": generation.accept_lengths,
        "drafted": sum(generation.drafted),
        "accepted": generation.accepted,
        "rounds": generation.rounds,
        "seconds": seconds,
        "tokens_per_second": sum(generation.accept_lengths) / seconds if seconds > 0 else 0.0,
        "finish_reason": generation.finish_reason,
    }


def _parser() -> argparse.ArgumentParser:
    defaults = DecodeConfig()
    parser = ArgumentParser(prog="python -m dvi_jax.generate", description="Decode one prompt, losslessly.")
    add_model_options(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="a user message, put through the chat template")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="token ids, used as they are")
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N")
    parser.add_argument("--drafter", metavar="NAME", help="refuse a checkpoint with another drafter")
    parser.add_argument("--eos-id", type=int, metavar="N", help="end of sequence; -1 for none")
    parser.add_argument("--plain", action="store_true", help="draft nothing, in the same compiled program")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _prompt_ids(options: argparse.Namespace, model: LoadedModel) -> list[int]:
    if options.prompt_ids is not None:
        try:
            return [int(token) for token in options.prompt_ids.split(",")]
        except ValueError as error:
            raise UserError(f"--prompt-ids must look like 1,2,3, got {options.prompt_ids!r}") from error
    if model.tokenizer is None:
        raise UserError("this checkpoint has no tokenizer: give --prompt-ids")
    return model.tokenizer.chat([Message("user", options.prompt)])


def _eos_ids(options: argparse.Namespace, model: LoadedModel) -> tuple[int, ...]:
    if options.eos_id is None:
        return model.eos_ids
    return () if options.eos_id < 0 else (options.eos_id,)


if __name__ == "__main__":
    sys.exit(run_cli(main))
