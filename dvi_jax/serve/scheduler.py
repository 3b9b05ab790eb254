"""What an engine's thread does in a turn: which request goes into which slot, and when rounds run.

A turn takes in a chunk or so of prompts, lays finished ones into free slots, runs a stretch of rounds and reads what it
did. Where a stretch is started ahead, it is the one before it that is read: the device has work while the host handles
tokens and prompts, and a slot whose reply has ended is free one stretch later. Unless it must end with the stretch
under way: then whoever comes next is laid behind that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np

from dvi_jax.config import SamplingConfig
from dvi_jax.loading import LoadedModel
from dvi_jax.serve.counting import counted
from dvi_jax.serve.ended import OnEnded
from dvi_jax.serve.intake import Intake
from dvi_jax.serve.pace import FEWEST, DeviceTime, Pace
from dvi_jax.serve.plans import PlanChoice
from dvi_jax.serve.programs import Programs
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.requests import EngineStatus, Request, TokenLogprob
from dvi_jax.serve.slots import MOST_ROUNDS, Outcome, Terms, columns_of
from dvi_jax.serve.stretch import RoundsOfUse, Stretch
from dvi_jax.serve.waking import held_back

GREEDY = SamplingConfig(temperature=0.0)
EARLY_TOKENS = 64  # of a reply: its beginning

_Logprobs = tuple[TokenLogprob, ...] | None  # of new tokens, if they are asked for
_Laid = tuple[list[tuple[int, int, Reply]], jax.Array]  # row of what `lay` gave, slot and reply of each; what it gave


class Scheduler:
    """Slots, what is in them, and the prompt on its way into one. For one thread; `status` may be read by any."""

    def __init__(
        self,
        model: LoadedModel,
        programs: Programs,
        intake: Intake,
        choice: PlanChoice,
        *,
        on_ended: OnEnded | None,
        most_logprobs: int,
        ahead: bool = False,
    ):
        """Where slots keep learning signals, `on_ended` gets those of replies that have ended.

        `most_logprobs`: alternatives that a request may want the log-probabilities of.
        `ahead`: a stretch is started before the one before it is read.
        """
        self._vocab_size = model.config.vocab_size
        self._programs, self._intake, self._choice = programs, intake, choice
        self._on_ended, self._most_logprobs = on_ended, most_logprobs
        count = len(programs.slots.eos_ids)
        self._replies: list[Reply | None] = [None] * count
        self._ended = np.zeros(count, bool)  # slots whose sequence must go no further, though the device would
        self._leaving: list[Reply] = []  # that end with the stretch under way, whose slots are others' behind it
        self._ahead, self._pace = ahead, Pace(MOST_ROUNDS, ahead=ahead)
        self._pending: Stretch | None = None  # started and not read
        self._rounds_of_use = RoundsOfUse(choice)
        self._device, self._device_before = DeviceTime(), 0.0  # and what it came to when a stretch was last read
        self._slot_seconds = 1.0  # of a request, lately
        self.status = EngineStatus(count, running=0, waiting=0, context=0, plan=str(choice.plan), gain=choice.gain)

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that go through at once."""
        return self._intake.chunk

    @property
    def seconds_a_slot(self) -> float:
        """How often, lately, a slot became free while all were in use: every so many seconds."""
        return self._slot_seconds / len(self._replies)

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do."""
        return any(True for _ in self.replies())

    def replies(self) -> Iterator[Reply]:
        """All under way."""
        # In the order in which they move on, so that a thread that looks meanwhile misses none.
        yield from self._intake.replies
        yield from (reply for reply in self._replies if reply is not None)
        yield from self._leaving

    def warm_up(self) -> None:
        """Compile every program, by running it with nothing in the slots."""
        if self._on_ended is not None:  # without a token, so that nothing can be learned from it
            self._on_ended(self._programs.ended(0, 0, 0), Request((), 0))
            self._programs.draft_with(self._programs.params.drafter, self._programs.params.lora_s)  # as after a swap
        rows = self._intake.rows
        done = Terms.joined([Terms.of(1, 1, (), GREEDY, self._vocab_size)] * rows)  # with first tokens
        self._intake.warm_up([self._places(range(count)) for count in {1, rows}], done.packed())
        self._programs.release(self._ended.copy())
        plans, pieces = self._choice.plans, self._choice.pieces
        stretches = [(plan, pieces[plan], sampled) for plan in plans for sampled in (False, True)]
        self._programs.compile(stretches)
        for plan, piece, sampled in stretches:
            jax.block_until_ready(self._programs.stretch(1, plan, sampled, piece))

    def turn(self, next_replies: Callable[[int], list[Reply]], waiting: int) -> None:
        """One turn; `next_replies` gives so many of those that wait at most, of about `waiting`."""
        began = time.monotonic()
        self._drop_cancelled()
        if waiting or self._intake.replies:
            self._let_go()
        laid = self._take_in(next_replies, waiting)
        taken_in = time.monotonic() - began
        if self._ahead:
            stretch = self._start_stretch(somebody_waits=waiting > 0)
            self._land_pending()
            self._pending = stretch
            self._give_first(laid)
        else:
            self._give_first(laid)
            self._pending = self._start_stretch(somebody_waits=waiting > 0)
            self._land_pending()
        if not any(self._replies):
            self._drop_pending()
            self._pace.idle()
        self.status = replace(
            self.status,
            running=sum(reply is not None for reply in self._replies),  # without those whose first token was all
            waiting=len(self._intake.replies),
            plan=str(self._choice.plan),
            gain=self._choice.gain,
            busy_seconds=self.status.busy_seconds + time.monotonic() - began,
            waited_seconds=self._device.waited,
            handed_seconds=self._device.handed,
            intake_seconds=self.status.intake_seconds + taken_in,
        )

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Around what is done between turns for who learns."""
        with self._device.learning():
            yield
        self.status = replace(self.status, learner_seconds=self._device.learned)

    def settle(self) -> EngineStatus:
        """Between turns: read the stretch under way, if there is one. -> the status then. The device rests after it."""
        if self._pending is not None:
            before = self._device.waited + self._device.handed
            self._land_pending()
            self._pace.idle()
            self.status = replace(
                self.status,
                running=sum(reply is not None for reply in self._replies),
                # The rest of the time is the learner's, whose turn this is a part of.
                busy_seconds=self.status.busy_seconds + self._device.waited + self._device.handed - before,
                waited_seconds=self._device.waited,
                handed_seconds=self._device.handed,
            )
        return self.status

    def _land_pending(self) -> None:
        """Read the stretch that was started, if one was: its tokens to their readers, and slots free again."""
        stretch, self._pending = self._pending, None
        if stretch is not None:
            self._land(stretch)
        self._leaving.clear()  # they have ended with it

    def _drop_pending(self) -> None:
        """A stretch that was started for replies that have ended: nobody's, though the device computes it."""
        stretch, self._pending = self._pending, None
        if stretch is not None:
            self._rounds_of_use.dropped(stretch)
            self.status = replace(
                self.status,
                stretches=self.status.stretches + 1,
                slot_rounds=self.status.slot_rounds + self.status.slots * stretch.rounds,
            )

    def _give_first(self, laid: list[_Laid]) -> None:
        """The first tokens of replies that were laid into slots."""
        for placed, first in laid:
            found = self._device.read(first).tolist()
            tokens = {slot: [found[row][0]] for row, slot, _ in placed}
            ended = {slot: bool(found[row][1]) for row, slot, _ in placed}
            self._give_all([(slot, reply) for _, slot, reply in placed], tokens, ended)

    def _drop_cancelled(self) -> None:
        """Replies that nobody wants make room."""
        for dropped in self._intake.drop_cancelled():
            dropped.end("cancelled")
        for slot, reply in enumerate(self._replies):
            if reply is not None and reply.cancelled:
                self._free(slot)
                self._ended[slot] = True
                reply.end("cancelled")
        if self._ended.any():
            self._programs.release(self._ended.copy())
            self._ended[:] = False

    def _let_go(self) -> None:
        """Slots whose replies will have ended when the stretch under way has: who comes next is laid behind it.

        Not where something is to be read of a slot that is known only then.
        """
        ending = self._pending.replies if self._pending is not None else {}
        for slot, reply in ending.items():
            if self._replies[slot] is not reply or self._may_go_on(slot, reply):
                continue
            learns = self._on_ended is not None and reply.request.learn
            if reply.request.logprobs is None and not (learns and reply.request.stop):
                self._hand_on(slot, reply)
                self._leaving.append(reply)
                self._free(slot)

    def _take_in(self, next_replies: Callable[[int], list[Reply]], waiting: int) -> list[_Laid]:
        """Chunks of prompts, and those that are complete into free slots. -> what was laid.

        While others run, as many chunks as it takes to fill the free slots with short prompts, and at least one: a long
        prompt that comes alone does not keep them waiting, and many that come together find their slots. A chunk that
        is held for a slot counts when the device is given it.
        """
        laid: list[_Laid] = []
        rows, under_way = self._intake.rows, waiting + len(self._intake.replies)
        chunks, most = int(self._intake.holds_chunk), max(1, -(-min(self._replies.count(None), under_way) // rows))
        runs = any(reply is not None for reply in self._replies) or bool(self._leaving)
        while True:
            if self._intake.is_ready:
                if None not in self._replies:
                    return laid
                laid.append(self._lay())
            if ((runs or laid) and chunks >= most) or any(reply.cancelled for reply in self._intake.replies):
                return laid
            if not self._intake.replies:
                replies = next_replies(rows)
                if not replies:
                    return laid
                self._intake.begin(replies)
            with self._device.handing():
                self._intake.step()
            chunks += 1

    def _lay(self) -> _Laid:
        """Prompts that are complete into free slots, as many as there are."""
        free = [slot for slot, reply in enumerate(self._replies) if reply is None]
        places = self._places([])
        terms = [Terms.of(1, 1, (), GREEDY, self._vocab_size)] * self._intake.rows
        laid: list[tuple[int, int, Reply]] = []
        for slot, (row, reply) in zip(free, self._intake.hand_over(), strict=False):
            self._replies[slot] = reply  # at once: should anything fail, its reader is told
            laid.append((row, slot, reply))
            request, length = reply.request, len(reply.request.prompt_ids)
            sampling = request.sampling or GREEDY
            terms[row] = Terms.of(length, request.max_new_tokens, reply.eos_ids, sampling, self._vocab_size)
            places[row] = slot
            reply.statistics.started = time.monotonic()
            self.status = replace(
                self.status,
                prompt_tokens=self.status.prompt_tokens + length,
                cached_tokens=self.status.cached_tokens + reply.statistics.cached_tokens,
            )
        with self._device.handing():
            sampled = any(_is_sampled(reply.request.sampling) for _, _, reply in laid)
            first = self._intake.lay(places, Terms.joined(terms).packed(), sampled=sampled)
        return laid, first

    def _places(self, slots: Sequence[int]) -> np.ndarray:
        """Of the first prompts that are taken in, as `prompts.lay` wants them: the others get numbers that are none."""
        none = range(len(self._replies) + len(slots), len(self._replies) + self._intake.rows)
        return np.array([*slots, *none], np.int32)

    def _start_stretch(self, *, somebody_waits: bool) -> Stretch | None:
        """Start rounds of what is in the slots; None where nothing can come of it.

        Few rounds while somebody waits for a slot, or for the beginning of a reply; ahead as few as `Pace` needs.
        """
        held = {slot: reply for slot, reply in enumerate(self._replies) if reply is not None}
        running = list(held.values())
        if not any(self._may_go_on(slot, reply) for slot, reply in held.items()):
            return None
        early = any(reply.statistics.new_tokens < EARLY_TOKENS for reply in running)
        somebody_waits = somebody_waits or bool(self._intake.replies)
        plan = self._choice.next_plan(fresh=any(reply.is_fresh for reply in running))
        piece = self._choice.pieces[plan]
        rounds = self._pace.rounds(hurry=early or somebody_waits, least=piece or FEWEST)
        sampled = any(_is_sampled(reply.request.sampling) for reply in running)
        for reply in running:
            reply.is_fresh &= plan.drafts > 0
        with self._device.handing():
            packed = self._programs.stretch(rounds, plan, sampled, piece)
        fresh = {slot for slot, reply in held.items() if reply.is_fresh}
        most = len(packed) * piece if piece else rounds
        return Stretch(packed, plan, held, fresh, most, somebody_waits)

    def _may_go_on(self, slot: int, reply: Reply) -> bool:
        """Whether a reply can have tokens left behind the stretch under way: every round gives it one at least."""
        pending, prompt = self._pending, len(reply.request.prompt_ids)
        rounds = pending.rounds if pending and pending.replies.get(slot) is reply else 0
        known = max(reply.committed, prompt + 1)  # the first one came with the prompt, though it may not be read yet
        return known + rounds < prompt + reply.request.max_new_tokens

    def _land(self, stretch: Stretch) -> None:
        """Read a stretch: give its tokens, count, and free the slots of the replies that ended."""
        plan, pieces = stretch.plan, map(self._device.read, stretch.packed)
        outcome = Outcome.of_pieces([Outcome.read(piece) for piece in pieces])
        device, before = self._device.seconds, self._device_before
        self._pace.landed(outcome.accept_lengths.shape[1], device - before)
        self._device_before = device
        # Replies that have ended since it was started have left their slots.
        live = [(slot, reply) for slot, reply in stretch.replies.items() if reply.finish_reason is None]
        lengths, drafted, tokens = outcome.accept_lengths.tolist(), outcome.drafted.tolist(), {}
        for slot, reply in live:
            reply.count(lengths[slot], drafted[slot])
            start = outcome.start[slot]
            tokens[slot] = outcome.tokens[slot, reply.committed - start : outcome.length[slot] - start].tolist()
        rows = [slot for slot, _ in live]
        self._rounds_of_use.landed(stretch, outcome.accept_lengths[rows])
        if plan.drafts:
            fresh = np.array([slot in stretch.fresh for slot in rows], bool)
            self._choice.add(plan, outcome.accept_lengths[rows], outcome.drafted[rows], fresh)
        self.status = counted(self.status, outcome.accept_lengths[rows], outcome.drafted[rows], self._choice.width - 1)
        self._give_all(live, tokens, outcome.done)

    def _give_all(
        self, live: list[tuple[int, Reply]], tokens: dict[int, list[int]], done: Mapping[int, bool] | np.ndarray
    ) -> None:
        """Tokens by slot to the readers of these replies.

        They are counted before anybody is told; of replies with stop strings once it is known how many there are. An
        event loop is told once all have theirs.
        """
        logprobs = {slot: self._logprobs(slot, reply, tokens[slot]) for slot, reply in live}
        certain = sum(len(tokens[slot]) for slot, reply in live if not reply.request.stop)
        self.status = replace(self.status, new_tokens=self.status.new_tokens + certain)
        with held_back():
            for slot, reply in live:
                given = self._give(slot, reply, tokens[slot], logprobs[slot], done=bool(done[slot]))
                if reply.request.stop:
                    self.status = replace(self.status, new_tokens=self.status.new_tokens + given)

    def _give(self, slot: int, reply: Reply, ids: list[int], logprobs: _Logprobs, *, done: bool) -> int:
        """Tokens to their reader -> how many it gets; a reply that has ended leaves its slot."""
        before = reply.statistics.new_tokens
        reply.take(ids, done=done, logprobs=logprobs)
        if reply.finish_reason is not None and self._replies[slot] is reply:
            self._hand_on(slot, reply)
            self._free(slot)
            self._ended[slot] = reply.finish_reason == "stop"
        return reply.statistics.new_tokens - before

    def _logprobs(self, slot: int, reply: Reply, ids: list[int]) -> _Logprobs:
        """Of new tokens, if they are asked for."""
        wanted, state = reply.request.logprobs, self._programs.slots.decode
        if wanted is None:
            return None
        start = min(reply.committed, state.tokens.shape[1] - columns_of(state))
        found = self._programs.logprobs(slot, start, self._most_logprobs)
        own, best, alternatives = (self._device.read(array)[reply.committed - start :].tolist() for array in found)
        pairs = [tuple(zip(*row, strict=True))[:wanted] for row in zip(alternatives, best, strict=True)]
        return tuple(map(TokenLogprob, ids, own, pairs))

    def _hand_on(self, slot: int, reply: Reply) -> None:
        """What can be learned from a reply that has ended, or will have, while its slot still holds it."""
        if self._on_ended is None or not reply.request.learn:
            return
        request, has_ended = reply.request, reply.finish_reason is not None
        prompt = len(request.prompt_ids)
        length = prompt + (reply.statistics.new_tokens if has_ended else request.max_new_tokens)
        with self._device.handing():
            self._on_ended(self._programs.ended(slot, prompt, length, is_known=has_ended), request)

    def _free(self, slot: int) -> None:
        """A slot for somebody else."""
        reply, self._replies[slot] = self._replies[slot], None
        assert reply is not None
        self._slot_seconds += 0.1 * (time.monotonic() - reply.statistics.started - self._slot_seconds)


def _is_sampled(sampling: SamplingConfig | None) -> bool:
    """Whether more is asked for than the best token of the verifier's own logits."""
    return sampling is not None and (sampling.temperature > 0 or sampling.repetition_penalty != 1)
