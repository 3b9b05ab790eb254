"""When learning has gone wrong, and what of an earlier state it then goes on with.

Losslessness makes going back safe: a drafter decides how fast tokens come, never which.

* **Non-finite updates.** Each one is skipped (`optimizer.py`). `after` in a row mean that the state itself brings them
  about (a poisoned replay, weights near overflow), so the newest good snapshot takes its place.
* **Collapse.** Suspicion is cheap: the smoothed accept rate of rollouts falls under `collapse` of its best. But it
  falls as well when the traffic changes, which is no fault of the drafter. So before anything is undone, the drafter of
  the best snapshot decodes the very prompts that were just decoded. Only if the present one reached less than
  `collapse` of its accept rate there is it replaced; otherwise the better of the two is the new best to measure by.

Prompts are not replayed and updates go on counting, so a rollback cannot repeat itself. A snapshot that did not hold is
not gone back to again; and too many rollbacks in quick succession end the run.
"""

from __future__ import annotations

from dataclasses import dataclass

from dvi_jax.config import RollbackConfig
from dvi_jax.errors import UserError
from dvi_jax.learn.distill import DistillState
from dvi_jax.learn.fast_update import LearnerState
from dvi_jax.learn.snapshot import State

MOMENTUM = 0.9  # of the smoothed accept rate
QUICK = 100  # rollouts within which one rollback after another counts as quick


@dataclass
class Watch:
    """What a run remembers of its accept rate and its rollbacks; a snapshot keeps it."""

    accept_rate: float = 0.0  # smoothed over the rollouts since the last rollback
    best: float = 0.0
    checks: int = 0  # rollouts (in distillation, looks at the update) since the last rollback
    rollbacks: int = 0
    quick: int = 0  # of these, how many came in quick succession up to now
    at: int = -1  # update of the last rollback
    to: int = -1  # update of the snapshot it went back to, -1 for the start

    def observe(self, accept_rate: float, config: RollbackConfig) -> bool:
        """Take in the accept rate of a rollout; whether the drafter is now suspected to have collapsed."""
        self.checks += 1
        smoothed = MOMENTUM * self.accept_rate + (1 - MOMENTUM) * accept_rate
        self.accept_rate = accept_rate if self.checks == 1 else smoothed
        if self.checks < config.settle:
            return False
        self.best = max(self.best, self.accept_rate)
        return self.accept_rate < config.collapse * self.best

    def acquit(self, good_accept_rate: float) -> None:
        """The traffic changed: measure by what is now known to be possible."""
        self.best = max(self.accept_rate, good_accept_rate)

    def is_good(self, step: int) -> bool:
        """Whether the snapshot of update `step` may be gone back to.

        Not one that a rollback went past, nor the one it went to if that held for a short time only.
        """
        return step > self.at or step < self.to or (step == self.to and self.checks >= QUICK)

    def roll_back(self, at: int, to: int | None, config: RollbackConfig) -> None:
        """Note a rollback at update `at` to the snapshot of `to` (None: the start); `UserError` for one too many."""
        self.quick = self.quick + 1 if self.rollbacks and self.checks < QUICK else 1
        if self.quick > config.at_most:
            raise UserError(
                f"learning does not hold: after {config.at_most} rollbacks in quick succession update {at} asks for"
                " another. Lower the learning rates or look at the data; the snapshots stay"
            )
        self.rollbacks += 1
        self.at, self.to, self.checks = at, -1 if to is None else to, 0


def non_finite_updates(state: LearnerState | DistillState) -> int:
    """Updates skipped in a row up to now, the slow ones apart from the others: the longer row of the two."""
    slow = state.slow if isinstance(state, LearnerState) else None
    return max(failing_updates(state), 0 if slow is None else int(slow.optimizer.notfinite_count))


def failing_updates(state: LearnerState | DistillState) -> int:
    """Updates of the drafter skipped in a row up to now."""
    return int(state.optimizer.notfinite_count)


def go_on_from(good: State, now: State) -> State:
    """`good` as the next state of a run that has come to `now`: its counts of updates and its rng go on."""
    optimizer = good.optimizer._replace(total_notfinite=now.optimizer.total_notfinite)
    if isinstance(now, LearnerState):
        return good.replace(optimizer=optimizer, step=now.step, key=now.key)
    return good.replace(optimizer=optimizer, step=now.step)
