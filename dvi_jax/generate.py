"""Command line of generation: python -m dvi_jax.generate --checkpoint CKPT --prompt TEXT --max-new-tokens N

With --input FILE.jsonl --output FILE.jsonl it answers a file of prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from dvi_jax.command_line import (
    AUTO,
    add_model_options,
    add_sampling_options,
    check_engine_options,
    decode_settings,
    load_model,
    memory_limit,
    progress_bar,
    sampling_settings,
    settings_for,
)
from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.decode.agreement import check_agreement
from dvi_jax.decode.batch import Generation, check_prompts, choose_plan, slots_for
from dvi_jax.decode.choosing import PlanChooser
from dvi_jax.decode.cost import with_measured_cost
from dvi_jax.decode.memory import Sizes, measure_memory
from dvi_jax.decode.plan import Option, row_class
from dvi_jax.decode.prefill import bucket
from dvi_jax.decode.stream import EVERY, Stream
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.generate_file import Decoding, answer_file, follow_answers, read_lines
from dvi_jax.loading import LoadedModel
from dvi_jax.processes import add_process_options, check_alike, is_first, one_of_several
from dvi_jax.texts import decode_texts, prompt_ids

UNANSWERED = 1  # exit status when a prompt of a file could not be answered
BATCH = 8  # prompts of a file that are decoded at once


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, decode one prompt, or a file of them, and print the text (with --json one object)."""
    options = _parser().parse_args(arguments)
    if options.json and options.stream:
        raise UserError("--json prints one object at the end: leave out --stream")
    if (options.input is None) != (options.output is None):
        raise UserError("--input and --output go together: prompts from one file, replies into another")
    if options.input is not None and (options.json or options.stream):
        raise UserError("with --input the replies go to --output: leave out --json and --stream")
    if options.input is not None:
        check_engine_options(options, "--input")
    sampling = sampling_settings(options)
    with one_of_several(options):
        decode_settings(options)  # what is wrong with them is said before anything is loaded
        check_alike(
            measured=(options.plan == AUTO and options.input is None) or options.adaptive,
            instead="name a --plan other than auto, and leave out --adaptive, as both measure times",
        )
        model = load_model(options)
        if options.drafter not in (None, model.manifest.drafter):
            raise UserError(f"--drafter {options.drafter}: this checkpoint's drafter is {model.manifest.drafter}")
        return (answer_one if options.input is None else answer_all)(model, options, sampling)


def answer_one(model: LoadedModel, options: argparse.Namespace, sampling: SamplingConfig | None) -> int:
    """Decode the one prompt and print what came of it."""
    prompt, eos_ids = _prompt_ids(options, model), _eos_ids(options, model)
    check_prompts(model, [prompt], options.max_new_tokens)
    settings = _settings(options, model)
    plan = choose_plan(model, settings, plain=options.plain)
    coupled = None if sampling is None else sampling.coupled
    sizes = Sizes(1, slots_for(len(prompt), settings), settings.width, bucket(len(prompt)), coupled=coupled, plan=plan)
    print(measure_memory(model, sizes, memory_limit(options)).describe(), file=sys.stderr)
    if options.adaptive:
        settings = with_measured_cost(model, prompt, settings)
    option, chooser = Option(plan, settings.width), None
    if options.plan != AUTO and not options.plain:
        check_agreement(model, settings)
    elif not options.plain:
        chooser = PlanChooser.measured(model, settings, prompt)
        option = chooser.begin()
    if options.stream:
        settings = option.settings(settings)
        generation, seconds, text = _streamed(model, prompt, settings, options, eos_ids, sampling)
    else:
        (generation,), (text,), seconds = decode_texts(
            model,
            [prompt],
            option.settings(settings) if options.stop else settings,
            plain=options.plain,
            eos_ids=eos_ids,
            sampling=sampling,
            stop=options.stop,
            chooser=None if options.stop else chooser,
        )
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


