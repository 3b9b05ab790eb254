"""One request and what became of it: its id, its log line, its part in the metrics."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dvi_jax.serve.requests import Handle

CLIENT_ID = re.compile(r"[\w.-]{1,64}")
CLIENT_LEFT = 499  # what proxies log for a client who left before the answer


@dataclass
class Exchange:
    """A request while it is answered. Times are `time.monotonic` seconds; no text is kept."""

    id: str  # the client's own X-Request-Id, or a new one; sent back
    method: str
    path: str
    arrived: float = field(default_factory=time.monotonic)
    status: int | None = None  # of the answer, None before there is one
    first_text: float | None = None  # when the first piece of a reply was there
    ended: float = 0.0
    stream: bool = False
    left: bool = False  # the client did, before the end
    handles: list[Handle] = field(default_factory=list)  # the engine's, one for each reply
    finish_reasons: list[str] = field(default_factory=list)  # in OpenAI's words, or "error"

    def line(self) -> dict[str, Any]:
        """What the log says of it."""
        about: dict[str, Any] = {
            "id": self.id,
            "method": self.method,
            "path": self.path[:100],
            "status": self.status,
            "seconds": round(self.ended - self.arrived, 4),
        }
        statistics = [handle.statistics for handle in self.handles]
        if not statistics:
            return about
        names = ("prompt_tokens", "cached_tokens", "new_tokens", "rounds", "drafted", "accepted")
        about |= {name: sum(getattr(each, name) for each in statistics) for name in names}
        if self.first_text is not None:
            about["first_text_seconds"] = round(self.first_text - self.arrived, 4)
        queued = [each.started - each.submitted for each in statistics if each.started]
        if queued:
            about["queue_seconds"] = round(max(queued), 4)
        return about | {"stream": self.stream, "finish_reasons": self.finish_reasons, "left": self.left}


class Exchanges:
    """ASGI middleware that makes an `Exchange` of every request and hands it to `ended` at its end.

    Handlers find it as `request.state.exchange`.
    """

    def __init__(self, app: ASGIApp, ended: Callable[[Exchange], None]):
        self.app, self.ended = app, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if CLIENT_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        exchange = Exchange(name, scope["method"], scope["path"])
        scope.setdefault("state", {})["exchange"] = exchange

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = exchange.id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            exchange.ended = time.monotonic()
            # The answer to a defect is made outside of here.
            exchange.status = exchange.status or 500
            self.ended(exchange)
