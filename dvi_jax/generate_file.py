"""A file of prompts answered into a file of replies: `python -m dvi_jax.generate --input FILE --output FILE`.

An engine decodes them, so that none waits for the longest reply beside it.

A line of the input is a JSON string (a user message), a list of messages, or an object with `prompt`, `messages` or
`prompt_ids`, and an `id` if it wants one. A line of the output, in the order of the input, has `id`, `text`, `new_ids`,
`finish_reason` and `accept_lengths`, or `error` for a prompt that cannot be answered. What is in the output already is
not answered again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dvi_jax.config import SamplingConfig
from dvi_jax.decode.batch import check_prompts
from dvi_jax.decode.plan import PLAIN
from dvi_jax.decode.prefill import cache_slots
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel
from dvi_jax.processes import told
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.many import Decoded, decode_many, open_engine
from dvi_jax.serve.plans import plans_of
from dvi_jax.serve.requests import Request
from dvi_jax.texts import as_messages, prompt_ids

KINDS = ("prompt", "messages", "prompt_ids")


@dataclass(frozen=True)
class Line:
    """One prompt of the file: its id and token ids, or why it has none."""

    id: int | str
    ids: list[int]
    fault: str = ""


@dataclass(frozen=True)
class Decoding:
    """How all prompts of a file are decoded. Prompt n of the file samples with `seed + n`, whatever is beside it."""

    plan: str  # how rounds draft, or `AUTO`
    plain: bool  # draft nothing all the same, in passes of the same bits
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    sampling: SamplingConfig | None
    stop: tuple[str, ...]
    slots: int  # prompts decoded at once


def answer_file(
    model: LoadedModel,
    lines: Sequence[Line],
    output: Path,
    decoding: Decoding,
    *,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Answer what `output` lacks, and append it reply by reply; how many prompts could not be answered.

    `report` is called with the number of lines that are there and of all.
    """
    done, size = answered(output, lines)
    failed = 0
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("r+b" if output.exists() else "xb") as file:
            file.truncate(size)
            file.seek(size)
            for reply in answers(model, lines, done, decoding):
                file.write((json.dumps(reply, ensure_ascii=False) + "\n").encode())
                file.flush()
                done += 1
                failed += "error" in reply
                report(done, len(lines))
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    return failed


def answers(model: LoadedModel, lines: Sequence[Line], begin: int, decoding: Decoding) -> Iterator[dict[str, Any]]:
    """The replies to `lines` from `begin` on, in order."""
    requests = _requests(lines, decoding)
    done = sum(not line.fault for line in lines[:begin])
    with ExitStack() as stack:
        replies: Iterator[Decoded] = iter(())
        if told(lambda: done < len(requests)):
            engine = stack.enter_context(_open_engine(model, requests, decoding))
            replies = decode_many(engine, requests[done:])
        for line in lines[begin:]:
            yield {"id": line.id, "error": line.fault} if line.fault else describe(line, next(replies))


def follow_answers(model: LoadedModel, lines: Sequence[Line], decoding: Decoding) -> None:
    """In every process but the first of several: run what `answers` does there, for the same arguments."""
    if told(lambda: None):
        with _open_engine(model, _requests(lines, decoding), decoding) as engine:
            engine.follow()


def _requests(lines: Sequence[Line], decoding: Decoding) -> list[Request]:
    return [_request(line, number, decoding) for number, line in enumerate(lines) if not line.fault]


def _open_engine(model: LoadedModel, requests: Sequence[Request], decoding: Decoding) -> Engine:
    """Made for all prompts of the file, also those that are answered: so a cut file ends as a whole one would.

    Its room is rounded up, so that files alike find their programs compiled.
    """
    longest = max(len(request.prompt_ids) for request in requests)
    return open_engine(
        model,
        slots=decoding.slots,
        context=cache_slots(longest + decoding.max_new_tokens),
        longest_prompt=longest,
        plan=str(PLAIN) if decoding.plain else decoding.plan,
        width=plans_of(model, decoding.plan, decoding.slots)[1],
    )


def describe(line: Line, reply: Decoded) -> dict[str, Any]:
    """A line of the output."""
    generation = reply.generation
    return {
        "id": line.id,
        "text": reply.text,
        "new_ids": generation.new_ids,
        "finish_reason": generation.finish_reason,
        "accept_lengths": generation.accept_lengths,
    }


def read_lines(path: str | Path, model: LoadedModel, max_new_tokens: int) -> list[Line]:
    """Every prompt of a file, as token ids; a line that is no prompt at all is a `UserError` that names it.

    A prompt that is too long, or that the chat template refuses, is a `Line` that says so.
    """
    lines: list[Line] = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            name, prompt = _parse(line, f"{path}, line {number}", len(lines))
            lines.append(_line(name, prompt, model, max_new_tokens))
    if not lines:
        raise UserError(f"{path} holds no prompt")
    return lines


def answered(output: Path, lines: Sequence[Line]) -> tuple[int, int]:
    """How many of `lines` the output answers already, and the bytes they take; a line cut short does not count."""
    if not output.exists():
        return 0, 0
    done = size = 0
    try:
        with output.open("rb") as file:
            for written in file:
                if not written.endswith(b"\n"):
                    break
                found = json.loads(written)
                if done == len(lines) or not isinstance(found, dict) or found.get("id") != lines[done].id:
                    raise UserError(f"{output} answers other prompts (line {done + 1}): choose another --output")
                done, size = done + 1, size + len(written)
    except OSError as error:
        raise UserError(f"cannot read {output}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{output}, line {done + 1}, is no reply: choose another --output") from error
    return done, size


def _parse(line: str, where: str, number: int) -> tuple[int | str, Any]:
    """The id and the prompt of a line: text, messages or token ids."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON") from error
    name: int | str = number
    if isinstance(value, dict):
        kinds = [kind for kind in KINDS if kind in value]
        if len(kinds) != 1:
            raise UserError(f"{where}: give one of {', '.join(KINDS)}")
        name, value = value.get("id", number), value[kinds[0]]
    if not isinstance(name, int | str):
        raise UserError(f"{where}: an id is a number or a text, got {name!r:.80}")
    try:
        if isinstance(value, str) or (isinstance(value, list) and value and all(type(x) is int for x in value)):
            return name, value
        return name, as_messages(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _line(name: int | str, prompt: Any, model: LoadedModel, max_new_tokens: int) -> Line:
    try:
        ids = prompt_ids(model, prompt)
        check_prompts(model, [ids], max_new_tokens)
    except UserError as error:
        return Line(name, [], str(error))
    return Line(name, ids)


def _request(line: Line, number: int, decoding: Decoding) -> Request:
    """What prompt `number` of the file asks of an engine."""
    sampling = decoding.sampling
    if sampling is not None:
        sampling = replace(sampling, seed=(sampling.seed + number) % 2**32)
    return Request(tuple(line.ids), decoding.max_new_tokens, sampling, decoding.eos_ids, decoding.stop)
