"""The engine's side of a server: what its HTTP process asks for, and what the engine gives, told once a turn.

HTTP has a process of its own, since it would else keep Python from the engine's thread, which needs it thousands of
times a second. That process is `remote.py`; what the two say to each other is the `match` below and the one there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, Protocol

from dvi_jax.errors import UserError, one_line
from dvi_jax.serve.link import Link
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.requests import EngineStatus, QueueFullError, ReplyPiece, Request, RequestEngine
from dvi_jax.serve.waking import when_all_is_given

STATUS_SECONDS = 0.25  # between two looks at the engine while nothing else is told

log = logging.getLogger(__name__)


class ToldEngine(RequestEngine, Protocol):
    """One whose replies tell when there is more of them."""

    def submit(self, request: Request) -> Reply:
        """As of every engine; of any thread."""


class Desk:
    """Serves one HTTP process at the other end of `link`."""

    def __init__(self, engine: ToldEngine, link: Link, sections: Mapping[str, Callable[[], Any]] | None = None):
        """`sections`: what is told with the engine's status, by name; each must pickle."""
        self._engine, self._link, self._sections = engine, link, dict(sections or {})
        self._replies: dict[int, Reply] = {}  # by the numbers that the other process gave them
        self._lock = threading.Lock()
        self._due: dict[int, None] = {}  # replies of which there is more
        self._asked, self._closed = threading.Event(), threading.Event()

    def serve(self) -> None:
        """Until the other process is gone; replies that it asked for are cancelled then.

        Raises what is wrong here, in whichever thread: nobody would hear of replies any more.
        """
        with ThreadPoolExecutor() as threads:
            telling = [threads.submit(self._or_end, work) for work in (self._give, self._tell_status)]
            try:
                while (message := self._link.receive()) is not None:
                    self._do(*message)
            finally:
                self._closed.set()
                self._asked.set()
                for reply in list(self._replies.values()):
                    reply.cancel()
        for each in telling:
            each.result()

    def ask(self) -> None:
        """Have what is due told: the engine's thread has given all that a stretch brought."""
        self._asked.set()

    def state(self) -> tuple[EngineStatus, dict[str, Any]]:
        """Of the engine, and of what else there is."""
        return self._engine.status(), {name: section() for name, section in self._sections.items()}

    def _do(self, about: str, *given: Any) -> None:
        """What the other process wants."""
        match about, given:
            case "submit", (number, request):
                self._submit(number, request)
            case "cancel", (number,):
                if (reply := self._replies.get(number)) is not None:
                    reply.cancel()
            case "drain", (seconds,):  # while requests are still read, and cancelled
                threading.Thread(target=self._drain, args=(seconds,), daemon=True).start()
            case "close", ():
                self._engine.close()
                self._link.send("closed")
            case _:
                raise ValueError(f"nobody knows what to do with {about!r}")

    def _submit(self, number: int, request: Request) -> None:
        try:
            reply = self._engine.submit(request)
        except UserError as error:
            full = (error.waiting, error.retry_after) if isinstance(error, QueueFullError) else None
            self._link.send("refused", number, str(error), full, self._engine.status())
            return
        except Exception as error:  # a defect of ours, which is to cost nobody else anything
            log.exception("the engine's process failed on a request")
            self._link.send("broken", number, one_line(f"{type(error).__name__}: {error}"))
            return
        self._replies[number] = reply
        self._link.send("admitted", number, self._engine.status())
        reply.tell(partial(self._has_more, number))

    def _drain(self, seconds: float) -> None:
        self._link.send("drained", self._engine.drain(seconds))

    def _or_end(self, work: Callable[[], None]) -> None:
        """Do it; the link ends with it, and so does `serve`."""
        with closing(self._link):
            work()

    def _has_more(self, number: int) -> None:
        with self._lock:
            self._due[number] = None
        when_all_is_given(self)

    def _give(self) -> None:
        """What is new of all replies, in one message each time that the engine's thread asks for it."""
        while not self._closed.is_set():
            self._asked.wait()
            self._asked.clear()
            with self._lock:
                due, self._due = self._due, {}
            pieces = (self._piece(number) for number in due if number in self._replies)
            if found := [piece for piece in pieces if piece is not None]:
                self._link.send("pieces", found, self._engine.status())

    def _piece(self, number: int) -> tuple[Any, ...] | None:
        """Number, ids, text that the engine knew, finish reason, log-probabilities, failure, statistics; or nothing."""
        reply, piece, failure = self._replies[number], None, None
        try:
            piece = reply.taken()
            if piece is not None and reply.finish_reason == "failed":  # of which nobody will be told again
                reply.taken()
        except UserError as error:
            failure = str(error)
        except Exception as error:  # a defect of ours, as in `_submit`
            log.exception("the engine's process failed on a reply")
            failure = one_line(f"{type(error).__name__}: {error}")
        if piece is None and failure is None:
            return None
        piece = piece or ReplyPiece((), "")
        if failure is not None or piece.finish_reason is not None:
            del self._replies[number]
        parts = piece.ids, piece.text, piece.finish_reason, piece.logprobs
        return number, *parts, failure, tuple(vars(reply.statistics).values())

    def _tell_status(self) -> None:
        is_logged = False
        while not self._closed.wait(STATUS_SECONDS):
            try:
                self._link.send("status", *self.state())
            except Exception:  # of a section: all of them stay as they were told
                if not is_logged:
                    log.exception("a part of the status cannot be told")
                is_logged = True
                self._link.send("status", self._engine.status(), {})
