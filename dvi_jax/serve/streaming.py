"""Server-sent events to one client, and noticing that it left."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")
DONE = "[DONE]"  # the last event of a stream that ended well
ALIVE = b": \n\n"  # a comment, which clients skip
HEADERS = {"content-type": "text/event-stream", "cache-control": "no-store", "x-accel-buffering": "no"}


class ClientLeftError(Exception):
    """The client closed its connection, or takes nothing any more."""


async def unless_left(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` gives; it is cancelled, and `ClientLeftError` raised, as soon as the connection is closed.

    `receive` is ASGI's, after the request's body was read: all that it gives then is the disconnection.
    """

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeftError
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class Events:
    """The open stream of one client."""

    def __init__(self, send: Send, write_seconds: float):
        self._send, self._write_seconds = send, write_seconds

    async def give(self, event: dict[str, Any] | str) -> None:
        """Send one event. Waits while the client does not read; `ClientLeftError` if that takes too long."""
        text = event if isinstance(event, str) else json.dumps(event, separators=(",", ":"))
        await self._write(f"data: {text}\n\n".encode())

    async def keep_alive(self, seconds: float) -> None:
        """Every so many seconds say that the connection is still there, until nobody reads any more."""
        with contextlib.suppress(ClientLeftError):
            while True:
                await asyncio.sleep(seconds)
                await self._write(ALIVE)

    async def _write(self, content: bytes) -> None:
        try:
            async with asyncio.timeout(self._write_seconds):
                await self._send({"type": "http.response.body", "body": content, "more_body": True})
        except TimeoutError as error:
            raise ClientLeftError from error


class EventStream(Response):
    """A response of events, which `produce` gives until it returns; cancelled when the client leaves.

    Nothing is buffered here beyond what the connection holds: a client who reads slowly holds `produce` up. However it
    ends, `close` is called, with whether the client left before the end.
    """

    def __init__(
        self, produce: Callable[[Events], Awaitable[None]], close: Callable[[bool], None], *, write_seconds: float
    ):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._produce, self._close, self._write_seconds = produce, close, write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def all_events() -> None:
            await self._produce(Events(send, self._write_seconds))

        left = True
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await unless_left(receive, all_events())
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            left = False
        except ClientLeftError:
            pass
        finally:
            self._close(left)
