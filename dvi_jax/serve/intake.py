"""Prompts on their way into an engine: one at a time, in chunks of one length, what is kept of others laid back."""

from __future__ import annotations

import numpy as np

from dvi_jax.decode.prefill import Filled
from dvi_jax.loading import LoadedModel
from dvi_jax.model.speculative_llama import Params
from dvi_jax.serve.prefixes import Prefixes, cut_block, position_axes, put_block
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.slots import empty_prompt, restart, take_chunk


class Intake:
    """Takes in the prompt of one reply after the other."""

    def __init__(self, model: LoadedModel, *, room: int, chunk: int, prefix_bytes: int, record: bool):
        """`room`: positions, enough for the chunks of the longest prompt. `prefix_bytes`: for what prompts share."""
        self._definition, params = model.definition, model.decode_params
        self._chunk, self._prefixes = chunk, Prefixes(chunk, prefix_bytes)
        self._axes = position_axes(self._definition, params, record=record)
        self._filled = empty_prompt(self._definition, params, room=room, record=record)
        self._names: list[bytes] = []
        self._taken = 0  # chunks of this prompt
        self.reply: Reply | None = None

    @property
    def ready(self) -> bool:
        """Whether a prompt is all taken in."""
        return self.reply is not None and self._taken * self._chunk >= len(self.reply.request.prompt_ids)

    def warm_up(self, params: Params) -> Filled:
        """Compile every program, by taking in a chunk of nothing."""
        tokens, length = np.zeros((1, self._chunk), np.int32), np.array([1], np.int32)
        self._filled = take_chunk(self._definition, params, restart(self._filled), tokens, length)
        if self._prefixes.budget:
            block = cut_block(self._filled, self._axes, self._chunk)
            self._filled = put_block(restart(self._filled), block, self._axes)
        return self._filled

    def begin(self, reply: Reply) -> None:
        """The next prompt, with what is kept of its beginning."""
        self.reply, self._filled = reply, restart(self._filled)
        self._names = self._prefixes.names(reply.request.prompt_ids)
        known = self._prefixes.find(self._names)
        for block in known:
            self._filled = put_block(self._filled, block, self._axes)
        self._taken = len(known)
        reply.statistics.cached_tokens = len(known) * self._chunk

    def step(self, params: Params) -> None:
        """One more chunk."""
        assert self.reply is not None
        ids = self.reply.request.prompt_ids
        piece = ids[self._taken * self._chunk : (self._taken + 1) * self._chunk]
        tokens = np.zeros((1, self._chunk), np.int32)
        tokens[0, : len(piece)] = piece
        length = np.array([len(ids)], np.int32)
        self._filled = take_chunk(self._definition, params, self._filled, tokens, length)
        if self._taken < len(self._names):
            self._prefixes.keep(self._names[self._taken], cut_block(self._filled, self._axes, self._chunk))
        self._taken += 1

    def hand_over(self) -> tuple[Reply, Filled]:
        """The reply whose prompt is taken in, and that prompt; good until the next one begins."""
        assert self.reply is not None
        reply, self.reply = self.reply, None
        return reply, self._filled

    def drop(self) -> Reply:
        """Think no more of the prompt that is under way; whose it is."""
        return self.hand_over()[0]
