"""An engine whose replies are known: it answers with its prompt, backwards, and does what the test says otherwise."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import replace

from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.stream import StreamedText
from dvi_jax.errors import UserError
from dvi_jax.serve.requests import EngineStatus, QueueFullError, ReplyPiece, Request, Statistics, TokenLogprob

PER_STRETCH = 2  # tokens


def reply_ids(request: Request) -> list[int]:
    """The prompt backwards, over and over; the seed, if any, is its first token (of the byte tokenizer)."""
    seed = [] if request.sampling is None else [2 + request.sampling.seed % 26]
    backwards = list(request.prompt_ids[::-1])
    return (seed + backwards * (request.max_new_tokens // len(backwards) + 1))[: request.max_new_tokens]


class ScriptedHandle:
    def __init__(self, request: Request, tokenizer: Tokenizer, engine: ScriptedEngine):
        self.request, self.engine = request, engine
        self.statistics = Statistics(prompt_tokens=len(request.prompt_ids), submitted=time.monotonic())
        self.text = StreamedText(tokenizer, request.stop)
        self.left = reply_ids(request)
        self.pieces: deque[ReplyPiece | UserError] = deque()
        self.cancelled = self.over = False
        self.wake = None

    def put(self, piece: ReplyPiece | UserError) -> None:
        self.over = isinstance(piece, UserError) or piece.finish_reason is not None
        if self.over:
            self.statistics.finished = time.monotonic()
        self.pieces.append(piece)
        if self.wake is not None:
            self.wake()

    async def stream(self):
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self.wake = lambda: loop.call_soon_threadsafe(arrived.set)
        while True:
            arrived.clear()
            while self.pieces:
                piece = self.pieces.popleft()
                if isinstance(piece, UserError):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
            await arrived.wait()

    async def admitted(self):
        pass

    def cancel(self) -> None:
        self.cancelled = True
        with self.engine.changed:
            self.engine.changed.notify_all()

    def step(self) -> None:
        """What a stretch of one round gives."""
        ids, self.left = self.left[:PER_STRETCH], self.left[PER_STRETCH:]
        count, text = self.text.add(ids, last=not self.left)
        reason = "stop" if self.text.stopped else None if self.left else "length"
        ids = tuple(ids[:count])
        logprobs = None
        if self.request.logprobs is not None:
            alternatives = ((65, -1.5), (66, -2.5), (67, -3.5))[: self.request.logprobs]
            logprobs = tuple(TokenLogprob(token, -0.5, alternatives) for token in ids)
        statistics = self.statistics
        statistics.first_token = statistics.first_token or time.monotonic()
        statistics.new_tokens += len(ids)
        statistics.rounds += 1
        statistics.drafted += 3
        statistics.accepted += PER_STRETCH - 1
        self.put(ReplyPiece(ids, text, reason, logprobs))


class ScriptedEngine:
    """`RequestEngine` without a device. Test controls: `pause` and `go`, `failure`, `pace` seconds a stretch."""

    def __init__(self, tokenizer: Tokenizer, *, slots: int = 4, context: int = 512, max_waiting: int = 8):
        self.tokenizer, self.slots, self.context, self.max_waiting = tokenizer, slots, context, max_waiting
        self.changed = threading.Condition()
        self.running: list[ScriptedHandle] = []
        self.waiting: deque[ScriptedHandle] = deque()
        self.handles: list[ScriptedHandle] = []  # of all requests so far
        self.paused = self.draining = self.closed = False
        self.pace = 0.0
        self.counts = EngineStatus(slots, 0, 0, context, "chain:3", judged=(0, 0, 0), accepted=(0, 0, 0))
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> ScriptedHandle:
        with self.changed:
            if self.draining or self.closed or self.counts.failure:
                raise UserError("the engine takes nothing new")
            if request.logprobs == 20:
                raise UserError("this engine gives at most 19 alternatives")
            if len(self.waiting) >= self.max_waiting:
                raise QueueFullError(len(self.waiting), 2.5)
            handle = ScriptedHandle(request, self.tokenizer, self)
            self.handles.append(handle)
            self.waiting.append(handle)
            self.changed.notify_all()
            return handle

    def status(self) -> EngineStatus:
        with self.changed:
            return replace(self.counts, running=len(self.running), waiting=len(self.waiting))

    def drain(self, seconds: float) -> bool:
        with self.changed:
            self.draining = True
            return self.changed.wait_for(lambda: not self.running and not self.waiting, seconds)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()

    def pause(self) -> None:
        self.paused = True

    def go(self) -> None:
        with self.changed:
            self.paused = False
            self.changed.notify_all()

    def fail(self, message: str) -> None:
        with self.changed:
            self.counts = replace(self.counts, failure=message)
            self.changed.notify_all()

    def work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(self.has_work)
                if self.closed or self.counts.failure:
                    self.end_all()
                    if self.closed:
                        return
                    continue
                self.stretch()
                self.changed.notify_all()
            time.sleep(self.pace)

    def has_work(self) -> bool:
        everything = [*self.running, *self.waiting]
        cancelled = any(handle.cancelled for handle in everything)
        return self.closed or cancelled or (bool(everything) and (not self.paused or bool(self.counts.failure)))

    def end_all(self) -> None:
        for handle in [*self.running, *self.waiting]:
            failure = self.counts.failure
            handle.put(UserError(failure) if failure else ReplyPiece((), "", "cancelled"))
        self.running, self.waiting = [], deque()

    def stretch(self) -> None:
        for handle in [*self.running, *self.waiting]:
            if handle.cancelled:
                handle.put(ReplyPiece((), "", "cancelled"))
        self.running = [handle for handle in self.running if not handle.over]
        self.waiting = deque(handle for handle in self.waiting if not handle.over)
        if self.paused:
            return
        counts = self.counts
        while self.waiting and len(self.running) < self.slots:
            handle = self.waiting.popleft()
            handle.statistics.started = time.monotonic()
            counts = replace(counts, prompt_tokens=counts.prompt_tokens + len(handle.request.prompt_ids))
            self.running.append(handle)
        before = sum(handle.statistics.new_tokens for handle in self.running)
        for handle in self.running:
            handle.step()
        rounds = len(self.running)
        self.counts = replace(
            counts,
            stretches=counts.stretches + 1,
            rounds=counts.rounds + rounds,
            new_tokens=counts.new_tokens + sum(handle.statistics.new_tokens for handle in self.running) - before,
            judged=(counts.judged[0] + rounds, counts.judged[1] + rounds, counts.judged[2]),
            accepted=(counts.accepted[0] + rounds, *counts.accepted[1:]),
            last_stretch=time.monotonic(),
        )
        self.running = [handle for handle in self.running if not handle.over]
