"""Many prompts decoded where throughput is all that counts: files of prompts, own replies, evaluation in batches.

An engine keeps every slot busy with whatever request is next; what comes back is in the order of what was asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dvi_jax.decode.acceptance import rounds_until
from dvi_jax.decode.batch import Generation
from dvi_jax.decode.prefill import bucket
from dvi_jax.loading import LoadedModel
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.requests import Request, Statistics

MOST_TOGETHER = 16  # prompts that are taken in side by side
SLOTS_EACH = 8  # slots for each of those: their room is taken besides that of the slots
SHORT_CHUNK = 128  # tokens of each at once: rows of longer chunks would mostly be padding
AHEAD = 256  # requests under way at least, so that no slot is empty while a long reply is waited for
PREFIX_BYTES = 2**28  # for beginnings that prompts share


class Decoded(NamedTuple):
    """What came of a request."""

    generation: Generation
    text: str  # "" without a tokenizer
    statistics: Statistics


def open_engine(
    model: LoadedModel,
    *,
    slots: int,
    context: int,
    longest_prompt: int,
    plan: str,
    width: int = 1,
    warm_up: bool = False,
) -> Engine:
    """An engine for prompts of at most so many tokens; `Engine` explains the rest."""
    chunk, together = side_by_side(slots, longest_prompt)
    return Engine(
        model,
        slots=slots,
        context=context,
        plan=plan,
        width=width,
        chunk=chunk,
        together=together,
        max_waiting=max(AHEAD, 4 * slots),
        prefix_bytes=PREFIX_BYTES,
        warm_up=warm_up,
    )


def side_by_side(slots: int, longest_prompt: int) -> tuple[int, int]:
    """How prompts of at most so many tokens are taken in: tokens of a chunk, and prompts together."""
    return min(bucket(longest_prompt), SHORT_CHUNK), max(1, min(slots // SLOTS_EACH, MOST_TOGETHER))


def decode_many(engine: Engine, requests: Iterable[Request]) -> Iterator[Decoded]:
    """What comes of each request, in order; requests are drawn as they can be taken.

    `UserError` for one that cannot be served, or if the engine fails.
    """
    waiting, remaining = deque[Reply](), iter(requests)
    while True:
        while len(waiting) < engine.max_waiting and (request := next(remaining, None)) is not None:
            waiting.append(engine.submit(request))
        if not waiting:
            return
        yield _whole(waiting.popleft())


def _whole(reply: Reply) -> Decoded:
    """All of a reply, which is waited for."""
    whole = reply.whole()
    ids = list(whole.ids)
    rounds = rounds_until(reply.accept_lengths, len(ids) - 1)  # the prefill gave the first token
    generation = Generation(
        output_ids=[*reply.request.prompt_ids, *ids],
        new_ids=ids,
        accept_lengths=reply.accept_lengths[:rounds],
        drafted=reply.drafted[:rounds],
        finish_reason=whole.finish_reason or "",
    )
    return Decoded(generation, whole.text, reply.statistics)
