"""Answering one request for replies: off the loop into the engine, and its pieces to the client, whole or streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from dvi_jax.errors import UserError
from dvi_jax.serve.exchange import CLIENT_LEFT, Exchange
from dvi_jax.serve.preparing import Prepared, Served, prepare_chat, prepare_completion
from dvi_jax.serve.refusals import RefusedError
from dvi_jax.serve.replies import ChatFormat, Choice, CompletionFormat, ReplyFormat, request_metrics, usage
from dvi_jax.serve.requests import Handle, ReplyPiece
from dvi_jax.serve.serving import Serving, cut_off, engine_error
from dvi_jax.serve.streaming import DONE, ClientLeftError, Events, EventStream, unless_left

Give = Callable[[Choice, ReplyPiece], Awaitable[None]]
MOST_DISCARDED = 64 << 20  # bytes of a body too large that are read, so that its sender reads the refusal


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    return await _answer(request, prepare_chat, ChatFormat)


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    return await _answer(request, prepare_completion, CompletionFormat)


async def read_body(request: Request) -> bytes:
    """The body; `RefusedError` for one that is too large, too slow or not declared as JSON."""
    settings = request.app.state.serving.settings
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A web page may send other types to any address without being asked whether it may.
    if kind != "application/json":
        raise RefusedError(415, "the body must be sent as Content-Type: application/json", code="content_type")
    pieces, size = [], 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for piece in request.stream():
                size += len(piece)
                if size <= settings.max_body_bytes:
                    pieces.append(piece)
                elif size > MOST_DISCARDED:
                    break
    except TimeoutError as error:
        message = f"the body did not come within {settings.body_seconds:g} seconds"
        raise RefusedError(408, message, code="timeout", headers={"connection": "close"}) from error
    if size > settings.max_body_bytes:
        raise RefusedError(413, f"the body is larger than {settings.max_body_bytes} bytes", code="body_too_large")
    return b"".join(pieces)


async def _answer(request: Request, prepare: Callable[[bytes, Served], Prepared], kind: type[ReplyFormat]) -> Response:
    serving: Serving = request.app.state.serving
    exchange: Exchange = request.state.exchange
    serving.check_open()
    try:
        content = await read_body(request)
        prepared = await unless_left(request.receive, serving.off_loop(prepare, content))
    except (ClientDisconnect, ClientLeftError):
        exchange.left = True
        return Response(status_code=CLIENT_LEFT)
    handles = await serving.submit(prepared.choices)
    exchange.handles, exchange.stream = handles, prepared.stream
    logprobs = prepared.choices[0].logprobs is not None
    reply = Answer(serving, exchange, prepared, kind(serving.served.name, serving.served.tokenizer, logprobs=logprobs))
    if prepared.stream:
        return EventStream(reply.stream, reply.close, write_seconds=serving.settings.write_seconds)
    left = True
    try:
        content_of_reply = await unless_left(request.receive, reply.whole())
        left = False
    except ClientLeftError:
        return Response(status_code=CLIENT_LEFT)
    finally:
        reply.close(left)
    return JSONResponse(content_of_reply)


class Answer:
    """The replies to one request, from the engine to the client."""

    def __init__(self, serving: Serving, exchange: Exchange, prepared: Prepared, shape: ReplyFormat):
        self._serving, self._exchange, self._prepared, self._shape = serving, exchange, prepared, shape
        self._choices = [Choice(index) for index in range(len(exchange.handles))]

    async def whole(self) -> dict[str, Any]:
        """All at once, at the end."""

        async def keep(choice: Choice, piece: ReplyPiece) -> None:
            pass

        await self._follow_all(keep)
        return self._shape.reply(self._choices, self._about())

    async def stream(self, events: Events) -> None:
        """As it comes; an error on the way is the last event."""
        settings, usual = self._serving.settings, {"usage": None} if self._prepared.include_usage else {}
        alive = asyncio.ensure_future(events.keep_alive(settings.keepalive_seconds))

        async def give(choice: Choice, piece: ReplyPiece) -> None:
            if piece.text or piece.finish_reason or self._shape.logprobs:
                await events.give(self._shape.event([self._shape.part(choice, piece)], usual))

        try:
            for choice in self._choices:
                if (opening := self._shape.opening(choice.index)) is not None:
                    await events.give(self._shape.event([opening], usual))
            await self._follow_all(give)
            if self._prepared.include_usage:
                await events.give(self._shape.event([], self._about()))
            await events.give(DONE)
        except RefusedError as error:
            await events.give(error.body())
        finally:
            alive.cancel()

    def close(self, left: bool) -> None:
        """It is over; `left`: the client left before the end."""
        self._exchange.left = left
        self._exchange.finish_reasons = [choice.finish_reason or "cancelled" for choice in self._choices]
        self._serving.release(self._exchange.handles)

    async def _follow_all(self, give: Give) -> None:
        """Read all replies to their ends, side by side; the first error of any ends them."""
        following = [
            asyncio.ensure_future(self._follow(choice, handle, give))
            for choice, handle in zip(self._choices, self._exchange.handles, strict=True)
        ]
        try:
            await asyncio.gather(*following)
        finally:
            for task in following:
                task.cancel()

    async def _follow(self, choice: Choice, handle: Handle, give: Give) -> None:
        exchange, last = self._exchange, None
        try:
            async for piece in handle.stream():
                now = time.monotonic()
                if piece.ids and exchange.first_text is None:
                    exchange.first_text = now
                if last is not None:
                    self._serving.metrics.saw_piece(piece, now - last)
                last = now
                if piece.finish_reason == "cancelled":  # not by us: nobody would read on
                    raise cut_off()
                choice.add(piece)
                await give(choice, piece)
        except UserError as error:
            choice.finish_reason = "error"
            raise error if isinstance(error, RefusedError) else engine_error(error) from error

    def _about(self) -> dict[str, Any]:
        statistics = [handle.statistics for handle in self._exchange.handles]
        prepared, metrics = self._prepared, request_metrics(statistics)
        counts = usage(prepared.prompt_tokens, prepared.replies, statistics)
        return {"usage": counts} | ({"metrics": metrics} if metrics else {})
