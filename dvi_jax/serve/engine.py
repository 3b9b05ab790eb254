"""An engine: requests come and go while a fixed number of slots decodes, and none notices the others.

Any thread may ask; one thread owns the device (`scheduler.py` is what it does).
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Protocol

import jax

from dvi_jax.decode.batch import check_eos_ids, check_prompts
from dvi_jax.decode.branches import most_branches
from dvi_jax.decode.kernel_loading import load_kernels
from dvi_jax.decode.plan import PLAIN, Plan
from dvi_jax.decode.state import Knobs
from dvi_jax.decode.stream import StreamedText, stop_ids
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import check_batch
from dvi_jax.model.speculative_llama import Params
from dvi_jax.serve.agreement import check_plans
from dvi_jax.serve.ended import Ended, OnEnded, OnWindow, with_windows
from dvi_jax.serve.intake import Intake, chunk_tokens
from dvi_jax.serve.memory import check_engine_memory, engine_memory
from dvi_jax.serve.plans import choose, plans_of
from dvi_jax.serve.programs import Programs
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.requests import EngineStatus, QueueFullError, Request
from dvi_jax.serve.scheduler import Scheduler
from dvi_jax.serve.slots import Shape
from dvi_jax.serve.together import Follower, Leader, join_together, require_alike

POSITIONS = 64  # of a cache are a multiple of this
LOOK = 0.5  # seconds between two looks at whether an idle engine's learner has work

log = logging.getLogger(__name__)


class Learns(Protocol):
    """What learns from an engine's replies. The engine's thread alone calls it."""

    @property
    def branches(self) -> int:
        """How many drafts that were not taken it wants of a reply, at most."""

    def take(self, ended: Ended, request: Request) -> None:
        """A reply that has ended, with its learning signals; quick, as the slots are used up after it."""

    def has_work(self) -> bool:
        """Whether a turn may do anything; quick."""

    def turn(self, status: EngineStatus, *, idle: bool, settle: Callable[[], EngineStatus]) -> Params | None:
        """Between two stretches: a piece of work, and other weights to draft with (`Engine.swap`), if there are any.

        `idle`: no request is there. `settle` waits for the stretch under way and gives the status then; it is called
        before weights may be taken back, for which what was drafted so far counts.
        """


class Engine:
    """Serves requests with a model; `requests.RequestEngine` says what each method promises.

    A reply is a function of its request, of the model and of `slots`, `context`, `chunk`, `together` and the plan's
    width, whatever else is served. Where a round's row class is `any` (`decode/plan.py`), slots and width do not matter
    either.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        slots: int = 8,
        context: int = 2048,
        plan: str = "auto",
        max_waiting: int = 256,
        prefix_bytes: int = 2**30,
        chunk: int | None = None,
        together: int = 1,
        width: int = 1,
        warm_up: bool = False,
        logprobs: int = 0,
        ahead: bool | None = None,
        on_window: OnWindow | None = None,
        learner: Learns | None = None,
    ):
        """Take the memory and start the thread.

        `context`: tokens of a prompt and its reply together, at most the model's. `plan`: as in `DecodeConfig`, or
        `auto`. `max_waiting`: requests that may wait for a slot. `prefix_bytes`: memory for beginnings that prompts
        share. `chunk`: tokens of a prompt that go through at once. `together`: prompts that are taken in side by side,
        which share no beginnings if they are several. `width`: of every plan at least, where bits depend on it, for the
        replies of an engine whose plan is as wide. `warm_up`: compile every program now, so that no request waits for
        one. `logprobs`: alternatives that a request may want the log-probabilities of; 0: none, which needs less
        memory. `ahead`: start a stretch before the last one is read; None: unless the device is the host's CPU.
        `on_window` gets the learning signals of every reply that may be learned from, on the device, as one window of
        as many positions as a slot has; it must be quick. A `learner` gets the replies in its place, and turns between
        stretches. Raises `UserError` for sizes that cannot be, or that memory does not hold, and for a plan that on
        this device has other bits than plain decoding (`agreement.py`).
        """
        _check(model, {"slots": slots, "context": context, "max_waiting": max_waiting, "together": together})
        _check_learning(model, on_window, learner)
        self.model, self.slots, self.max_waiting, self.logprobs = model, slots, max_waiting, logprobs
        self.context = min(context, model.config.context_length)
        self._learner, on_ended = learner, with_windows(on_window) if learner is None else learner.take
        record, (plans, least) = on_ended is not None or logprobs > 0, plans_of(model, plan, slots)
        width, prefix_bytes = max(width, least), prefix_bytes if together == 1 else 0
        chunk = chunk_tokens(model, chunk, self.context)
        room = _rounded_up(max(_rounded_up(self.context, chunk), self.context + width), POSITIONS)
        branches = 0 if learner is None else learner.branches
        shape = Shape(slots, room, width, record, min(branches, max(map(most_branches, plans))), together)
        require_alike(model, shape._asdict() | {"chunk": chunk, "plan": plan})
        self.memory = engine_memory(model, shape, prefix_bytes)
        check_engine_memory(self.memory)
        self._programs = Programs(model, shape, chunk=chunk, prefix_bytes=prefix_bytes)
        self._scheduler = _scheduler(
            model, self._programs, plans, width, ahead=ahead, on_ended=on_ended, most_logprobs=logprobs
        )
        self._changed = threading.Condition()  # its lock is for all that follows, which several threads touch
        self._waiting: deque[Reply] = deque()
        self._swapped: Params | None = None
        self._idle, self._draining, self._closing = True, False, False
        self._failure: str | None = None
        self._crew = join_together(self._lose)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        if not isinstance(self._crew, Follower):
            self._begin(warm_up=warm_up)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def follow(self) -> None:
        """In every process but the first of several: do what the first one's engine does, until it is closed.

        `UserError` if it is lost.
        """
        assert isinstance(self._crew, Follower), "the first process leads"
        self._crew.follow(self._programs)

    def submit(self, request: Request) -> Reply:
        """Queue a request. `UserError` for what cannot be served, `QueueFullError` when too many wait; thread-safe."""
        reply = self._reply_to(request)
        with self._changed:
            if self._failure is not None:
                raise UserError(self._failure)
            if self._draining or self._closing:
                raise UserError("the engine takes no more requests: it is being closed")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(len(self._waiting), max(1.0, self._scheduler.seconds_a_slot))
            self._waiting.append(reply)
            self._changed.notify_all()
        return reply

    def status(self) -> EngineStatus:
        """A snapshot; cheap, thread-safe."""
        with self._changed:
            status, waiting, failure = self._scheduler.status, len(self._waiting), self._failure
        return replace(status, context=self.context, waiting=status.waiting + waiting, failure=failure)

    def swap(self, params: Params) -> None:
        """Draft with a copy of these weights from the next stretch on; no reply changes. Thread-safe.

        `params`: the model's, with another `drafter` or `lora_s`. `UserError` where they are another model's. The first
        time takes the copy's memory, and compiles the copying unless an engine with a learner has warmed up.
        """
        own = self.model.params
        if [id(leaf) for leaf in jax.tree.leaves(params.lora_d)] != [id(leaf) for leaf in jax.tree.leaves(own.lora_d)]:
            raise UserError("an engine's verifier stays as it is: only the drafter and lora_S can be swapped")
        new = self.model.with_params(own._replace(drafter=params.drafter, lora_s=params.lora_s)).decode_params
        old = self.model.decode_params  # of which the base is the same, and has most of the arrays
        if jax.tree.map(_kind, (new.drafter, new.lora_s)) != jax.tree.map(_kind, (old.drafter, old.lora_s)):
            raise UserError("these drafter weights are not of the shapes that the engine was made for")
        if any(leaf.is_deleted() for leaf in jax.tree.leaves((new.drafter, new.lora_s))):
            raise UserError("these drafter weights are no longer there: others were written over them")
        if self._crew is not None:
            raise UserError("several processes draft with the weights they were loaded with")
        with self._changed:
            self._swapped = new

    def drain(self, seconds: float) -> bool:
        """Take nothing new and let what runs finish, for so long at most; whether all finished."""
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: self._closing or self._is_idle(), seconds)
            return self._failure is None and self._is_idle()

    def close(self) -> None:
        """Cancel what runs and end the engine's thread."""
        if isinstance(self._crew, Follower):
            self._crew.close()
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        lost = None if self._crew is None else self._crew.lost
        if threading.current_thread() is not self._thread and lost is None:  # else it may wait for a device for ever
            self._thread.join()
        if self._crew is not None:
            self._crew.close()
        atexit.unregister(self.close)

    def _reply_to(self, request: Request) -> Reply:
        """A reply to come; `UserError` for what cannot be served."""
        prompt, model = request.prompt_ids, self.model
        eos = model.eos_ids if request.eos_ids is None else request.eos_ids
        check_prompts(model, [prompt], 0)
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}")
        if len(prompt) + request.max_new_tokens > self.context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and {request.max_new_tokens} new ones were asked for;"
                f" the engine's context holds {self.context}"
            )
        check_eos_ids(eos)
        if request.sampling is not None and not request.sampling.coupled:
            raise UserError("an engine's sampling is coupled: with rejection, tokens would depend on the drafter")
        if request.logprobs is not None and not self.logprobs:
            raise UserError("this engine gives no log-probabilities")
        if request.logprobs is not None and not 0 <= request.logprobs <= self.logprobs:
            raise UserError(f"logprobs must be between 0 and {self.logprobs}, got {request.logprobs}")
        if not all(request.stop):
            raise UserError("a stop string must not be empty")
        if request.stop:
            model.need_tokenizer("stop strings need a tokenizer, which this checkpoint lacks")
        text = None
        if model.tokenizer is not None:
            text = StreamedText(model.tokenizer, request.stop, stop_ids(model.tokenizer, request.stop, eos))
        return Reply(request, eos, text, self._wake)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _is_idle(self) -> bool:
        return self._idle and not self._waiting

    def _begin(self, *, warm_up: bool) -> None:
        """Where the engine decides: alone, or first of several processes."""
        if isinstance(self._crew, Leader):
            self._programs.tell = self._crew.tell
        if warm_up:
            self._scheduler.warm_up()
        self._thread.start()
        atexit.register(self.close)

    # What the engine's own thread does.

    def _run(self) -> None:
        with ExitStack() as stack:
            stack.push(self._on_exit)
            while self._wait_for_work():
                if self._learner is not None:
                    self._learn(self._learner)
                if self._waiting or self._scheduler.is_busy:
                    self._scheduler.turn(self._next_replies, len(self._waiting))

    def _learn(self, learner: Learns) -> None:
        """The learner's turn."""
        idle = not (self._waiting or self._scheduler.is_busy)
        with self._scheduler.learning():
            params = learner.turn(self._scheduler.status, idle=idle, settle=self._scheduler.settle)
            if params is not None:
                self.swap(params)
                self._take_swapped()

    def _take_swapped(self) -> None:
        """What was swapped in is what the next stretch decodes with."""
        with self._changed:
            swapped, self._swapped = self._swapped, None
        if swapped is not None:  # not under the lock: giving the device programs may take long
            self._programs.draft_with(swapped.drafter, swapped.lora_s)

    def _wait_for_work(self) -> bool:
        """Whether to go on; waits while there is nothing to do."""
        with self._changed:
            cancelled = [reply for reply in self._waiting if reply.cancelled]
            for reply in cancelled:
                self._waiting.remove(reply)
        for reply in cancelled:  # telling a reader takes its own lock, whose holder may wait for this one
            reply.end("cancelled")
        with self._changed:
            while True:
                self._idle = not self._scheduler.is_busy
                if self._closing or not self._is_idle():
                    break
                self._changed.notify_all()  # for who drains
                if self._learner is None:
                    self._changed.wait()
                elif self._draining or not self._learner.has_work():
                    self._changed.wait(LOOK)
                else:
                    break
            goes_on = not self._closing
        self._take_swapped()
        return goes_on

    def _next_replies(self, most: int) -> list[Reply]:
        """Those that go in side by side, now the scheduler's: who has waited longest, and prompts about as long.

        Rows of an intake are done when the longest is.
        """
        with self._changed:
            self._idle = False
            if not self._waiting:
                return []
            first = self._waiting.popleft()
            size = self._scheduler.chunk
            chunks = first.chunks(size)
            others = sorted(self._waiting, key=lambda reply: abs(reply.chunks(size) - chunks))[: most - 1]
            for reply in others:
                self._waiting.remove(reply)
            return [first, *others]

    def _on_exit(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Nobody is left without an answer, however the thread ends."""
        failure = None
        if error is not None and isinstance(self._crew, Leader) and (lost := self._crew.looked_for()):
            self._lose(lost)  # whatever that made of an exchange with it
        elif error is not None:
            message = " ".join(str(error).split())
            failure = f"the engine failed: {type(error).__name__}: {message[:500]}"
            log.error(failure, exc_info=(type(error), error, traceback))
        self._give_up(failure)
        return True

    def _lose(self, what: str) -> None:
        """Another process is gone, and with it devices that this one's thread may be waiting for."""
        self._give_up(what)

    def _give_up(self, failure: str | None) -> None:
        """Answer all that are left, for good."""
        with self._changed:
            self._failure = self._failure or failure
            left = [*self._scheduler.replies(), *self._waiting]
            self._waiting.clear()
            self._closing = True
            self._changed.notify_all()
        for reply in left:  # those that have ended take no notice
            if self._failure is None:
                reply.end("cancelled")
            else:
                reply.fail(self._failure)


def _check(model: LoadedModel, sizes: dict[str, int]) -> None:
    """Raise `UserError` for what no engine can have."""
    if too_few := [name for name, value in sizes.items() if value < 1]:
        raise UserError(f"{too_few[0]} must be at least 1, got {sizes[too_few[0]]}")
    if jax.process_count() > 1 and model.definition.mesh is None:
        raise UserError("an engine of several processes needs a mesh of all their devices")
    check_batch(model.definition.mesh, sizes["slots"], "slots")


def _check_learning(model: LoadedModel, on_window: OnWindow | None, learner: Learns | None) -> None:
    """The same for what is to learn from replies."""
    if jax.process_count() > 1 and (on_window is not None or learner is not None):
        raise UserError("what learns from an engine's replies takes one process")
    if learner is not None and model.definition.mesh is not None:  # its updates come from another thread
        raise UserError("a learner takes one device: several would get rounds and updates in different orders")


def _scheduler(
    model: LoadedModel,
    programs: Programs,
    plans: Sequence[Plan],
    width: int,
    *,
    ahead: bool | None,
    on_ended: OnEnded | None,
    most_logprobs: int,
) -> Scheduler:
    """All slots free, and plans that were timed, and compared with plain decoding, in them."""
    ahead = jax.default_backend() != "cpu" if ahead is None else ahead
    empty, intake = programs.slots, Intake.of(model, programs)
    knobs = Knobs.make(0, 0.0, ())._replace(eos_ids=empty.eos_ids)
    load_kernels(model, empty.decode.replace(sampling=None), knobs, *plans, PLAIN)
    choice, programs.slots = choose(model, plans, width, empty, ahead=ahead)
    check_plans(model, choice.pieces, programs, intake)
    return Scheduler(model, programs, intake, choice, ahead=ahead, on_ended=on_ended, most_logprobs=most_logprobs)


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _kind(leaf: jax.Array) -> tuple[tuple[int, ...], str]:
    return leaf.shape, str(leaf.dtype)
