"""One request under way, on the host: what its reader sees of it, and how the engine fills it.

A reply is written by the engine's thread and read by one reader, in a thread or in an event loop. Text is made where it
is read, which costs the engine nothing; only with stop strings must the engine know it.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from dvi_jax.decode.stream import StreamedText
from dvi_jax.errors import UserError
from dvi_jax.serve.requests import ReplyPiece, Request, Statistics, TokenLogprob
from dvi_jax.serve.waking import waker


class Reply:
    """A request and its reply so far (`requests.Handle`)."""

    def __init__(self, request: Request, eos_ids: tuple[int, ...], text: StreamedText | None, wake: Callable[[], None]):
        """`text` makes text of the reply, None where there is none to make. `wake` tells the engine of a cancel."""
        self.request, self.eos_ids = request, eos_ids
        self.statistics = Statistics(prompt_tokens=len(request.prompt_ids), submitted=time.monotonic())
        self.finish_reason: str | None = None
        self.cancelled = False
        self.committed = len(request.prompt_ids)  # tokens known to be on the device, prompt included
        self.is_fresh = True  # the drafter has seen every row of it
        self.accept_lengths: list[int] = []  # tokens committed in each round, also those behind a stop string
        self.drafted: list[int] = []  # tokens drafted in each
        self._text, self._wake = text, wake
        self._pieces: list[ReplyPiece] = []
        self._failure: str | None = None
        self._changed = threading.Condition()
        self._wakes_at_end = False  # whether its reader wants to be told of nothing before
        self._notify: Callable[[], None] | None = None  # tells a reader in an event loop

    # What the reader calls.

    def __iter__(self) -> Iterator[ReplyPiece]:
        """What has come since the last piece, again and again, up to the finish reason. Leaving early cancels."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._pieces or self.finish_reason is not None)
                piece = self._next()
                if piece is None:
                    return
                yield piece
        finally:
            self.cancel()

    def whole(self) -> ReplyPiece:
        """All of it, once it has ended. The reader is woken once, which costs the engine less than each time."""
        self._wakes_at_end = True
        return joined(list(self))

    async def stream(self) -> AsyncIterator[ReplyPiece]:
        """The same for an event loop: no thread waits."""
        arrived = asyncio.Event()
        self._notify = partial(waker().set, arrived)
        try:
            while True:
                arrived.clear()
                is_over = self.finish_reason is not None  # asked first: its last piece is there then
                while (piece := self._next()) is not None:
                    yield piece
                if is_over:
                    return
                await arrived.wait()
        finally:
            self.cancel()

    async def admitted(self) -> None:
        """It is: `submit` has said so."""

    def tell(self, notify: Callable[[], None]) -> None:
        """Call `notify`, in the engine's thread, whenever there is more to be `taken`, and now."""
        self._notify = notify
        notify()

    def cancel(self) -> None:
        """End it, if it has not ended; the slot is free at the next stretch."""
        if self.finish_reason is None:
            self.cancelled = True
            self._wake()

    def taken(self) -> ReplyPiece | None:
        """What was not taken yet, in one piece, with text only where the engine had to know it.

        None where there is nothing; `UserError` after the last if the engine failed.
        """
        with self._changed:
            if not self._pieces:
                if self._failure is not None:
                    raise UserError(self._failure)
                return None
            pieces, self._pieces = self._pieces, []
        return joined(pieces)

    def _next(self) -> ReplyPiece | None:
        """What was `taken`, with its text: a reader that is woken late makes text of it once."""
        piece = self.taken()
        return piece if piece is None or self.request.stop else with_text(piece, self._text)

    # What the engine calls.

    def chunks(self, size: int) -> int:
        """Chunks of so many tokens that its prompt is."""
        return -(-len(self.request.prompt_ids) // size)

    def take(self, ids: Sequence[int], *, done: bool, logprobs: tuple[TokenLogprob, ...] | None = None) -> None:
        """Committed tokens, the last ones of all if `done`; `logprobs` has one for each."""
        self.committed += len(ids)
        reason, text = None, ""
        if done:
            reason = "eos" if ids[-1] in self.eos_ids else "length"
        if self._text is not None and self.request.stop:
            count, text = self._text.add(ids, last=done)
            ids = ids[:count]
            if self._text.stopped:
                reason = "stop"
        statistics = self.statistics
        if ids and not statistics.new_tokens:
            statistics.first_token = time.monotonic()
        statistics.new_tokens += len(ids)
        if ids or text or reason:
            self._give(ReplyPiece(tuple(ids), text, reason, logprobs and logprobs[: len(ids)]))

    def count(self, accept_lengths: list[int], drafted: list[int]) -> None:
        """Rounds in which so many tokens each were committed and drafted; none once the sequence is done."""
        rounds, statistics = sum(length > 0 for length in accept_lengths), self.statistics
        self.accept_lengths += accept_lengths[:rounds]
        self.drafted += drafted[:rounds]
        statistics.rounds += rounds
        statistics.drafted += sum(drafted[:rounds])
        statistics.accepted += sum(accept_lengths) - rounds

    def end(self, reason: str) -> None:
        """Nothing more comes."""
        self._give(ReplyPiece((), "", reason))

    def fail(self, message: str) -> None:
        """The engine failed; the reader is told so, unless the reply has ended."""
        with self._changed:
            if self.finish_reason is not None:
                return
            self._failure, self.finish_reason = message, "failed"
            self._tell()

    def _give(self, piece: ReplyPiece) -> None:
        with self._changed:
            if self.finish_reason is not None:  # another thread was first: nothing comes after that
                return
            if piece.finish_reason is not None:
                self.statistics.finished = time.monotonic()
            self._pieces.append(piece)
            self.finish_reason = piece.finish_reason
            self._tell()

    def _tell(self) -> None:
        """Wake the reader; under the lock."""
        if self._wakes_at_end and self.finish_reason is None:
            return
        self._changed.notify_all()
        if self._notify is not None:
            self._notify()


def with_text(piece: ReplyPiece, text: StreamedText | None) -> ReplyPiece:
    """The next piece of a reply with what its ids add to the reply's `text`; as it is where none is made."""
    if text is None or not piece.ids:
        return piece
    return replace(piece, text=text.add(piece.ids, last=piece.finish_reason is not None)[1])


def joined(pieces: Sequence[ReplyPiece]) -> ReplyPiece:
    """One after the other, the last as it ends."""
    if len(pieces) == 1:
        return pieces[0]
    has_logprobs = any(piece.logprobs is not None for piece in pieces)
    return ReplyPiece(
        ids=tuple(itertools.chain.from_iterable(piece.ids for piece in pieces)),
        text="".join(piece.text for piece in pieces),
        finish_reason=pieces[-1].finish_reason,
        logprobs=tuple(itertools.chain.from_iterable(piece.logprobs or () for piece in pieces))
        if has_logprobs
        else None,
    )
