"""Learning while serving: windows of finished replies in, better drafter weights out, a stretch at a time.

    reply -> window -> replay -> fast update -> candidate -> swap -> trial on fresh traffic -> kept, or taken back

All of it happens in the engine's thread, between stretches, one piece a turn. What a drafter is worth is seen in the
drafts that the verifier judges (`shadow.py`); when those look worse, good and live drafter are compared on the very
same windows, so that a change of traffic is not taken for a fault. Replies cannot change: weights of a drafter decide
how fast tokens come, never which.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.decode.memory import check_room, tree_bytes
from dvi_jax.errors import UserError, one_line
from dvi_jax.learn.fast_update import Batch, LearnerState, fast_update, init_learner, with_trainable
from dvi_jax.learn.replay import Replay, Windows, check_branches, window_bytes
from dvi_jax.learn.rollback import go_on_from
from dvi_jax.loading import LoadedModel
from dvi_jax.model.speculative_llama import Params
from dvi_jax.serve.learn_settings import LearnSettings
from dvi_jax.serve.learning import checksum, compare, copied, keep, newest
from dvi_jax.serve.requests import EngineStatus, Request
from dvi_jax.serve.shadow import Shadow, Verdict
from dvi_jax.serve.share import Share

MOST_FAILING = 3  # non-finite updates in a row before the good drafter takes over
TRIAL_UPDATES = 64  # after which windows decide on a trial that traffic has not decided
CAUTION, CAUTIOUS_UPDATES = 0.3, 100  # factor of the rate after a drafter was taken back, and for how long
SLOW, FADE = 0.1, 300  # rate of a good drafter, as a share of a new one's; updates over which a new one's fades
POOLED = 4  # updates between two swaps of a drafter that moves slowly
RETRY_SECONDS = 1.0  # until a snapshot is offered again that was not taken
LOG_SECONDS = 1.0  # at least, between two updates that are logged: they may be many

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learned:
    """What has been learned so far; a restart goes on from what its snapshot knew."""

    updates: int = 0
    swaps: int = 0  # times that other weights became live, those taken back included
    rollbacks: int = 0
    learned_positions: int = 0  # that updates looked at
    windows: int = 0  # replies that were learned from, or lie ready
    seconds: float = 0.0  # of learning
    update_seconds: float = 0.0  # the newest update
    agreement: float = 0.0  # share of its positions where the drafter's first choice was the verifier's
    digest: str = ""  # checksum of the live drafter's weights, 8 hexadecimal digits
    live_since: float = 0.0  # unix seconds
    state: str = "learning"  # or why no more


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
        """Take the memory and compile. `context`: tokens of a request, of the engine.

        `report` gets records of updates, rollbacks and so on with the update's number; `save` what a restart needs,
        and says whether it took it; neither may take long. `UserError` for a model that cannot learn so, or that the
        memory does not hold.
        """
        if model.params.lora_d:
            raise UserError(
                "--learn trains the drafter alone, and this model has a lora_D, whose learning would change replies:"
                " merge it into the model (python -m conversion export --merge-lora), or leave out --learn"
            )
        if settings.branches:
            check_branches(model, settings.objective.unroll_steps)
        self.settings, self._model, self._clock = settings, model, clock
        average = settings.average if model.drafter_is_trained else 0.0
        self._optimizer = replace(settings.optimizer, average=average)
        self._report, self._save = report, save
        self._window = min(settings.window, context)
        fresh, kept = settings.fresh_windows, settings.replayed_windows
        self._positions = min(settings.positions, fresh * (self._window - 1))
        self._size = Batch(0, kept, self._positions)
        capacity = self._capacity(fresh)
        width, taps = model.config.hidden_size, len(model.taps)
        replay = Replay.empty(capacity, self._window, width, taps, settings.branches)
        self._state = init_learner(model.params, self._optimizer, replay, jax.random.key(settings.seed))
        self._good = self._live = self._given = self._point()  # given: what the engine drafts with
        self._shadow, self._share = Shadow(), Share(settings.share, clock)
        self._arrived: list[jax.Array] = []  # lengths of windows that were not counted yet
        self._new_positions = 0  # of windows since the last update
        self._pooled = 0  # updates since the last swap
        self._good_step = 0  # update that made the good drafter
        self._decided = 0  # update after which the last trial was decided
        self._judged = (0, 0)  # of the engine
        self._cautious_until = -1
        self._saved_at, self._saved_step = clock() - settings.save_seconds, 0  # the first good one at once
        self._logged_at = clock() - LOG_SECONDS
        self.status = Learned()
        self._warm_up()

    def _capacity(self, fresh: int) -> int:
        """Windows that fit; `UserError` where the least that makes sense does not."""
        settings, config = self.settings, self._model.config
        window = window_bytes(self._window, config.hidden_size, len(self._model.taps), settings.branches)
        capacity = max(fresh, min(settings.replay_capacity, settings.replay_bytes // window))
        moving = tree_bytes(self._model.params.drafter) + tree_bytes(self._model.params.lora_s)
        # Weights of three drafters (good, live, candidate) with two moments and perhaps an average each, and gradients.
        states = 3 * (4 if self._optimizer.average else 3) + 1
        check_room(capacity * window + states * moving, f"--learn: {capacity} windows and the optimiser's states")
        return capacity

    # What the engine's thread calls.

    @property
    def branches(self) -> int:
        """How many drafts that were not taken it wants with a reply's window, at most."""
        return self.settings.branches

    def take(self, windows: Windows, request: Request) -> None:
        """The window of a reply that has ended, of all positions of a slot; cut and kept on the device."""
        if self.status.state != "learning":
            return
        try:
            replay, length = keep(self._state.replay, windows, self._window)
        except jax.errors.JaxRuntimeError as error:
            self._stop(one_line(str(error)))
            return
        self._state = self._state.replace(replay=replay)
        self._arrived.append(length)
        if request.prompt_ids:  # an engine that warms up hands over an empty window
            self.status = replace(self.status, windows=self.status.windows + 1)

    def has_work(self) -> bool:
        """Whether a turn would do anything if the share allowed it."""
        if self.status.state != "learning":
            return False
        try:
            while self._arrived and self._arrived[0].is_ready():  # type: ignore[attr-defined]  # all of jax's have it
                self._new_positions += int(self._arrived.pop(0))
        except jax.errors.JaxRuntimeError as error:  # what the device made of keeping it
            self._stop(one_line(str(error)))
            return False
        enough = self._new_positions >= self._positions
        return enough or self._verdict_is_due() or self._save_is_due()

    def turn(
        self, status: EngineStatus, *, idle: bool, settle: Callable[[], EngineStatus] | None = None
    ) -> Params | None:
        """One piece of work if there is one and the share allows it; the weights to draft with from here on, or None.

        `idle`: no request is there. `settle`: waits for the device, before work, and says what was judged by then.
        """
        self._judged = sum(status.judged), sum(status.accepted)
        self._shadow.observe(*self._judged)
        if not (self.has_work() and (self._share.allows() or idle)):
            return self._new_params()
        if settle is not None:  # what lands now was drafted before the work
            status = settle()
            self._judged = sum(status.judged), sum(status.accepted)
        began = self._clock()
        try:
            self._work()
        except (jax.errors.JaxRuntimeError, UserError) as error:
            self._stop(one_line(str(error)))
        seconds = self._clock() - began
        self._share.spend(seconds, free=idle)
        self.status = replace(self.status, seconds=self.status.seconds + seconds)
        return self._new_params()

    def _new_params(self) -> Params | None:
        """The live drafter's, unless the engine has them."""
        given, self._given = self._given, self._live
        return None if given is self._live else self.params()

    def params(self) -> Params:
        """The model's arrays with the live drafter."""
        return with_trainable(self._model.params, self._live.served)

    # What is kept across restarts.

    @property
    def template(self) -> LearnerState:
        """A state of the shapes that `save` is given: without windows, which hold texts."""
        return self._good

    def restore(self, state: LearnerState, progress: dict[str, Any]) -> None:
        """Go on from what `save` was given; before the engine starts."""
        self._good = self._live = self._given = state
        self._state = self._renewed(state)
        self._good_step = self._decided = self._saved_step = int(state.step)
        self.status = Learned(**progress)
        self._note_live()

    def finish(self) -> tuple[LearnerState, dict[str, Any]]:
        """The drafter that has proved good, and the progress; what is on trial is decided by windows. After the end."""
        if self.status.state == "learning" and self._live is not self._good:
            try:
                self._decide(suspected=False)
            except jax.errors.JaxRuntimeError as error:
                self._stop(one_line(str(error)))
        return self._good, self._progress()

    def _progress(self) -> dict[str, Any]:
        return asdict(replace(self.status, updates=self._good_step))

    # The work.

    def _work(self) -> None:
        """The most urgent piece."""
        if self._verdict_is_due():
            verdict = self._shadow.verdict()
            if verdict is Verdict.HELD:
                self._hold()
            else:
                self._decide(suspected=verdict is Verdict.WORSE)
        elif self._save_is_due():
            if self._save(self._good, self._progress()):
                self._saved_at, self._saved_step = self._clock(), self._good_step
            else:
                self._saved_at = self._clock() - self.settings.save_seconds + RETRY_SECONDS
        else:
            self._update()

    def _verdict_is_due(self) -> bool:
        if not self._shadow.on_trial:
            return False
        overdue = self.status.updates - self._decided >= TRIAL_UPDATES
        return overdue or self._shadow.verdict() is not Verdict.OPEN

    def _save_is_due(self) -> bool:
        waited = self._clock() - self._saved_at >= self.settings.save_seconds
        return waited and self._good_step > self._saved_step

    def _update(self) -> None:
        """One fast update of the candidate; it goes live when enough of them are pooled."""
        began, step = self._clock(), self.status.updates
        rate = self._rate(step)
        state, values = self._fast_update(self._state, rate)
        self._state = state
        self._new_positions, self._pooled = 0, self._pooled + 1
        jax.block_until_ready(state.served)
        found, failing = jax.device_get((values, state.optimizer.notfinite_count))
        seconds, positions = self._clock() - began, int(found["positions"])
        self.status = replace(
            self.status,
            updates=step + 1,
            update_seconds=seconds,
            agreement=float(found["agreement"]),
            learned_positions=self.status.learned_positions + positions,
        )
        if began - self._logged_at >= LOG_SECONDS:
            self._logged_at, (judged, accepted) = began, self._judged
            shown = {name: float(found[name]) for name in ("loss", "kl", "agreement", "grad_norm")}
            self._log("update", shown | {"rate": rate, "seconds": seconds, "judged": judged, "accepted": accepted})
        if failing >= MOST_FAILING:
            self._take_back({"reason": f"{int(failing)} non-finite updates in a row"})
        elif self._pooled >= self._pool(step):
            self._swap()

    def _fast_update(self, state: LearnerState, rate: float) -> tuple[LearnerState, dict[str, jax.Array]]:
        settings, model = self.settings, self._model
        fresh = newest(state.replay, settings.fresh_windows)
        return fast_update(
            model.definition,
            model.params,
            state,
            fresh,
            np.array(False),
            objective=settings.objective,
            optimizer=self._optimizer,
            size=self._size,
            rate=rate,
        )

    def _usual_rate(self, step: int) -> float:
        """A drafter from nothing begins quickly and slows down; a trained one has something to lose."""
        return SLOW if self._model.drafter_is_trained else max(SLOW, 1 / (1 + step / FADE))

    def _rate(self, step: int) -> float:
        """Of update `step`, as a share of the optimiser's rates."""
        return self._usual_rate(step) * (CAUTION if step < self._cautious_until else 1.0)

    def _pool(self, step: int) -> int:
        """Updates from one swap to the next."""
        return POOLED if self._usual_rate(step) < 0.5 else 1

    def _swap(self) -> None:
        """The candidate goes live, on trial."""
        self._live, self._pooled = self._point(), 0
        self._shadow.swapped(*self._judged)
        self.status = replace(self.status, swaps=self.status.swaps + 1)
        self._note_live()

    def _hold(self) -> None:
        """The trial is over: the live drafter is the good one."""
        good, trial = self._shadow.rates
        self._shadow.hold()
        self._good, self._good_step, self._decided = self._live, int(self._live.step), self.status.updates
        self._log("held", {"accept_rate": trial, "accept_rate_before": good})

    def _decide(self, *, suspected: bool) -> None:
        """Good and live drafter on the same newest windows: the better one goes on.

        Traffic that became worse (`suspected`) and windows must agree; without that, chance alone takes nothing back.
        """
        good, live, error = map(float, jax.device_get(self._compare()))
        rates = dict(zip(("accept_rate_before", "accept_rate"), self._shadow.rates, strict=True))
        found = {"good_agreement": good, "live_agreement": live, "standard_error": error, **rates}
        if live < good if suspected else good - live > 2 * error:
            self._take_back({"reason": "the drafter has become worse", **found})
            return
        if suspected:
            self._log("traffic_changed", found)
        self._hold()

    def _compare(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        settings, model = self.settings, self._model
        return compare(
            model.definition,
            model.params,
            self._good.served,
            self._live.served,
            newest(self._state.replay, settings.fresh_windows),
            self._state.key,
            objective=settings.objective,
            count=self._positions,
        )

    def _take_back(self, values: dict[str, Any]) -> None:
        """The good drafter is live again, with its optimiser's state, and learns more slowly for a while."""
        self._state = self._renewed(go_on_from(self._good, self._state))
        self._live, self._pooled = self._good, 0
        self._decided = self.status.updates
        self._cautious_until = self.status.updates + CAUTIOUS_UPDATES
        self._shadow.take_back(*self._judged)
        self.status = replace(self.status, rollbacks=self.status.rollbacks + 1)
        self._log("rollback", {**values, "to": int(self._good.step), "rollbacks": self.status.rollbacks})
        self._note_live()

    def _note_live(self) -> None:
        digest = f"{int(checksum(self._live.served)):08x}"
        self.status = replace(self.status, digest=digest, live_since=time.time())

    def _point(self) -> LearnerState:
        """The state as it is, without windows; updates do not touch its arrays."""
        return self._state.replace(**_rest(self._state), replay=Replay.empty(1, 1, 1))

    def _renewed(self, point: LearnerState) -> LearnerState:
        """A state to update that begins at `point`, whose arrays stay, with the windows that there are."""
        return point.replace(**_rest(point), replay=self._state.replay)

    def _stop(self, reason: str) -> None:
        """Learn no more; replies go on with the good drafter."""
        log.error("learning stopped: %s", reason)
        self._live = self._good
        self.status = replace(self.status, state=f"stopped: {reason}")
        self._log("stopped", {"reason": reason})

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        self._report(kind, self.status.updates, values)

    def _warm_up(self) -> None:
        """Compile every program, on no windows, so that no reply waits for one."""
        state, _ = self._fast_update(self._renewed(self._good), 1.0)
        self._state = self._state.replace(replay=state.replay)
        self._state = self._renewed(self._good)
        self._compare()[0].block_until_ready()
        jax.tree.map(jnp.copy, self._good)  # as a snapshot will
        self._note_live()


def _rest(state: LearnerState) -> dict[str, Any]:
    """Copies of what an update uses up, windows apart."""
    return copied({"optimizer": state.optimizer, "baseline": state.baseline, "step": state.step, "key": state.key})
