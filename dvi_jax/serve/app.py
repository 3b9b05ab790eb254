"""The HTTP application: its routes, who may call them, and what all of them do with errors."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.serve.dashboard import dashboard, dashboard_events
from dvi_jax.serve.exchange import CLIENT_LEFT, Exchanges
from dvi_jax.serve.generation import chat_completions, completions, read_body
from dvi_jax.serve.preparing import Served, detokenize, tokenize
from dvi_jax.serve.refusals import RefusedError, show_defect, show_http_error, show_refusal
from dvi_jax.serve.requests import RequestEngine
from dvi_jax.serve.serving import Serving
from dvi_jax.serve.settings import ServerSettings
from dvi_jax.version import __version__

GUARDED = ("/v1/", "/tokenize", "/detokenize")  # paths that ask for the key, where there is one


def create_app(
    engine: RequestEngine,
    tokenizer: Tokenizer | None,
    settings: ServerSettings,
    sections: Mapping[str, Callable[[], Any]] | None = None,
) -> Starlette:
    """The application over a running engine; `sections` add to its status, by name.

    Its `state.serving` is what drains it (`running.py`).
    """
    serving = Serving(engine, tokenizer, settings, sections)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/dvi/status", status),
            Route("/tokenize", tokenize_route, methods=["POST"]),
            Route("/detokenize", detokenize_route, methods=["POST"]),
            Route("/version", show_version),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/dashboard", dashboard),
            Route("/dashboard/events", dashboard_events),
        ],
        middleware=[
            Middleware(Exchanges, ended=serving.ended),
            Middleware(KeyCheck, key=settings.api_key),
        ],
        exception_handlers={RefusedError: show_refusal, HTTPException: show_http_error, Exception: show_defect},
        lifespan=_watched,
    )
    app.state.serving = serving
    return app


@contextlib.asynccontextmanager
async def _watched(app: Starlette) -> AsyncIterator[None]:
    watching = asyncio.ensure_future(app.state.serving.monitor.watch())
    try:
        yield
    finally:
        watching.cancel()


class KeyCheck:
    """ASGI middleware: 401 for guarded paths without the right `Authorization: Bearer` header."""

    def __init__(self, app: ASGIApp, key: str | None):
        self.app, self._wanted = app, None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._wanted is not None and scope["type"] == "http" and scope["path"].startswith(GUARDED):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                refusal = RefusedError(401, "a wrong API key, or none", code="invalid_api_key")
                headers = {"www-authenticate": "Bearer"}
                await JSONResponse(refusal.body(), 401, headers=headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _card(serving: Serving) -> dict[str, Any]:
    served = serving.served
    return {
        "id": served.name,
        "object": "model",
        "created": int(serving.monitor.started),
        "owned_by": "dvi_jax",
        "max_model_len": served.context,
    }


async def models(request: Request) -> Response:
    """GET /v1/models"""
    return JSONResponse({"object": "list", "data": [_card(request.app.state.serving)]})


async def model(request: Request) -> Response:
    """GET /v1/models/NAME"""
    card, name = _card(request.app.state.serving), request.path_params["name"]
    if name != card["id"]:
        raise RefusedError(404, f"the model {name[:100]!r} does not exist here", param="model", code="model_not_found")
    return JSONResponse(card)


async def status(request: Request) -> Response:
    """GET /v1/dvi/status"""
    return JSONResponse(request.app.state.serving.status())


async def tokenize_route(request: Request) -> Response:
    """POST /tokenize"""
    return await _off_loop(request, tokenize)


async def detokenize_route(request: Request) -> Response:
    """POST /detokenize"""
    return await _off_loop(request, detokenize)


async def _off_loop(request: Request, work: Callable[[bytes, Served], dict[str, object]]) -> Response:
    serving: Serving = request.app.state.serving
    serving.check_open()
    try:
        return JSONResponse(await serving.off_loop(work, await read_body(request)))
    except ClientDisconnect:
        request.state.exchange.left = True
        return Response(status_code=CLIENT_LEFT)


async def show_version(request: Request) -> Response:
    """GET /version"""
    return JSONResponse({"version": __version__})


async def health(request: Request) -> Response:
    """GET /health: 200, or 503 with what is wrong."""
    problem = request.app.state.serving.health()
    return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)


async def metrics(request: Request) -> Response:
    """GET /metrics"""
    return Response(request.app.state.serving.metrics.text(), media_type="text/plain; version=0.0.4")
