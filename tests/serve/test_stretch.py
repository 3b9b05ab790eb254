"""Which rounds of a stretch were of use, as a choice of plans is told."""

import numpy as np
import pytest

from dvi_jax.decode.plan import PLAIN, Plan
from dvi_jax.serve import engine as engine_module
from dvi_jax.serve.plans import OnePlan
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.requests import Request
from dvi_jax.serve.stretch import RoundsOfUse, Stretch

CHAIN, TREE = Plan("chain", 2), Plan("tree", 8)


class Told(OnePlan):
    """Notes what it is told."""

    def __init__(self, plan, width, piece=0):
        super().__init__(plan, width, piece)
        self.counts = []

    def count(self, plan, used, computed):
        self.counts.append((plan, used, computed))


def stretch(plan, *replies, somebody_waits=True):
    """Of four rounds; slots 3, 4 and so on."""
    return Stretch([], plan, dict(enumerate(replies, 3)), set(), 4, somebody_waits)


@pytest.fixture
def replies():
    return [Reply(Request((5, index), 9), (), None, lambda: None) for index in range(3)]


def test_what_nobody_knew_would_end_is_not_the_next_plans(replies):
    choice = Told(PLAIN, 3)
    use, (one, other, third) = RoundsOfUse(choice), replies
    use.landed(stretch(CHAIN, one, other, third), np.full((3, 4), 2))
    one.end("length")
    use.landed(stretch(PLAIN, one, other, third), np.array([[1, 1, 1, 1], [1, 1, 0, 0]]))
    other.end("cancelled")
    use.landed(stretch(TREE, one, other, third), np.ones((1, 4), int))
    assert choice.counts == [(CHAIN, 12, 12), (CHAIN, 0, 4), (PLAIN, 6, 8), (PLAIN, 0, 4), (TREE, 4, 4)]


def test_a_slot_that_nobody_waits_for_loses_nothing(replies):
    choice = Told(PLAIN, 3)
    use = RoundsOfUse(choice)
    use.landed(stretch(CHAIN, *replies), np.ones((3, 4), int))
    for reply in replies:
        reply.end("length")
    use.landed(stretch(CHAIN, *replies, somebody_waits=False), np.ones((0, 4), int))
    assert choice.counts == [(CHAIN, 12, 12)]


def test_a_reply_that_was_not_there_before_ended_by_no_plan(replies):
    """Its first token was its last, which is read when a stretch has been started for it."""
    choice = Told(PLAIN, 3)
    use, (one, *others) = RoundsOfUse(choice), replies
    use.landed(stretch(CHAIN, one), np.ones((1, 4), int))
    others[0].end("length")
    use.landed(stretch(CHAIN, one, *others), np.ones((2, 4), int))
    assert choice.counts == [(CHAIN, 4, 4), (CHAIN, 8, 8)]


@pytest.mark.parametrize("plan", ["plain", "chain:2"])
def test_of_one_slot_what_is_given_up_counts(model, make_engine, pieces_of, monkeypatch, plan):
    """A stretch that was started for a reply that had ended is read by nobody. Every token's round is of use."""
    monkeypatch.setattr("dvi_jax.serve.plans.piece_rounds", lambda *_: 2)
    choice = Told(Plan.parse(plan), 3, piece=2)
    monkeypatch.setattr(engine_module, "choose", lambda model, plans, width, slots, **_: (choice, slots))
    with make_engine(model, slots=1, plan=plan, ahead=True) as engine:
        handles = [engine.submit(Request((5, 9, index), 6 + index, eos_ids=())) for index in range(12)]
        for handle in handles:
            pieces_of(handle)
        assert engine.drain(10)
        status = engine.status()
    used, computed = (sum(count[place] for count in choice.counts) for place in (1, 2))
    assert 0 < used <= status.rounds
    assert used <= computed <= status.slot_rounds
    lost = sum(computed for _, used, computed in choice.counts if not used)
    assert (lost > 0) == (plan != "plain")  # of plain ones the end is known, and the slot another's behind it
