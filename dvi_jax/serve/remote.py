"""An engine in another process, as the HTTP side of a server has it: `desk.py` answers there.

Everything here belongs to one event loop, but for the threads that read and write the link and drain the engine. Text
is made here, so that it costs the engine's process nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.stream import StreamedText
from dvi_jax.errors import UserError
from dvi_jax.serve.link import Link
from dvi_jax.serve.reply import joined, with_text
from dvi_jax.serve.requests import EngineStatus, QueueFullError, ReplyPiece, Request, Statistics

LOST = "its process has ended"
SILENT_SECONDS = 30.0  # without a word of the other process, which tells its status several times a second
CLOSE_SECONDS = 60.0  # that an engine may take to end

log = logging.getLogger(__name__)


class RemoteReply:
    """A request under way in the other process (`requests.Handle`)."""

    def __init__(self, engine: RemoteEngine, number: int, request: Request):
        self.request, self.statistics = request, Statistics(prompt_tokens=len(request.prompt_ids))
        self._engine, self._number = engine, number
        # With stop strings the other process knows the text, since it must.
        self._text = None if engine.tokenizer is None or request.stop else StreamedText(engine.tokenizer)
        self._pieces: list[ReplyPiece] = []
        self._failure: Exception | None = None
        self._is_admitted = self._is_over = False
        self._arrived = asyncio.Event()  # something is new of it

    async def admitted(self) -> None:
        """Once it is in the queue; raises what `submit` of an engine in this process would."""
        while not (self._is_admitted or self._failure):
            await self._next()
        if self._failure is not None:
            raise self._failure

    async def stream(self) -> AsyncIterator[ReplyPiece]:
        """What has come since the last piece, again and again, up to the finish reason. Leaving early cancels."""
        try:
            while True:
                if self._pieces:
                    piece = joined(self._pieces)
                    self._pieces = []
                    yield with_text(piece, self._text)
                    if piece.finish_reason is not None:
                        return
                elif self._failure is not None:
                    raise self._failure
                else:
                    await self._next()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End it; the slot is free at the next stretch."""
        if not self._is_over:
            self._engine.post("cancel", self._number)

    def admit(self) -> None:
        """It is in the queue."""
        self._is_admitted = True
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """Nothing more comes; a defect of ours is no `UserError`."""
        if not self._is_over:
            self._failure, self._is_over = error, True
            self._arrived.set()

    def take(self, piece: ReplyPiece, statistics: tuple[Any, ...]) -> None:
        """What is new of it."""
        self.statistics = Statistics(*statistics)
        if piece.ids or piece.text or piece.finish_reason is not None:
            self._pieces.append(piece)
            self._is_over = piece.finish_reason is not None
            self._arrived.set()

    async def _next(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()


class RemoteEngine:
    """A `RequestEngine` at the other end of a link."""

    def __init__(self, link: Link, tokenizer: Tokenizer | None, status: EngineStatus, sections: dict[str, Any]):
        """`status`, `sections`: as of the moment, as `Desk.state` has them."""
        self.tokenizer, self.sections = tokenizer, sections
        self._link, self._status, self._heard = link, status, time.monotonic()
        self._numbers, self._replies = itertools.count(), dict[int, RemoteReply]()
        self._loop: asyncio.AbstractEventLoop | None = None  # of who submits
        self._drained: queue.Queue[bool] = queue.Queue()
        self._closed = threading.Event()
        self._posted: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def submit(self, request: Request) -> RemoteReply:
        """Ask for it; whether it is admitted, `RemoteReply.admitted` says. In an event loop, always the same one."""
        self._loop = asyncio.get_running_loop()
        number = next(self._numbers)
        reply = RemoteReply(self, number, request)
        if self.is_lost:
            reply.fail(UserError(LOST))
        else:
            self._replies[number] = reply
            self.post("submit", number, request)
        return reply

    def status(self) -> EngineStatus:
        """As it was a quarter of a second ago at the latest; failed for as long as nothing is heard of it."""
        silent = time.monotonic() - self._heard
        if self._status.failure is None and silent > SILENT_SECONDS:
            return replace(self._status, failure=f"its process has said nothing for {silent:.0f} seconds")
        return self._status

    def drain(self, seconds: float) -> bool:
        """Take nothing new and let what runs finish, for so long at most; whether all finished."""
        self.post("drain", seconds)
        return not self.is_lost and self._drained.get()

    def close(self) -> None:
        """Cancel what runs and end the engine's thread; wait for it."""
        self.post("close")
        self._closed.wait(CLOSE_SECONDS)
        self._posted.put(None)

    @property
    def failure(self) -> str | None:
        """Why it serves no more, for good: as it has said, or `LOST`. Silence may end."""
        return self._status.failure

    @property
    def is_lost(self) -> bool:
        """Whether there is no such process any more."""
        return self.failure == LOST

    def post(self, *message: Any) -> None:
        """Have it sent; nobody waits."""
        self._posted.put(message)

    def _write(self) -> None:
        while (message := self._posted.get()) is not None:
            try:
                self._link.send(*message)
            except Exception as error:  # it does not pickle, which only a request can do
                self._in_loop(self._fail, message[1], error)

    def _read(self) -> None:
        try:
            while (message := self._link.receive()) is not None:
                self._heard = time.monotonic()
                self._hear(*message)
        except Exception:
            log.exception("what the engine's process says is not understood")
        finally:
            self._status = replace(self._status, failure=LOST, running=0, waiting=0)
            self._drained.put(False)
            self._closed.set()
            self._in_loop(self._fail_all)

    def _hear(self, about: str, *given: Any) -> None:
        """What the other process says, in the thread that reads."""
        match about, given:
            case "pieces", (found, status):
                self._status = status
                self._in_loop(self._give, found)
            case "admitted", (number, status):
                self._status = status
                self._in_loop(self._admit, number)
            case "refused", (number, message, full, status):
                self._status = status
                error = UserError(message) if full is None else QueueFullError(*full)
                self._in_loop(self._fail, number, error)
            case "broken", (number, what):
                self._in_loop(self._fail, number, RuntimeError(f"in the engine's process, whose log has more: {what}"))
            case "status", (status, sections):
                self._status, self.sections = status, self.sections | sections
            case "drained", (finished,):
                self._drained.put(finished)
            case "closed", ():
                self._closed.set()
            case _:
                raise ValueError(f"nobody knows what {about!r} means")

    def _in_loop(self, work: Any, *given: Any) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed: nobody reads
                self._loop.call_soon_threadsafe(work, *given)

    def _give(self, found: list[tuple[Any, ...]]) -> None:
        """What is new of replies, as `Desk` packs it."""
        for number, ids, text, reason, logprobs, failure, statistics in found:
            reply = self._replies[number]
            reply.take(ReplyPiece(ids, text, reason, logprobs), statistics)
            if failure is not None:
                reply.fail(UserError(failure))
            if failure is not None or reason is not None:
                del self._replies[number]

    def _admit(self, number: int) -> None:
        self._replies[number].admit()

    def _fail(self, number: int, error: Exception) -> None:
        self._replies.pop(number).fail(error)

    def _fail_all(self) -> None:
        for number in list(self._replies):
            self._fail(number, UserError(LOST))
