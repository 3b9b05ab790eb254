"""Prompts on their way into an engine, in chunks of one length: one at a time, what is kept of others laid back.

A prompt that is short goes in by one short chunk. Or several go in at a time, where throughput is all that counts: a
pass over a short prompt costs little less than one over sixteen. These share no beginnings, as their chunks, of one
length all, go through side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import shards
from dvi_jax.model.decode_attention import MOST_ROUND_ROWS
from dvi_jax.serve.programs import Programs
from dvi_jax.serve.reply import Reply

CHUNK, CPU_CHUNK = 512, 128  # tokens of a prompt that go through at once
# Most prompts of a chat are short. A quarter of a chunk takes a GPU two thirds of its time (SmolLM2, H100: 1.05 of 1.5
# ms), and a CPU a quarter.
SHORT = 4  # a prompt of at most this part of a chunk goes in by a chunk of this part
CPU_SHORTEST = 16  # tokens of such a chunk: shorter ones save nothing


def chunk_tokens(model: LoadedModel, asked: int | None, context: int) -> int:
    """Of a prompt that go through at once: as `asked`, or as suits the device; `context`: of an engine."""
    chunk = min(asked or (CPU_CHUNK if jax.default_backend() == "cpu" else CHUNK), context)
    # On several devices a chunk runs no kernel of a round, which would have to be loaded first.
    return max(chunk, 2 * MOST_ROUND_ROWS) if shards(model.definition.mesh) > 1 else chunk


def short_tokens(model: LoadedModel, rows: int, chunk: int) -> int:
    """Of a chunk for prompts that are as short, where so many prompts go in by chunks of `chunk`; 0: there is none.

    Not where several go in side by side: which chunk a prompt has must not depend on the others, as its bits might.
    """
    on_cpu = jax.default_backend() == "cpu" and shards(model.definition.mesh) == 1
    # Elsewhere as for `chunk_tokens`; and so few rows take a GPU no less time than twice as many.
    least = CPU_SHORTEST if on_cpu else 2 * MOST_ROUND_ROWS
    return chunk // SHORT if rows == 1 and chunk // SHORT >= least else 0


class Intake:
    """Takes in the prompts of so many replies after the other.

    The last chunk of one that goes in alone is held until there is a slot: it goes in with the prompt's laying.
    """

    def __init__(self, programs: Programs, short: int = 0):
        """`short`: of `short_tokens`."""
        self._programs, self.rows, self.chunk, self._short = programs, programs.rows, programs.chunk, short
        self._size = self.chunk  # tokens of the next chunk
        self._held = np.zeros((1, self.chunk), np.int32), 0  # the last chunk of a prompt, and its position
        self._replies: list[Reply | None] = [None] * self.rows  # whose prompt a row holds
        self._lengths = np.ones(self.rows, np.int32)  # tokens of each row's prompt
        self._names: list[bytes] = []
        self._taken = 0  # chunks of these prompts

    @property
    def replies(self) -> list[Reply]:
        """Those whose prompts are here."""
        return [reply for reply in self._replies if reply is not None]

    @property
    def is_ready(self) -> bool:
        """Whether all that is here is taken in, or held; not, if nothing is here."""
        return bool(self.replies) and self._taken * self.chunk >= int(self._lengths.max())

    @property
    def holds_chunk(self) -> bool:
        """Whether a prompt waits for its slot with a chunk that the device has yet to be given."""
        return self.rows == 1 and self.is_ready

    def warm_up(self, places: Sequence[np.ndarray], terms: np.ndarray) -> None:
        """Compile every program, by taking in prompts of nothing and laying them into these slots on these terms."""
        self._programs.take(np.zeros((self.rows, self.chunk), np.int32), np.ones(self.rows, np.int32), 0)
        if self._programs.prefixes.budget:
            self._programs.try_laying_back()
        longest = [self._short, self.chunk] if self._short else [self.chunk]
        if self.rows == 1:
            self._programs.compile_last_chunks(longest)
        for length in longest:
            self.fill([0] * length)
            for where, sampled in itertools.product(places, (False, True)):
                self.lay(where, terms, sampled=sampled)

    def fill(self, prompt: Sequence[int]) -> None:
        """Every row with the same prompt, of a chunk at most, that belongs to no reply."""
        self._expect([len(prompt)] * self.rows)
        tokens = np.zeros((self.rows, self._size), np.int32)
        tokens[:, : len(prompt)] = prompt
        self._take(tokens, 0)

    def begin(self, replies: Sequence[Reply]) -> None:
        """The next prompts, as many as there are rows at most, with what is kept of their beginning."""
        self._replies = [*replies, *[None] * (self.rows - len(replies))]
        self._taken, self._names = 0, []
        self._expect([len(reply.request.prompt_ids) for reply in replies])
        if self._programs.prefixes.budget:
            (reply,) = replies
            self._names = self._programs.prefixes.names(reply.request.prompt_ids)
            self._taken = self._programs.lay_back(*self._names) if self._names else 0
            reply.statistics.cached_tokens = self._taken * self.chunk

    def step(self) -> None:
        """One more chunk of each."""
        tokens, begin = np.zeros((self.rows, self._size), np.int32), self._taken * self.chunk
        for row, reply in zip(tokens, self._replies, strict=True):
            if reply is not None:
                piece = reply.request.prompt_ids[begin : begin + self._size]
                row[: len(piece)] = piece
        self._take(tokens, begin)
        if self._taken < len(self._names):  # never a prompt's last
            self._programs.keep(self._names[self._taken])
        self._taken += 1

    def lay(self, places: np.ndarray, terms: np.ndarray, *, sampled: bool) -> jax.Array:
        """The prompts that are here, and ready, into slots: as `Programs.lay`."""
        if self.rows > 1:
            return self._programs.lay(places, terms, sampled)
        return self._programs.take_last(*self._held, places, terms, sampled)

    def _expect(self, lengths: Sequence[int]) -> None:
        """Prompts of so many tokens come next."""
        self._lengths[:] = 1
        self._lengths[: len(lengths)] = lengths
        self._size = self._short if self._lengths.max() <= self._short else self.chunk  # all of a short prompt

    def _take(self, tokens: np.ndarray, position: int) -> None:
        if self.rows == 1 and position + tokens.shape[1] >= self._lengths[0]:
            self._held = tokens, position
        else:
            self._programs.take(tokens, self._lengths, position)

    def hand_over(self) -> Iterator[tuple[int, Reply]]:
        """The replies whose prompts are taken in, each by its row as it is asked for; the prompts stay there."""
        for row, reply in enumerate(self._replies):
            if reply is not None:
                yield row, self._pop(row)

    def drop_cancelled(self) -> Iterator[Reply]:
        """Think no more of the prompts of cancelled replies; whose they are."""
        for row, reply in enumerate(self._replies):
            if reply is not None and reply.cancelled:
                yield self._pop(row)

    def _pop(self, row: int) -> Reply:
        reply, self._replies[row], self._lengths[row] = self._replies[row], None, 1
        assert reply is not None
        return reply
