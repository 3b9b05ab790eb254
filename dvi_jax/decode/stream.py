"""Streaming: tokens reach the caller every few rounds while the device goes on; stop strings and cancelling.

The device is always one stretch of rounds ahead of what the host reads, so reading never makes it wait. Closing the
iterator cancels: at most the stretch under way is still computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.acceptance import rounds_until
from dvi_jax.decode.batch import Generation, choose_plan, make_knobs, make_sampling, read_generations, start
from dvi_jax.decode.prefix import Prefix
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel

EVERY = 8  # rounds between two pieces, unless asked otherwise
UNFINISHED = "\ufffd"  # what a tokenizer gives for bytes that are not a character, or not yet
# Ids decoded once more before new ones. Each is a byte or more: three end any character begun before them, so that the
# fourth reads as it does in the whole.
_CONTEXT = 4


@dataclass(frozen=True)
class Piece:
    """What is new of one sequence of the batch."""

    sequence: int  # its index
    ids: list[int]  # new token ids
    text: str  # that they add, "" without a tokenizer
    finish_reason: str | None  # why the sequence is finished, if it is


class StreamedText:
    """The text of ids that come bit by bit, up to the first stop string; the whole is never decoded again.

    Text is given as soon as nothing that follows can change it: neither complete a character or a stop string, nor be a
    byte that spoils the bytes before it (of byte fallback, decoders show a run as a whole, or as so many `UNFINISHED`).
    `stop_ids` are ids that stop where they come, as a stop string does.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), stop_ids: Collection[int] = ()):
        self._tokenizer, self._stops, self._stop_ids = tokenizer, tuple(stops), frozenset(stop_ids)
        self._window: list[int] = []  # the last ids whose text is sure, and new ones
        self._known = 0  # characters of the window's text that were taken before
        self._run: list[int] = []  # ids after the window, all of them bytes
        self._waiting = ""  # sure, but it may be the beginning of a stop string
        self.stopped = False

    def add(self, ids: Sequence[int], *, last: bool = False) -> tuple[int, str]:
        """Take in ids, the last ones of all if `last`: how many of them count, and the text that is new.

        Those after the one that completes a stop string do not count; nothing may be added once `stopped`.
        """
        if not self._may_stop(ids):
            self._settle(ids)
            return len(ids), self._waiting + self._ahead() if last else self._give()
        given = ""
        # One by one (a run of bytes as a whole each time): the id that first completes a stop string decides.
        for count, token in enumerate(ids, 1):
            self._settle([token])
            ahead = self._ahead()
            found = _find(self._waiting + ahead.rstrip(UNFINISHED), self._stops)
            if found is not None or token in self._stop_ids:
                self.stopped = True
                return count, given + (self._waiting + ahead)[:found]
            given += self._give()
        return len(ids), given + (self._waiting + self._ahead() if last else "")

    def _may_stop(self, ids: Sequence[int]) -> bool:
        """Whether a stop may hide in these ids. Bytes can make one that later bytes spoil; other text stays."""
        if not self._stop_ids.isdisjoint(ids):
            return True
        if not self._stops:
            return False
        if not self._tokenizer.byte_ids.isdisjoint(ids):
            return True
        return _find(self._waiting + self._ahead(ids), self._stops) is not None

    def _ahead(self, ids: Sequence[int] = ()) -> str:
        """The text after what waits, that of `ids` too, as it reads if nothing follows."""
        shown = filter(self._tokenizer.is_shown, ids)
        return self._tokenizer.decode([*self._window, *self._run, *shown])[self._known :]

    def _settle(self, ids: Sequence[int]) -> None:
        """Take in ids; the text that has become sure waits."""
        for token in filter(self._tokenizer.is_shown, ids):
            self._run.append(token)
            if token not in self._tokenizer.byte_ids:
                self._window += self._run
                self._run = []
        text = self._tokenizer.decode(self._window)
        unsure = text.endswith(UNFINISHED)  # only the last one may be a character that is not complete
        self._waiting += text[self._known : len(text) - unsure]
        self._window = self._window[-_CONTEXT:]
        self._known = len(self._tokenizer.decode(self._window)) - unsure

    def _give(self) -> str:
        """What waits, without the beginning of a stop string at its end."""
        size = len(self._waiting) - _held_back(self._waiting, self._stops)
        given, self._waiting = self._waiting[:size], self._waiting[size:]
        return given


@dataclass
class _Sequence:
    """One sequence as far as the caller has got it."""

    prompt_length: int
    text: StreamedText | None
    ids: list[int] = field(default_factory=list)  # new ones
    finish_reason: str | None = None


