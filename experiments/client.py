"""An example client: OpenAI's own Python package against a running server, one question or a conversation.

python -m experiments.client --prompt "Why is the sky blue?"
python -m experiments.client                                     # a conversation; an empty line ends it
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import openai
from openai.types.chat import ChatCompletionMessageParam

from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli


def main() -> int:
    """Ask what the command line or the terminal asks, and print the replies as they come."""
    options = _parser().parse_args()
    url = f"{options.url.rstrip('/').removesuffix('/v1')}/v1"
    try:
        with openai.OpenAI(base_url=url, api_key=options.api_key) as client:
            if options.prompt is not None:
                ask(client, [{"role": "user", "content": options.prompt}], options)
            else:
                converse(client, options)
    except openai.APIConnectionError as error:
        raise UserError(f"no server answers at {options.url}: start one with python -m dvi_jax.serve") from error
    except openai.APIError as error:
        raise UserError(f"the server refused: {error.message}") from error
    return 0


def converse(client: openai.OpenAI, options: argparse.Namespace) -> None:
    """Question by question, each with all that was said before it."""
    messages: list[ChatCompletionMessageParam] = []
    while question := _read("> "):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": ask(client, messages, options)})


def ask(client: openai.OpenAI, messages: list[ChatCompletionMessageParam], options: argparse.Namespace) -> str:
    """Print the reply to `messages` piece by piece, and on stderr what it cost."""
    stream = client.chat.completions.create(
        model=options.model or client.models.list().data[0].id,
        messages=messages,
        max_completion_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    metrics: dict[str, Any] = {}
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            print(choice.delta.content or "", end="", flush=True)
        usage, metrics = chunk.usage, getattr(chunk, "metrics", None) or {}
    print()
    if usage is not None:
        rounds = metrics.get("speculative_decoding", {}).get("num_spec_steps")
        inside = f" in {rounds} rounds" if rounds else ""
        print(f"{usage.prompt_tokens} tokens asked, {usage.completion_tokens} answered{inside}", file=sys.stderr)
    return text


def _read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.client", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's, with or without /v1")
    parser.add_argument("--api-key", default="none", metavar="KEY")
    parser.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    parser.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--max-tokens", type=int, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--seed", type=int, metavar="N")
    add_debug(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
