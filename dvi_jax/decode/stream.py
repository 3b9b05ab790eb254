"""Streaming: tokens reach the caller every few rounds while the device goes on; stop strings and cancelling.

The device is always one stretch of rounds ahead of what the host reads, so reading never makes it wait. Closing the
iterator cancels: at most the stretch under way is still computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.generate import Generation, make_knobs, make_sampling, read_generations, start
from dvi_jax.decode.speculative import decode
from dvi_jax.errors import UserError
from dvi_jax.load import LoadedModel

UNFINISHED = "\ufffd"  # what a tokenizer gives for bytes that are not yet a character


@dataclass(frozen=True)
class Piece:
    """What is new of one row: token ids and text (`""` without a tokenizer), and why the row is finished, if it is."""

    row: int
    ids: list[int]
    text: str
    finish_reason: str | None


@dataclass
class _Row:
    """How much of one row the caller has got."""

    prompt_length: int
    given: int = 0  # new tokens
    text: str = ""
    finish_reason: str | None = None
    ids: list[int] = field(default_factory=list)


class Stream:
    """Iterate for lists of `Piece`, one list every `every` rounds; afterwards `generations` holds the whole rows.

    `stop`: strings that end a row; neither the string nor anything after it is in the text, and `new_ids` end with the
    token that completed it. Other arguments as for `generate`.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompts: Sequence[Sequence[int]],
        settings: DecodeConfig,
        *,
        plain: bool = False,
        eos_ids: tuple[int, ...] | None = None,
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        stop: Sequence[str] = (),
        every: int = 8,
    ):
        if every < 1:
            raise UserError(f"a stream gives tokens every 1 or more rounds, got {every}")
        if stop and model.tokenizer is None:
            raise UserError("stop strings need a tokenizer, which this checkpoint lacks")
        if not all(stop):
            raise UserError("a stop string must not be empty")
        self._model, self._every, self._stop = model, every, tuple(stop)
        self._eos = model.eos_ids if eos_ids is None else eos_ids
        self._knobs = make_knobs(settings, self._eos, plain=plain)
        rows = make_sampling(model, prompts, sampling)
        self._state = start(model, prompts, settings, self._knobs, sampling=rows)
        self._rows = [_Row(len(prompt)) for prompt in prompts]
        self.generations: list[Generation] = []

    def __iter__(self) -> Iterator[list[Piece]]:
        shown = self._advance(0)
        ahead = 1
        while True:
            following = self._advance(ahead)  # under way before the last stretch is read
            ahead += 1
            tokens, lengths, done = (np.asarray(array) for array in shown)
            pieces = [self._take(row, tokens[row, : lengths[row]], bool(done[row])) for row in range(len(self._rows))]
            yield [piece for piece in pieces if piece is not None]
            finished = np.array([row.finish_reason is not None for row in self._rows])
            if finished.all():
                break
            self._state = self._state.replace(done=self._state.done | jnp.asarray(finished))
            shown = following
        self.generations = self._whole()

    def _advance(self, stretch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Dispatch the next rounds (before the first: none). Copies of tokens, lengths, done: the state is donated."""
        if stretch:
            knobs = self._knobs._replace(until=jnp.int32(stretch * self._every))
            self._state = decode(self._model.graphdef, self._model.decode_params, self._state, knobs)
        return jnp.copy(self._state.tokens), jnp.copy(self._state.length), jnp.copy(self._state.done)

    def _take(self, index: int, sequence: np.ndarray, done: bool) -> Piece | None:
        """What is new of a row whose sequence (prompt included) is now this."""
        row = self._rows[index]
        if row.finish_reason is not None:
            return None
        fresh = sequence[row.prompt_length + row.given :].tolist()
        row.ids += fresh
        row.given += len(fresh)
        if done:
            row.finish_reason = "eos" if row.ids[-1] in self._eos else "length"
        before = len(row.text)
        if self._model.tokenizer is not None:
            self._extend(row, self._model.tokenizer)
        kept = fresh[: max(len(fresh) - (row.given - len(row.ids)), 0)]
        if not kept and len(row.text) == before and row.finish_reason is None:
            return None
        return Piece(index, kept, row.text[before:], row.finish_reason)

    def _extend(self, row: _Row, tokenizer: Tokenizer) -> None:
        """Bring the row's text up to date, holding back what may yet change or become a stop string."""
        text = tokenizer.decode(row.ids)
        if _find(text, self._stop) is not None:
            row.finish_reason = "stop"
            # The token that first completes one decides, so that the text does not depend on where a round ended.
            while len(row.ids) > 1 and _find(shorter := tokenizer.decode(row.ids[:-1]), self._stop) is not None:
                row.ids.pop()
                text = shorter
            row.text = text[: _find(text, self._stop)]
            return
        if row.finish_reason is None:
            text = text.rstrip(UNFINISHED)
            text = text[: len(text) - _held_back(text, self._stop)]
        if len(text) > len(row.text):
            row.text = text

    def _whole(self) -> list[Generation]:
        """The rows as `generate` gives them; a row that a stop string ended is cut there."""
        lengths = [row.prompt_length for row in self._rows]
        generations = read_generations(self._state, lengths, self._eos)
        return [_cut(generation, row) for generation, row in zip(generations, self._rows, strict=True)]


def _find(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins, None without one."""
    return min((text.index(stop) for stop in stops if stop in text), default=None)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that are the beginning of a stop string."""
    most = max((len(stop) for stop in stops), default=1) - 1
    return next(
        (size for size in range(min(most, len(text)), 0, -1) if any(stop.startswith(text[-size:]) for stop in stops)), 0
    )


def _cut(generation: Generation, row: _Row) -> Generation:
    if row.finish_reason != "stop":
        return generation
    committed = np.cumsum([0, *generation.accept_lengths])  # after so many rounds; the prefill gave the first token
    rounds = int(np.searchsorted(committed, len(row.ids) - 1))
    return Generation(
        output_ids=generation.output_ids[: row.prompt_length] + row.ids,
        new_ids=list(row.ids),
        accept_lengths=generation.accept_lengths[:rounds],
        drafted=generation.drafted[:rounds],
        finish_reason="stop",
    )
