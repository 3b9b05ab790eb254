"""What the routes share: the engine, the model's name and tokenizer, what is open and what may still come in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError
from dvi_jax.serve.exchange import Exchange
from dvi_jax.serve.logs import say
from dvi_jax.serve.metrics import Metrics
from dvi_jax.serve.monitor import Monitor, described
from dvi_jax.serve.preparing import Served, as_refusal
from dvi_jax.serve.refusals import RefusedError, busy, failed
from dvi_jax.serve.requests import Handle, QueueFullError, Request, RequestEngine
from dvi_jax.serve.settings import ServerSettings

Result = TypeVar("Result")
THREADS = 4  # that parse and tokenise
MOST_PREPARING = 64  # requests whose bodies are held at once
QUIET = ("/health", "/metrics", "/dashboard", "/dashboard/events", "/v1/dvi/status")  # paths that are polled


class Serving:
    """The state of a server. All of it is used by the event loop alone, the engine apart."""

    def __init__(
        self,
        engine: RequestEngine,
        tokenizer: Tokenizer | None,
        settings: ServerSettings,
        sections: Mapping[str, Callable[[], Any]] | None = None,
    ):
        """`sections`: what other parts add to the status, by name."""
        self.engine, self.settings, self.sections = engine, settings, dict(sections or {})
        status = engine.status()
        self.served = Served(settings.model_name, tokenizer, status.context, settings.max_choices)
        self.monitor = Monitor(engine.status, settings.stuck_seconds)
        self.metrics = Metrics(settings.model_name, engine.status, self.monitor)
        self.draining = False  # nothing new is taken
        self.closing = False  # what is still open should end
        self.viewers = 0  # open dashboards
        self._preparing = 0
        self.open_replies = 0  # replies that are generated or sent
        # A reply that its client reads slowly lives on without a slot, so there may be more than the engine holds.
        self._most_open = 2 * (status.slots + settings.max_queued)
        self._limiter = anyio.CapacityLimiter(THREADS)

    def check_open(self) -> None:
        """Raise `RefusedError` when nothing new is taken."""
        self._check_serving()
        if self._preparing >= MOST_PREPARING or self.open_replies >= self._most_open:
            raise busy("the server is busy: too many requests are open", 1, "queue_full")

    async def off_loop(self, work: Callable[[bytes, Served], Result], content: bytes) -> Result:
        """`work` on a body in a thread; raises `RefusedError` for whatever it says of the request."""
        self._preparing += 1
        try:
            async with asyncio.timeout(self.settings.prepare_seconds):
                # A thread that is given up ends on its own, and counts against the limit until then.
                return await anyio.to_thread.run_sync(
                    work, content, self.served, abandon_on_cancel=True, limiter=self._limiter
                )
        except TimeoutError as error:
            raise busy("the server is busy: the body could not be read in time", 5, "busy") from error
        except UserError as error:
            raise as_refusal(error) from error
        finally:
            self._preparing -= 1

    async def submit(self, requests: Sequence[Request]) -> list[Handle]:
        """Queue all of them or none; `RefusedError` says why not. To be given back by `release`."""
        try:
            return await self._queue(requests)
        except QueueFullError as error:
            raise busy(str(error), error.retry_after, "queue_full") from error
        except UserError as error:
            self._check_serving()  # the engine may have been told to drain, or have failed, in between
            raise as_refusal(error) from error

    def release(self, handles: Sequence[Handle]) -> None:
        """They are answered, or nobody waits for them any more."""
        for handle in handles:
            handle.cancel()
        self.open_replies -= len(handles)

    def ended(self, exchange: Exchange) -> None:
        """A request is over: one line in the log, and the metrics."""
        self.metrics.ended(exchange)
        if exchange.path not in QUIET:
            say("request", **exchange.line())

    def health(self) -> str | None:
        """What is wrong, None if requests are served."""
        if failure := self.engine.status().failure:
            return f"the engine failed: {failure}"
        if (seconds := self.monitor.stuck_for()) is not None:
            return f"the device loop is stuck: nothing went on for {seconds:.0f} seconds"
        return "the server is shutting down" if self.draining else None

    def status(self) -> dict[str, Any]:
        """`/v1/dvi/status`."""
        return {
            "model": self.served.name,
            "started": self.monitor.started,
            "health": self.health() or "ok",
            "alarm": self.monitor.alarm,
            "engine": described(self.engine.status()),
            "recent": self.monitor.recent(),
            **{name: section() for name, section in self.sections.items()},
        }

    def _check_serving(self) -> None:
        if self.draining:
            raise busy("the server is shutting down", self.settings.drain_seconds, "draining")
        if failure := self.engine.status().failure:
            raise failed(f"the engine failed: {failure}")

    async def _queue(self, requests: Sequence[Request]) -> list[Handle]:
        """All of them admitted, and open from the start: many may be waiting for an engine in another process."""
        handles: list[Handle] = []
        self.open_replies += len(requests)
        try:
            for request in requests:
                handles.append(self.engine.submit(request))
            for handle in handles:
                await handle.admitted()
        except BaseException:
            self.open_replies -= len(requests)
            for handle in handles:
                handle.cancel()
            raise
        return handles


def engine_error(error: UserError) -> RefusedError:
    """500 for a reply that the engine could not finish."""
    return failed(f"the engine failed: {error}")


def cut_off() -> RefusedError:
    """503 for a reply that the server's end cut off."""
    return busy("the server is shutting down: the reply was cut off", 1, "cut_off")