def answer_all(model: LoadedModel, options: argparse.Namespace, sampling: SamplingConfig | None) -> int:
    """Answer the prompts of a file that have no reply yet; status 1 if some could not be answered."""
    lines = read_lines(options.input, model, options.max_new_tokens)
    plan = AUTO if options.plan == AUTO else str(choose_plan(model, _settings(options, model)))
    decoding = Decoding(
        plan=plan,
        plain=options.plain,
        max_new_tokens=options.max_new_tokens,
        eos_ids=_eos_ids(options, model),
        sampling=sampling,
        stop=tuple(options.stop),
        slots=options.batch,
    )
    if not is_first():
        follow_answers(model, lines, decoding)
        return 0
    console = Console(stderr=True)
    bar = progress_bar("prompts", console)
    task = bar.add_task("prompts", total=len(lines), note="")
    with bar:
        failed = answer_file(
            model,
            lines,
            Path(options.output),
            decoding,
            report=lambda done, of: bar.update(task, completed=done),
        )
    print(f"{options.output}: {len(lines)} replies" + (f", {failed} of them errors" if failed else ""))
    return UNANSWERED if failed else 0


def _streamed(
    model: LoadedModel,
    prompt: list[int],
    settings: DecodeConfig,
    options: argparse.Namespace,
    eos_ids: tuple[int, ...],
    sampling: SamplingConfig | None,
) -> tuple[Generation, float, str]:
    """Decode by pieces, printed as they come; the seconds hold whatever had to be compiled."""
    stream = Stream(
        model,
        [prompt],
        settings,
        plain=options.plain,
        eos_ids=eos_ids,
        sampling=sampling,
        stop=options.stop,
        every=options.every,
    )
    began, text = time.perf_counter(), ""
    for pieces in stream:
        for piece in pieces:
            text += piece.text
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
    parser = ArgumentParser(
        prog="python -m dvi_jax.generate", description="Decode a prompt, or a file of prompts, losslessly."
    )
    add_model_options(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="a user message, put through the chat template")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="token ids, used as they are")
    prompt.add_argument(
        "--input", metavar="FILE.jsonl", help="many prompts: a text, messages or {prompt|messages: ..} a line"
    )
    parser.add_argument(
        "--output", metavar="FILE.jsonl", help="with --input: gets a reply a line; goes on where it stopped"
    )
    parser.add_argument(
        "--batch", type=at_least_one, default=BATCH, metavar="N", help="with --input: slots, prompts decoded at once"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N", help="longest reply, in tokens"
    )
    parser.add_argument("--drafter", metavar="NAME", help="refuse a checkpoint whose drafter is of another kind")
    parser.add_argument(
        "--eos-id", type=int, action="append", metavar="N", help="id that ends a sequence, -1 for none; may be repeated"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument(
        "--every", type=at_least_one, default=EVERY, metavar="N", help="with --stream: rounds between two pieces"
    )
    add_sampling_options(parser)
    add_process_options(parser)
    parser.add_argument("--plain", action="store_true", help="draft nothing, in passes that give the same bits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _prompt_ids(options: argparse.Namespace, model: LoadedModel) -> list[int]:
    if options.prompt_ids is not None:
        try:
            return [int(token) for token in options.prompt_ids.split(",")]
        except ValueError as error:
            raise UserError(f"--prompt-ids must look like 1,2,3, got {options.prompt_ids!r}") from error
    model.need_tokenizer("this checkpoint has no tokenizer: give --prompt-ids")
    return prompt_ids(model, options.prompt)


def _settings(options: argparse.Namespace, model: LoadedModel) -> DecodeConfig:
    return decode_settings(options) if options.plain else settings_for(model, options)


def _eos_ids(options: argparse.Namespace, model: LoadedModel) -> tuple[int, ...]:
    if options.eos_id is None:
        return model.eos_ids
    return tuple(token for token in options.eos_id if token >= 0)


if __name__ == "__main__":
    sys.exit(run_cli(main))
