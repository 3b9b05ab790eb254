"""Command line of generation: python -m dvi_jax.generate --checkpoint CKPT --prompt TEXT --max-new-tokens N"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from dvi_jax.command_line import AUTO, add_model_options, decode_settings, load_model, memory_limit
from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.data.conversations import Message
from dvi_jax.decode.batch import Generation, check_prompts, choose_plan, generate_batch, slots_for
from dvi_jax.decode.choosing import PlanChooser
from dvi_jax.decode.cost import with_measured_cost
from dvi_jax.decode.memory import Sizes, measure_memory
from dvi_jax.decode.plan import Option, row_class
from dvi_jax.decode.prefill import bucket
from dvi_jax.decode.stream import Stream
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.loading import LoadedModel


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, decode one prompt, print its text (or with --json one object)."""
    options = _parser().parse_args(arguments)
    if options.json and options.stream:
        raise UserError("--json prints one object at the end: leave out --stream")
    settings = decode_settings(options)
    sampling = _sampling(options)
    model = load_model(options)
    if options.drafter not in (None, model.manifest.drafter):
        raise UserError(f"--drafter {options.drafter}: this checkpoint's drafter is {model.manifest.drafter}")
    prompt, eos_ids = _prompt_ids(options, model), _eos_ids(options, model)
    check_prompts(model, [prompt], settings.max_new_tokens)
    plan = choose_plan(model, settings, plain=options.plain)
    coupled = None if sampling is None else sampling.coupled
    sizes = Sizes(1, slots_for(len(prompt), settings), settings.width, bucket(len(prompt)), coupled=coupled, plan=plan)
    print(measure_memory(model, sizes, memory_limit(options)).describe(), file=sys.stderr)
    if options.adaptive:
        settings = with_measured_cost(model, prompt, settings)
    option, chooser = Option(plan, settings.width), None
    if options.plan == AUTO and not options.plain:
        chooser = PlanChooser.measured(model, settings, prompt)
        option = chooser.begin()
    if options.stream or options.stop:
        settings = option.settings(settings)
        generation, seconds, text = _streamed(model, prompt, settings, options, eos_ids, sampling)
    else:
        (generation,), seconds = generate_batch(
            model, [prompt], settings, plain=options.plain, eos_ids=eos_ids, sampling=sampling, chooser=chooser
        )
        text = model.tokenizer.decode(generation.new_ids) if model.tokenizer else ""
    about = {
        "plan": "plain" if options.plain else str(option.plan),
        "row_class": row_class(1, option.width, model.config, model.manifest.dtype),
    }
    result = describe(generation, seconds, text) | about
    if options.json:
        print(json.dumps(result))
    else:
        print("" if options.stream else text)
        print(
            f"{len(generation.new_ids)} tokens in {generation.rounds} rounds,"
            f" {generation.accepted} of {sum(generation.drafted)} drafts accepted,"
            f" {result['tokens_per_second']:.1f} tokens per second ({generation.finish_reason})",
            file=sys.stderr,
        )
    return 0


def _streamed(
    model: LoadedModel,
    prompt: list[int],
    settings: DecodeConfig,
    options: argparse.Namespace,
    eos_ids: tuple[int, ...],
    sampling: SamplingConfig | None,
) -> tuple[Generation, float, str]:
    """Decode by pieces, printed as they come with --stream; the seconds hold whatever had to be compiled."""
    stream = Stream(
        model, [prompt], settings, plain=options.plain, eos_ids=eos_ids, sampling=sampling, stop=options.stop
    )
    began, text = time.perf_counter(), ""
    for pieces in stream:
        for piece in pieces:
            text += piece.text
            if options.stream:
                print(piece.text, end="", flush=True)
    return stream.generations[0], time.perf_counter() - began, text


def describe(generation: Generation, seconds: float, text: str) -> dict[str, Any]:
    """The object that --json prints; `seconds` covers decoding, not the prefill and its compilation."""
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
    parser.add_argument("--eos-id", type=int, action="append", metavar="N", help="end of sequence; -1 for none; repeat")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeat")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    _add_sampling_options(parser)
    parser.add_argument("--plain", action="store_true", help="draft nothing, in passes of the same bits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _prompt_ids(options: argparse.Namespace, model: LoadedModel) -> list[int]:
    if options.prompt_ids is not None:
        try:
            return [int(token) for token in options.prompt_ids.split(",")]
        except ValueError as error:
            raise UserError(f"--prompt-ids must look like 1,2,3, got {options.prompt_ids!r}") from error
    tokenizer = model.need_tokenizer("this checkpoint has no tokenizer: give --prompt-ids")
    return tokenizer.chat([Message("user", options.prompt)])


def _eos_ids(options: argparse.Namespace, model: LoadedModel) -> tuple[int, ...]:
    if options.eos_id is None:
        return model.eos_ids
    return tuple(token for token in options.eos_id if token >= 0)


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    defaults = SamplingConfig()
    group = parser.add_argument_group("sampling (greedy unless a temperature is given)")
    group.add_argument("--temperature", type=float, metavar="T")
    group.add_argument("--top-k", type=int, default=defaults.top_k, metavar="K", help="0 for all tokens")
    group.add_argument("--top-p", type=float, default=defaults.top_p, metavar="P")
    group.add_argument("--min-p", type=float, default=defaults.min_p, metavar="P")
    group.add_argument("--repetition-penalty", type=float, default=defaults.repetition_penalty, metavar="R")
    group.add_argument("--seed", type=int, default=defaults.seed, metavar="N")
    group.add_argument(
        "--rejection", action="store_true", help="accept by min(1, p/q): more drafts accepted, ids depend on the drafts"
    )


def _sampling(options: argparse.Namespace) -> SamplingConfig | None:
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0
        defaults = SamplingConfig()
        names = ("top_k", "top_p", "min_p", "seed")
        given = [name for name in names if getattr(options, name) != getattr(defaults, name)]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} needs a --temperature above 0: decoding is greedy without")
        if options.repetition_penalty == defaults.repetition_penalty:
            return None
    return SamplingConfig(
        temperature=temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        coupled=not options.rejection,
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
