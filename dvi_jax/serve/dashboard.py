"""`/dashboard`: one page that shows the server live, and the events that feed it."""

from __future__ import annotations

import asyncio
import itertools
from functools import cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dvi_jax.serve.monitor import Sample, rates
from dvi_jax.serve.refusals import busy
from dvi_jax.serve.serving import Serving
from dvi_jax.serve.streaming import Events, EventStream

PAGE = Path(__file__).with_name("dashboard.html")
STEP = 5  # seconds that a point of the charts is the mean of
# The page is all there is: it loads nothing, from here or elsewhere, and talks to this server alone.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


@cache
def page() -> bytes:
    """The page, as it lies beside this file."""
    return PAGE.read_bytes()


async def dashboard(request: Request) -> Response:
    """GET /dashboard"""
    headers = {"content-security-policy": POLICY, "x-frame-options": "DENY", "cache-control": "no-cache"}
    return Response(page(), media_type="text/html; charset=utf-8", headers=headers)


async def dashboard_events(request: Request) -> Response:
    """GET /dashboard/events: first the last ten minutes, then the status once a second."""
    serving: Serving = request.app.state.serving
    if serving.viewers >= serving.settings.max_viewers:
        raise busy(f"{serving.viewers} dashboards are open, which is as many as may", 10, "viewers")
    serving.viewers += 1

    async def produce(events: Events) -> None:
        await events.give({"history": history(list(serving.monitor.samples))})
        while not serving.closing:
            samples = serving.monitor.samples
            first = samples[max(len(samples) - 1 - STEP, 0)]
            await events.give(serving.status() | {"point": point(first, samples[-1])})
            await asyncio.sleep(1)

    def close(left: bool) -> None:
        serving.viewers -= 1

    return EventStream(produce, close, write_seconds=serving.settings.write_seconds)


def history(samples: list[Sample]) -> list[dict[str, Any]]:
    """One point for every `STEP` seconds."""
    kept = samples[::-1][::STEP][::-1]
    return [point(first, last) for first, last in itertools.pairwise(kept)]


def point(first: Sample, last: Sample) -> dict[str, Any]:
    """What the charts show of the time between two samples."""
    now, moved = last.status, rates(first, last)
    return {
        "time": last.time,
        "running": now.running,
        "waiting": now.waiting,
        "tokens_per_second": moved["tokens_per_second"],
        "tokens_per_round": moved["tokens_per_round"],
        "accept_rate": moved["accept_rate"],
    }
