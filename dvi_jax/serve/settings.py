"""What the server is told at its start, and the limits that bound what any client can take."""

from __future__ import annotations

from dataclasses import dataclass

from dvi_jax.settings import require


@dataclass(frozen=True)
class ServerSettings:
    """How the server answers; what its engine is made of is the engine's affair."""

    model_name: str  # as clients name the model
    host: str = "127.0.0.1"  # address to listen at
    port: int = 8000  # 0: any free one
    api_key: str | None = None  # that `/v1` asks for; None: open to whoever reaches it
    max_queued: int = 256  # requests that may wait for a slot
    drain_seconds: float = 30.0  # how long running replies may take after SIGTERM
    max_body_bytes: int = 2 << 20  # of a request
    body_seconds: float = 30.0  # within which a request's body must have come
    prepare_seconds: float = 30.0  # that a body may wait for a thread to read it, and be read
    write_seconds: float = 60.0  # after so long without taking anything, a reader is taken to have left
    keepalive_seconds: float = 15.0  # between signs of life while a streamed reply has nothing to say
    stuck_seconds: float = 120.0  # without progress while requests are there: the device is taken to be stuck
    max_choices: int = 64  # replies that one request may ask for
    max_viewers: int = 32  # dashboards that may be open at once

    def __post_init__(self) -> None:
        require(bool(self.model_name), "--model-name", self.model_name, "a name")
        require(0 <= self.port < 2**16, "--port", self.port, "between 0 (any free one) and 65535")
        require(self.max_queued >= 1, "--max-queued", self.max_queued, "at least 1")
        require(self.drain_seconds >= 0, "--drain-seconds", self.drain_seconds, "0 or above")
        require(self.api_key != "", "--api-key", self.api_key, "a key, or left out")
