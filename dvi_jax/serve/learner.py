"""Learning while serving: windows of finished replies in, better drafter weights out, a stretch at a time.

    reply -> window -> replay -> fast update -> candidate -> swap -> trial on fresh traffic -> kept, or taken back

A `fused` from nothing begins with first weights in place of its first updates (`learn/first_weights.py`).
All of it is begun in the engine's thread, between stretches, one piece a turn; for an update nobody waits, not even
while the device is given it (`candidate.py`). What a drafter is worth is seen in the drafts that the verifier judges
(`shadow.py`); when those look worse, good and live drafter are compared on the very same windows, so that a change of
traffic is not taken for a fault. Replies cannot change: weights of a drafter decide how fast tokens come, never which.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import jax

from dvi_jax.decode.plan import Plan
from dvi_jax.errors import UserError, one_line
from dvi_jax.learn.fast_update import LearnerState, with_trainable
from dvi_jax.learn.replay import check_branches
from dvi_jax.learn.rollback import go_on_from
from dvi_jax.loading import LoadedModel
from dvi_jax.model.speculative_llama import Params
from dvi_jax.serve.candidate import Candidate, Learnt, is_ready
from dvi_jax.serve.ended import Ended
from dvi_jax.serve.learn_settings import LearnSettings
from dvi_jax.serve.learned import Learned
from dvi_jax.serve.learning import checksum, copied
from dvi_jax.serve.requests import EngineStatus, Request
from dvi_jax.serve.shadow import DOUBT, Shadow, Verdict
from dvi_jax.serve.share import Share

MOST_FAILING = 3  # non-finite updates in a row before the good drafter takes over
TRIAL_UPDATES = 64  # after which windows decide on a trial that traffic has not decided
# Factor of the rate after a drafter was taken back, and for how many updates, of a trained one and of a new one.
CAUTION, CAUTIOUS_UPDATES, CAUTIOUS_AT_FIRST = 0.3, 100, 20
SLOW, FADE = 0.1, 300  # rate of a good drafter, as a share of a new one's; updates over which a new one's fades
POOLED = 4  # updates between two swaps of a drafter that moves slowly
# Between two swaps, at least: the host pays for each, and a quick device makes many updates in that time. But a young
# drafter changes much with every update: while at least this share of all its updates is new, it goes live at once. Not
# where decoding is plain: drafts are made now and then there, to try, and may be of weights that much older.
SWAP_SECONDS, YOUNG = 0.5, 0.1
# Most of the time for learning while plain decoding is the quickest: no more than that is lost. And what it may take
# besides of what drafting should bring beyond `UNSURE`: so much may be chance, or lost to prompts, which drafting makes
# no quicker.
UNPAID, PAID, UNSURE = 0.02, 0.75, 0.04
# A new drafter's first draft pays before the others do, and costs less to learn. It is learned alone while decoding is
# plain, in the first so many updates; then, and while a round has one draft, in every other one, so that a second may
# pay.
FIRST_DRAFTS, ALL_DRAFTS = 500, 2
MOST_KEEPING = 0.002  # seconds that a window is charged with, at most
RETRY_SECONDS = 1.0  # until a snapshot is offered again that was not taken
LOG_SECONDS = 1.0  # at least, between two updates that are logged: they may be many

log = logging.getLogger(__name__)


class Learner:
    """Learns from an engine's replies; `engine.Learns` says when what is called. Status may be read by any thread."""

    def __init__(
        self,
        model: LoadedModel,
        settings: LearnSettings,
        context: int,
        *,
        report: Callable[[str, int, dict[str, Any]], None] = lambda kind, step, values: None,
        save: Callable[[LearnerState, dict[str, Any]], bool] = lambda state, progress: True,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Take the memory and compile. `context`: tokens of a request, as an engine is given it.

        `report` gets records of updates, rollbacks and so on with the update's number; `save` what a restart needs,
        and says whether it took it: a state that is good until the next turn. Neither may take long. `UserError` for a
        model that cannot learn so, or that the memory does not hold.
        """
        if model.params.lora_d:
            raise UserError(
                "--learn trains the drafter alone, and this model has a lora_D, whose learning would change replies:"
                " merge it into the model (python -m conversion export --merge-lora), or leave out --learn"
            )
        if settings.branches:
            check_branches(model, settings.objective.unroll_steps)
        self.settings, self._model, self._clock = settings, model, clock
        self._report, self._save = report, save
        self._candidate = Candidate(model, settings, context, clock)
        self._good = self._live = self._given = self._candidate.point()  # given: what the engine drafts with
        self._tried = self._good  # what was live when the trial began
        self._shadow, self._share = Shadow(), Share(settings.share, clock)
        self._pooled, self._swapped_at = 0, clock() - SWAP_SECONDS  # updates since the last swap; its time
        self._good_step = 0  # update that made the good drafter
        self._decided = 0  # update after which the last trial was decided
        self._judged, self._stretches, self._drafts = (0, 0), 0, 1  # of the engine; drafts of a round by its plan
        self._gain: float | None = None  # of the engine, too
        self._swapped_in: int | None = None  # stretch in which a swap fell whose trial has not begun
        self._digest: jax.Array | None = None  # of the live drafter, on its way
        self._cautious_until = -1
        self._saved_at, self._saved_step = clock() - settings.save_seconds, 0  # the first good one at once
        self._logged_at = clock() - LOG_SECONDS
        self.status = Learned(update_seconds=self._candidate.seconds)
        self._note_live()
        self._look(wait=True)

    # What the engine's thread calls.

    @property
    def branches(self) -> int:
        """How many drafts that were not taken it wants of a reply, at most."""
        return self.settings.branches

    def take(self, ended: Ended, request: Request) -> None:
        """A reply that has ended; its window is kept on the device if the next update has a use for it."""
        if self.status.state != "learning":
            return
        began = self._clock()
        try:
            if not self._candidate.wants_more():
                return
            self._candidate.take(ended)
        except jax.errors.JaxRuntimeError as error:
            self._stop(one_line(str(error)))
            return
        if request.prompt_ids:  # an engine that warms up hands over an empty one
            self.status = replace(self.status, windows=self.status.windows + 1)
            if not self._candidate.is_beginning:  # solving is charged with its windows
                # Of the host's time, which rounds need too. What takes longer waits for something else.
                self._spend(min(self._clock() - began, MOST_KEEPING), free=False)

    def has_work(self) -> bool:
        """Whether a turn would do anything if the share allowed it."""
        if self._digest is not None and is_ready(self._digest):
            return True
        if self.status.state != "learning":
            return False
        return self._candidate.has_updated or self._swap_is_due() or self._is_due()

    def _is_due(self) -> bool:
        """Whether a piece of work could begin."""
        if self.status.state != "learning" or self._candidate.is_updating:
            return False
        try:
            enough = self._candidate.has_enough()
        except jax.errors.JaxRuntimeError as error:  # what the device made of keeping a window
            self._stop(one_line(str(error)))
            return False
        return enough or self._verdict_is_due() or self._save_is_due()

    def turn(
        self, status: EngineStatus, *, idle: bool, settle: Callable[[], EngineStatus] | None = None
    ) -> Params | None:
        """One piece of work if there is one and the share allows it; the weights to draft with from here on, or None.

        `idle`: no request is there. `settle`: waits for the device, before weights may be taken back, and says what was
        judged.
        """
        self._observe(status)
        paid = 1.0 if self._gain is None else PAID * max(self._gain - UNSURE, 0)
        self._share.share = min(self.settings.share, UNPAID + paid)
        try:
            self._look()
            if self._is_due() and (self._share.allows() or idle):
                self._spend(self._work(settle, idle=idle), free=idle)
        except (jax.errors.JaxRuntimeError, UserError) as error:
            self._stop(one_line(str(error)))
        return self._new_params()

    def _spend(self, seconds: float, *, free: bool) -> None:
        """Learning took so long."""
        self._share.spend(seconds, free=free)
        self.status = replace(self.status, seconds=self.status.seconds + seconds)

    def _observe(self, status: EngineStatus) -> None:
        """What was judged since. The stretch in which a swap falls was drafted by what was live before."""
        self._drafts, self._gain = Plan.parse(status.plan).drafts, status.gain
        self._judged, self._stretches = (sum(status.judged), sum(status.accepted)), status.stretches
        if self._swapped_in is not None and self._stretches > self._swapped_in:
            self._swapped_in = None
            if not self._shadow.on_trial:
                self._tried = self._live
            self._shadow.swapped(*self._judged)
        self._shadow.observe(*self._judged, status.plan if self._drafts else None)

    def _new_params(self) -> Params | None:
        """The live drafter's, unless the engine has them."""
        given, self._given = self._given, self._live
        return None if given is self._live else with_trainable(self._model.params, self._live.served)

    def params(self) -> Params:
        """The model's arrays with a copy of the live drafter's; not while another thread has the learner's turns."""
        return with_trainable(self._model.params, copied(self._live.served))

    # What is kept across restarts.

    @property
    def template(self) -> LearnerState:
        """A state of the shapes that `save` is given: without windows, which hold texts. Good until the next turn."""
        return self._good

    def restore(self, state: LearnerState, progress: dict[str, Any]) -> None:
        """Go on from what `save` was given; before the engine starts."""
        self._good = self._live = self._given = state
        self._candidate.go_on_from(state)
        self._candidate.have_begun()
        self._good_step = self._decided = self._saved_step = int(state.step)
        self.status = Learned(**progress | {"update_seconds": self._candidate.seconds})
        self._note_live()
        self._look(wait=True)

    def finish(self) -> tuple[LearnerState, dict[str, Any]]:
        """The drafter that has proved good, and the progress; what is on trial is decided by windows. After the end."""
        if self.status.state == "learning":
            try:
                self._look(wait=True)
                if self._live is not self._good:
                    self._decide(suspected=False)
                self._look(wait=True)  # the digest of what is live then
            except jax.errors.JaxRuntimeError as error:
                self._stop(one_line(str(error)))
        return self._good, self._progress()

    def _progress(self) -> dict[str, Any]:
        return asdict(replace(self.status, updates=self._good_step))

    # The work.

    def _work(self, settle: Callable[[], EngineStatus] | None, *, idle: bool) -> float:
        """The most urgent piece -> seconds that it takes the device, or keeps the engine waiting."""
        began = self._clock()
        if self._verdict_is_due():
            # What lands now was drafted before the verdict. A trial that held undoes nothing, and waits for nothing.
            if settle is not None and self._shadow.verdict() is not Verdict.HELD:
                self._observe(settle())
                began = self._clock()
            verdict = self._shadow.verdict()
            if verdict is Verdict.HELD:
                self._hold(self._tried)
            elif self._verdict_is_due():  # unless what landed has cleared it
                self._decide(suspected=verdict is Verdict.WORSE)
        elif self._save_is_due():
            if self._save(self._good, self._progress()):
                self._saved_at, self._saved_step = self._clock(), self._good_step
            else:
                self._saved_at = self._clock() - self.settings.save_seconds + RETRY_SECONDS
        elif self._candidate.is_beginning:
            self._candidate.begin_solving()
            return self._candidate.seconds_of_solving
        else:
            updates = self.status.updates
            first_drafts = not idle and self._learns_first_drafts(updates)
            self._candidate.begin_update(self._rate(updates), first_drafts=first_drafts)
            return self._candidate.seconds_of_first if first_drafts else self._candidate.seconds
        return self._clock() - began

    def _learns_first_drafts(self, step: int) -> bool:
        """Whether update `step` is of a round's first draft alone."""
        if self._model.drafter_is_trained:  # it would unlearn the others
            return False
        if self._gain == 0 and step < FIRST_DRAFTS:
            return True
        return self._drafts <= 1 and step % ALL_DRAFTS > 0

    def _verdict_is_due(self) -> bool:
        if not self._shadow.on_trial:
            return False
        overdue = self.status.updates - self._decided >= TRIAL_UPDATES
        return overdue or self._shadow.verdict() is not Verdict.OPEN

    def _save_is_due(self) -> bool:
        waited = self._clock() - self._saved_at >= self.settings.save_seconds
        return waited and self._good_step > self._saved_step

    def _look(self, *, wait: bool = False) -> None:
        """What the device has come to since: an update, which may go live, and the live drafter's digest."""
        if self._digest is not None and (wait or is_ready(self._digest)):
            digest, self._digest = self._digest, None  # looked at once, whatever it came to
            self.status = replace(self.status, digest=f"{int(digest):08x}")
        if self.status.state != "learning":  # what was under way then goes nowhere
            return
        if self._candidate.has_updated or (wait and self._candidate.is_updating):
            self._note_update(self._candidate.look())
        if self._swap_is_due(now=wait):
            self._swap()

    def _note_update(self, learnt: Learnt) -> None:
        """An update is done; the good drafter is live again if too many in a row moved nothing."""
        self.status = replace(
            self.status,
            updates=self.status.updates + 1,
            agreement=learnt.values["agreement"],
            learned_positions=self.status.learned_positions + int(learnt.values["positions"]),
        )
        now = self._clock()
        if now - self._logged_at >= LOG_SECONDS or learnt.kind == "solved":
            self._logged_at, (judged, accepted) = now, self._judged
            shown = {name: learnt.values[name] for name in ("loss", "kl", "agreement", "grad_norm")}
            counts = {"judged": judged, "accepted": accepted}
            self._log(learnt.kind, shown | {"rate": learnt.rate} | counts)
        self._pooled += 1
        if learnt.kind == "solved":  # good at once: what a new drafter had before is not to be gone back to
            self._swap()
            self._hold(self._live)
        if learnt.failing >= MOST_FAILING:
            self._take_back({"reason": f"{learnt.failing} non-finite updates in a row"})

    def _usual_rate(self, step: int) -> float:
        """A drafter from nothing begins quickly and slows down; one that knows something has that to lose."""
        return SLOW if self._model.drafter_is_trained else max(SLOW, 1 / (1 + step / FADE))

    def _rate(self, step: int) -> float:
        """Of update `step`, as a share of the optimiser's rates."""
        return self._usual_rate(step) * (CAUTION if step < self._cautious_until else 1.0)

    def _pool(self, step: int) -> int:
        """Updates from one swap to the next."""
        return POOLED if self._usual_rate(step) < 0.5 else 1

    def _swap_is_due(self, *, now: bool = False) -> bool:
        """Whether there have been updates enough since the last swap, and time enough unless it is to be `now`."""
        if self._candidate.is_updating or self._pooled < self._pool(self.status.updates):
            return False
        is_young = self._pooled >= YOUNG * self.status.updates
        return now or (is_young and self._drafts > 0) or self._clock() - self._swapped_at >= SWAP_SECONDS

    def _swap(self) -> None:
        """The candidate goes live, on trial."""
        in_use = self._good, self._tried, self._live, self._given
        self._live, self._pooled, self._swapped_at = self._candidate.next_point(in_use), 0, self._clock()
        if self._swapped_in is None:
            self._swapped_in = self._stretches
        self.status = replace(self.status, swaps=self.status.swaps + 1)
        self._note_live()

    def _hold(self, good: LearnerState) -> None:
        """The trial is over, and this drafter the good one; what went live meanwhile has the next trial."""
        before, trial = self._shadow.rates
        self._shadow.hold()
        self._good, self._good_step, self._decided = good, int(good.step), self.status.updates
        if self._live is not good and self._swapped_in is None:
            self._swapped_in = self._stretches
        self._log("held", {"accept_rate": trial, "accept_rate_before": before})

    def _decide(self, *, suspected: bool) -> None:
        """Good and live drafter on the same newest windows: the better one goes on.

        By all drafts of a round, whichever were learned. Traffic that became worse (`suspected`) and windows must
        agree, and windows not by chance: traffic changes far oftener than a drafter goes bad.
        """
        good, live, error = self._candidate.agreements(self._good.served, self._live.served)
        rates = dict(zip(("accept_rate_before", "accept_rate"), self._shadow.rates, strict=True))
        found = {"good_agreement": good, "live_agreement": live, "standard_error": error, **rates}
        if good - live > DOUBT * error:
            self._take_back({"reason": "the drafter has become worse", **found})
            return
        if suspected:
            self._log("traffic_changed", found)
        self._hold(self._live)

    def _take_back(self, values: dict[str, Any]) -> None:
        """The good drafter is live again, with its optimiser's state, and learns more slowly for a while."""
        self._candidate.go_on_from(go_on_from(self._good, self._candidate.state))
        self._live, self._pooled, self._swapped_in = self._good, 0, None
        self._decided = updates = self.status.updates
        self._cautious_until = updates + (CAUTIOUS_UPDATES if self._model.drafter_is_trained else CAUTIOUS_AT_FIRST)
        self._shadow.take_back(*self._judged)
        self.status = replace(self.status, rollbacks=self.status.rollbacks + 1)
        self._log("rollback", {**values, "to": int(self._good.step), "rollbacks": self.status.rollbacks})
        self._note_live()

    def _note_live(self) -> None:
        self._digest = checksum(self._live.served)
        self.status = replace(self.status, live_since=time.time())

    def _stop(self, reason: str) -> None:
        """Learn no more; replies go on with the good drafter. What else fails then is not told of."""
        if self.status.state != "learning":
            return
        log.error("learning stopped: %s", reason)
        self.status = replace(self.status, state=f"stopped: {reason}")
        if self._live is not self._good:
            self._live = self._good
            with suppress(jax.errors.JaxRuntimeError):  # of such a device
                self._note_live()
        self._log("stopped", {"reason": reason})

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        self._report(kind, self.status.updates, values)
