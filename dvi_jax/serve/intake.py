"""Prompts on their way into an engine, in chunks of one length: one at a time, what is kept of others laid back.

A prompt of one chunk goes in by one as short as holds it, and on a single device right where it is to lie. Or several
go in at a time, where throughput is all that counts: a pass over a short prompt costs little less than one over
sixteen. These share no beginnings, as their chunks, of one length all, go through side by side.
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
# Most prompts of a chat are short. Parts of a chunk that a prompt goes in by, if it fits: an eighth is rows of a round
# to a GPU, whose kernels take them quicker than a prefill's; a quarter takes it two thirds of the time of a chunk
# (SmolLM2, H100), and a CPU a quarter.
EIGHTH, QUARTER = 8, 4
CPU_SHORTEST = 16  # tokens of a chunk: shorter ones save nothing


def chunk_tokens(model: LoadedModel, asked: int | None, context: int) -> int:
    """Of a prompt that go through at once: as `asked`, or as suits the device; `context`: of an engine."""
    chunk = min(asked or (CPU_CHUNK if jax.default_backend() == "cpu" else CHUNK), context)
    # On several devices a chunk runs no kernel of a round, which would have to be loaded first.
    return max(chunk, 2 * MOST_ROUND_ROWS) if shards(model.definition.mesh) > 1 else chunk


def is_single(model: LoadedModel) -> bool:
    """Whether all is on one device, so that a prompt can be taken in where it is to lie."""
    return model.definition.mesh is None


def chunk_sizes(model: LoadedModel, rows: int, chunk: int) -> tuple[int, ...]:
    """Tokens of chunks, ascending, where so many prompts go in by chunks of `chunk`, which is the last.

    A prompt of one chunk goes in by the first that holds it. Not where several go in side by side: which chunk a prompt
    has must not depend on the others, as its bits might.
    """
    if rows > 1:
        return (chunk,)
    if jax.default_backend() == "cpu" and shards(model.definition.mesh) == 1:
        parts, least = [QUARTER], CPU_SHORTEST
    elif is_single(model):
        parts, least = [EIGHTH, QUARTER], MOST_ROUND_ROWS
    else:  # as for `chunk_tokens`
        parts, least = [QUARTER], 2 * MOST_ROUND_ROWS
    return (*(chunk // part for part in parts if chunk // part >= least), chunk)


class Intake:
    """Takes in the prompts of so many replies after the other.

    One that is whole in a chunk, and goes in where it is to lie, is held until there is a slot.
    """

    def __init__(self, programs: Programs, sizes: Sequence[int], *, in_place: bool = False):
        """`sizes`: of `chunk_sizes`. `in_place`: prompts of one chunk go in where they are to lie."""
        self._programs, self.rows, self.chunk = programs, programs.rows, programs.chunk
        self._sizes, self._in_place = sizes, in_place
        self._size = self.chunk  # tokens of the next chunk
        self._whole: np.ndarray | None = None  # int32 [1, C], the prompt that is held
        self._replies: list[Reply | None] = [None] * self.rows  # whose prompt a row holds
        self._lengths = np.ones(self.rows, np.int32)  # tokens of each row's prompt
        self._names: list[bytes] = []
        self._taken = 0  # chunks of these prompts

    @classmethod
    def of(cls, model: LoadedModel, programs: Programs) -> Intake:
        """As suits the model's devices."""
        sizes = chunk_sizes(model, programs.rows, programs.chunk)
        return cls(programs, sizes, in_place=programs.rows == 1 and is_single(model))

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
        return self._whole is not None and self.is_ready

    def warm_up(self, places: Sequence[np.ndarray], terms: np.ndarray) -> None:
        """Compile every program, by taking in prompts of nothing and laying them into these slots on these terms."""
        self._programs.take(np.zeros((self.rows, self.chunk), np.int32), np.ones(self.rows, np.int32), 0)
        if self._programs.prefixes.budget:
            self._programs.try_laying_back()
        if self._in_place:
            self._programs.compile_wholes(self._sizes)
        for length in self._sizes:
            self.fill([0] * length)
            self._try_laying(places, terms)
        if self._in_place:  # and what `take` took in
            self._whole = None
            self._try_laying(places, terms)

    def _try_laying(self, places: Sequence[np.ndarray], terms: np.ndarray) -> None:
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
        if self._whole is None:
            return self._programs.lay(places, terms, sampled)
        return self._programs.take_whole(self._whole, places, terms, sampled)

    def _expect(self, lengths: Sequence[int]) -> None:
        """Prompts of so many tokens come next."""
        self._lengths[:] = 1
        self._lengths[: len(lengths)] = lengths
        self._size = next((size for size in self._sizes if self._lengths.max() <= size), self.chunk)
        self._whole = None

    def _take(self, tokens: np.ndarray, position: int) -> None:
        if self._in_place and self._lengths[0] <= self._size:
            self._whole = tokens
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
