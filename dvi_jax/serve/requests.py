"""What one asks of an engine, and what comes back: the words that engine, server and batch commands share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from dvi_jax.config import SamplingConfig
from dvi_jax.errors import UserError


class QueueFullError(UserError):
    """As many requests wait as may; `retry_after` is how many seconds from now trying again is sensible."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests are waiting, which is as many as may")
        self.waiting, self.retry_after = waiting, retry_after


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingConfig | None = None  # None is greedy; the seed is in it
    eos_ids: tuple[int, ...] | None = None  # end-of-sequence ids, None for the model's own, () for none
    stop: tuple[str, ...] = ()  # strings that end the reply and are not part of it
    logprobs: int | None = None  # alternatives to give with each token's log-probability, None for no log-probabilities
    learn: bool = True  # whether the drafter may learn from it


@dataclass(frozen=True)
class TokenLogprob:
    """The verifier's log-probability (natural logarithm, temperature 1) of a token of the reply."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # most probable tokens and their log-probabilities, best first


@dataclass(frozen=True)
class ReplyPiece:
    """What is new of a reply."""

    ids: tuple[int, ...]  # new token ids
    text: str  # that they add, "" without a tokenizer
    finish_reason: str | None = None  # "eos", "length", "stop" (a stop string) or "cancelled", on the last piece
    logprobs: tuple[TokenLogprob, ...] | None = None  # one for each id, if asked for


@dataclass
class Statistics:
    """What a request cost; complete once its last piece is there. Times are `time.monotonic` seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken from a shared prefix
    new_tokens: int = 0
    rounds: int = 0  # verifying passes
    drafted: int = 0  # tokens proposed
    accepted: int = 0  # of those, committed
    submitted: float = 0.0
    started: float = 0.0  # a slot was free
    first_token: float = 0.0
    finished: float = 0.0


class Handle(Protocol):
    """A request under way. Its pieces are given once, to one reader."""

    request: Request
    statistics: Statistics

    async def admitted(self) -> None:
        """Once it is in the queue; of an engine in another process, raises what `submit` would."""

    def stream(self) -> AsyncIterator[ReplyPiece]:
        """Pieces as they come. `UserError` if the engine failed."""

    def cancel(self) -> None:
        """End it; the slot is free at the next stretch. May be called from any thread, and twice."""


@dataclass(frozen=True)
class EngineStatus:
    """An engine at a moment, for health checks and metrics. Counters only grow."""

    slots: int
    running: int  # slots in use
    waiting: int  # requests without a slot
    context: int  # tokens, prompt included, that a slot holds
    plan: str  # how rounds draft now
    gain: float | None = None  # tokens a second that drafts should bring, as a share of plain ones; None: not chosen
    stretches: int = 0  # rounds run without looking at the host, so many times
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of those, taken from shared prefixes
    new_tokens: int = 0
    judged: tuple[int, ...] = field(default=())  # drafts judged by the verifier, by their position in the round
    accepted: tuple[int, ...] = field(default=())  # of those, accepted
    rounds: int = 0  # of all slots
    slot_rounds: int = 0  # that the device computed, those of slots without a reply included
    busy_seconds: float = 0.0  # of the engine's thread, while there were requests
    waited_seconds: float = 0.0  # of these, for the device
    handed_seconds: float = 0.0  # of these, giving it programs
    intake_seconds: float = 0.0  # of these, taking prompts in
    learner_seconds: float = 0.0  # of the engine's thread, besides: turns of who learns
    last_stretch: float = 0.0  # when the device last finished one, `time.monotonic` seconds
    failure: str | None = None  # why the engine serves no more, in one line


class RequestEngine(Protocol):
    """What a front end needs of an engine."""

    def submit(self, request: Request) -> Handle:
        """Queue a request. `UserError` for what cannot be served, `QueueFullError` when too many wait."""

    def status(self) -> EngineStatus:
        """A snapshot; cheap, thread-safe."""

    def drain(self, seconds: float) -> bool:
        """Take nothing new and let what runs finish, for so long at most; whether all finished."""

    def close(self) -> None:
        """Cancel what runs and end the engine's thread."""
