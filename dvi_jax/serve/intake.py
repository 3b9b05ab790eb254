"""Prompts on their way into an engine, in chunks of one length: one at a time, what is kept of others laid back.

Or several at a time, where throughput is all that counts: a pass over a short prompt costs little less than one over
sixteen. These share no beginnings, as their chunks go through side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dvi_jax.decode.prefill import Filled
from dvi_jax.loading import LoadedModel
from dvi_jax.model.speculative_llama import Params
from dvi_jax.serve.prefixes import Prefixes, cut_block, position_axes, put_block
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.slots import empty_prompts, take_chunk


class Intake:
    """Takes in the prompts of so many replies after the other."""

    def __init__(self, model: LoadedModel, *, rows: int, room: int, chunk: int, prefix_bytes: int, record: bool):
        """`rows`: prompts that are taken in together. `room`: positions, enough for the chunks of the longest prompt.

        `prefix_bytes`: for what prompts share; 0 where several are taken in together.
        """
        assert rows == 1 or not prefix_bytes
        self._definition, params = model.definition, model.decode_params
        self.rows, self.chunk, self._prefixes = rows, chunk, Prefixes(chunk, prefix_bytes)
        self._axes = position_axes(self._definition, params, record=record)
        self._filled = empty_prompts(self._definition, params, rows=rows, room=room, record=record)
        self._replies: list[Reply | None] = [None] * rows  # whose prompt a row holds
        self._lengths = np.ones(rows, np.int32)  # tokens of each row's prompt
        self._names: list[bytes] = []
        self._taken = 0  # chunks of these prompts

    @property
    def replies(self) -> list[Reply]:
        """Those whose prompts are here."""
        return [reply for reply in self._replies if reply is not None]

    @property
    def is_ready(self) -> bool:
        """Whether all that is here is taken in; not, if nothing is."""
        return bool(self.replies) and self._taken * self.chunk >= int(self._lengths.max())

    def warm_up(self, params: Params) -> Filled:
        """Compile every program, by taking in a chunk of nothing."""
        self.fill(params, [0])
        if self._prefixes.budget:
            block = cut_block(self._filled, self._axes, self.chunk)
            self._filled = put_block(self._filled, block, self._axes, np.int32(0))
        return self._filled

    def fill(self, params: Params, prompt: Sequence[int]) -> Filled:
        """Every row with the same prompt, of a chunk at most, that belongs to no reply."""
        tokens = np.zeros((self.rows, self.chunk), np.int32)
        tokens[:, : len(prompt)] = prompt
        self._lengths[:] = len(prompt)
        self._take(params, tokens, 0)
        return self._filled

    def begin(self, replies: Sequence[Reply]) -> None:
        """The next prompts, as many as there are rows at most, with what is kept of their beginning."""
        self._replies = [*replies, *[None] * (self.rows - len(replies))]
        self._taken, self._names = 0, []
        self._lengths[:] = 1
        self._lengths[: len(replies)] = [len(reply.request.prompt_ids) for reply in replies]
        if self._prefixes.budget:
            (reply,) = replies
            self._names = self._prefixes.names(reply.request.prompt_ids)
            known = self._prefixes.find(self._names)
            for number, block in enumerate(known):
                self._filled = put_block(self._filled, block, self._axes, np.int32(number * self.chunk))
            self._taken = len(known)
            reply.statistics.cached_tokens = len(known) * self.chunk

    def step(self, params: Params) -> None:
        """One more chunk of each."""
        tokens, begin = np.zeros((self.rows, self.chunk), np.int32), self._taken * self.chunk
        for row, reply in zip(tokens, self._replies, strict=True):
            if reply is not None:
                piece = reply.request.prompt_ids[begin : begin + self.chunk]
                row[: len(piece)] = piece
        self._take(params, tokens, begin)
        if self._taken < len(self._names):
            self._prefixes.keep(self._names[self._taken], cut_block(self._filled, self._axes, self.chunk))
        self._taken += 1

    def _take(self, params: Params, tokens: np.ndarray, position: int) -> None:
        lengths = self._lengths.copy()  # the device reads it when it comes to it
        self._filled = take_chunk(self._definition, params, self._filled, tokens, lengths, np.int32(position))

    def hand_over(self, most: int) -> tuple[dict[int, Reply], Filled]:
        """So many of the replies whose prompts are taken in, by row, and these prompts; good until others begin."""
        rows = [row for row, reply in enumerate(self._replies) if reply is not None][:most]
        return {row: self._pop(row) for row in rows}, self._filled

    def drop_cancelled(self) -> Iterator[Reply]:
        """Think no more of the prompts of cancelled replies; whose they are."""
        for row, reply in enumerate(self._replies):
            if reply is not None and reply.cancelled:
                yield self._pop(row)

    def _pop(self, row: int) -> Reply:
        reply, self._replies[row], self._lengths[row] = self._replies[row], None, 1
        assert reply is not None
        return reply