class Stream:
    """Iterate for lists of `Piece`, one list every `every` rounds; afterwards `generations` holds the whole sequences.

    `stop`: strings that end a sequence; neither the string nor anything after it is in the text, and `new_ids` end with
    the token that completed it. Special tokens are no text, but a stop string that is one ends a sequence there. Other
    arguments as for `generate_batch`.
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
        prefix: Prefix | None = None,
        stop: Sequence[str] = (),
        every: int = EVERY,
    ):
        if every < 1:
            raise UserError(f"a stream gives tokens every 1 or more rounds, got {every}")
        if stop:
            model.need_tokenizer("stop strings need a tokenizer, which this checkpoint lacks")
        if not all(stop):
            raise UserError("a stop string must not be empty")
        self._model, self._every = model, every
        self._eos = model.eos_ids if eos_ids is None else eos_ids
        self._knobs = make_knobs(settings, self._eos, plain=plain)
        self._plan = choose_plan(model, settings, plain=plain)
        drawn = make_sampling(model, prompts, sampling)
        self._state = start(model, prompts, settings, self._knobs, sampling=drawn, prefix=prefix)
        self._sequences = [_Sequence(len(prompt), self._new_text(stop)) for prompt in prompts]
        self.generations: list[Generation] = []

    def __iter__(self) -> Iterator[list[Piece]]:
        shown = self._advance(0)
        ahead = 1
        while True:
            following = self._advance(ahead)  # under way before the last stretch is read
            ahead += 1
            tokens, lengths, done = (np.asarray(array) for array in shown)
            pieces = [self._take(i, tokens[i, : lengths[i]], bool(done[i])) for i in range(len(self._sequences))]
            yield [piece for piece in pieces if piece is not None]
            finished = np.array([sequence.finish_reason is not None for sequence in self._sequences])
            if finished.all():
                break
            self._state = self._state.replace(done=self._state.done | jnp.asarray(finished))
            shown = following
        self.generations = self._whole()

    def _advance(self, stretch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Dispatch the next rounds (before the first: none). Copies of tokens, lengths, done: the state is donated."""
        if stretch:
            knobs = self._knobs._replace(until=jnp.int32(stretch * self._every))
            self._state = decode_rounds(
                self._model.definition, self._model.decode_params, self._state, knobs, self._plan
            )
        return jnp.copy(self._state.tokens), jnp.copy(self._state.length), jnp.copy(self._state.done)

    def _new_text(self, stop: Sequence[str]) -> StreamedText | None:
        tokenizer = self._model.tokenizer
        if tokenizer is None:
            return None
        return StreamedText(tokenizer, stop, stop_ids(tokenizer, stop, self._eos))

    def _take(self, index: int, tokens: np.ndarray, done: bool) -> Piece | None:
        """What is new of sequence `index`, whose tokens (prompt included) are now `tokens`."""
        sequence = self._sequences[index]
        if sequence.finish_reason is not None:
            return None
        fresh, text = tokens[sequence.prompt_length + len(sequence.ids) :].tolist(), ""
        if done:
            sequence.finish_reason = "eos" if tokens[-1] in self._eos else "length"
        if sequence.text is not None:
            count, text = sequence.text.add(fresh, last=done)
            fresh = fresh[:count]
            if sequence.text.stopped:
                sequence.finish_reason = "stop"
        sequence.ids += fresh
        if not fresh and not text and sequence.finish_reason is None:
            return None
        return Piece(index, fresh, text, sequence.finish_reason)

    def _whole(self) -> list[Generation]:
        """The sequences as `generate_batch` gives them; one that a stop string ended is cut there."""
        lengths = [sequence.prompt_length for sequence in self._sequences]
        generations = read_generations(self._state, lengths, self._eos)
        return [_cut(*pair) for pair in zip(generations, self._sequences, strict=True)]


def stop_ids(tokenizer: Tokenizer, stops: Sequence[str], eos_ids: Collection[int]) -> set[int]:
    """Ids of stop strings that are special tokens, which are no text; without `eos_ids`: those stay a reason apart."""
    ids = {tokenizer.token_id(stop) for stop in stops}
    return {token for token in ids if token is not None and not tokenizer.is_shown(token)}.difference(eos_ids)


def _find(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins, None without one."""
    return min((text.index(stop) for stop in stops if stop in text), default=None)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that are the beginning of a stop string."""
    most = max((len(stop) for stop in stops), default=1) - 1
    return next(
        (size for size in range(min(most, len(text)), 0, -1) if any(stop.startswith(text[-size:]) for stop in stops)), 0
    )


def _cut(generation: Generation, sequence: _Sequence) -> Generation:
    if sequence.finish_reason != "stop":
        return generation
    rounds = rounds_until(generation.accept_lengths, len(sequence.ids) - 1)  # the prefill gave the first token
    return Generation(
        output_ids=generation.output_ids[: sequence.prompt_length] + sequence.ids,
        new_ids=list(sequence.ids),
        accept_lengths=generation.accept_lengths[:rounds],
        drafted=generation.drafted[:rounds],
        finish_reason="stop",
    )
