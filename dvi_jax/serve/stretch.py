"""A stretch of rounds that the device was given, and which of its rounds were of use."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from dvi_jax.decode.plan import Plan
from dvi_jax.serve.plans import PlanChoice
from dvi_jax.serve.reply import Reply


class Stretch(NamedTuple):
    """One that the device was given."""

    packed: list[jax.Array]  # of each piece
    plan: Plan
    replies: dict[int, Reply]  # by the slots that they were in
    fresh: set[int]  # slots of which the drafter has seen every row
    rounds: int  # at most
    somebody_waits: bool  # for a slot, when it was started


class RoundsOfUse:
    """Tells a choice of plans how many rounds were a reply's, where others waited for its slot.

    One that ends gives its slot on with the end of the stretch, or of the next one where that had been started by then.
    """

    def __init__(self, choice: PlanChoice):
        self._choice = choice
        self._before: Stretch | None = None  # the newest that was read

    def landed(self, stretch: Stretch, accept_lengths: np.ndarray) -> None:
        """A stretch was read: tokens [replies, rounds] of those that had not ended by the one before."""
        going_on, rounds = accept_lengths.shape
        self._count_ended(stretch, rounds)
        if stretch.somebody_waits and going_on:
            self._choice.count(stretch.plan, int(np.count_nonzero(accept_lengths)), going_on * rounds)

    def dropped(self, stretch: Stretch) -> None:
        """All replies of a stretch had ended by the one before, and nobody reads it."""
        self._count_ended(stretch, stretch.rounds)

    def _count_ended(self, stretch: Stretch, rounds: int) -> None:
        """So many rounds were computed for replies some of which had ended by the stretch before.

        They are lost by its plan, by which nobody knew that they would. That somebody left says nothing of a plan.
        """
        before, self._before = self._before, stretch
        if not stretch.somebody_waits or before is None:
            return
        held = [reply for slot, reply in stretch.replies.items() if before.replies.get(slot) is reply]
        if ended := sum(reply.finish_reason not in (None, "cancelled") for reply in held):
            self._choice.count(before.plan, 0, ended * rounds)
