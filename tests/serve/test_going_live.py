"""What of a learner's updates drafts, and when: averages, swaps, the digest that is shown."""

import gc
import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from dvi_jax.serve import candidate as candidate_module
from dvi_jax.serve import learner as learner_module
from dvi_jax.serve import learning
from dvi_jax.serve.learner import POOLED
from dvi_jax.serve.requests import EngineStatus
from tests.serve.server.live import until
from tests.serve.traffic import Failed, equal, requests, turned


def test_an_average_of_a_trained_drafter_drafts(model, make_learner, some_ended, monkeypatch):
    """Of four updates' weights, by hand; one from nothing has none."""
    learner, found, new, enough = make_learner(model), [], None, itertools.cycle([True, False])
    monkeypatch.setattr(learner._candidate, "has_enough", lambda: next(enough))
    for ended in some_ended:
        learner.take(ended, requests()[0])
    for _ in range(POOLED):
        assert new is None
        status = EngineStatus(4, running=0, waiting=0, context=96, plan="plain")
        assert learner.turn(status, idle=True) is None  # an update is begun,
        until(lambda: learner._candidate.has_updated)
        found.append(jax.device_get(learner._candidate.state.trainable["drafter"]))
        new = learner.turn(status, idle=True)  # and looked at
    expected = jax.device_get(model.params.drafter)
    for weights in found:
        expected = jax.tree.map(lambda average, each: 0.97 * average + 0.03 * each, expected, weights)
    for drafts, by_hand, last in zip(*map(jax.tree.leaves, (new.drafter, expected, found[-1])), strict=True):
        np.testing.assert_allclose(drafts, by_hand, atol=1e-6)
        assert np.abs(drafts - last).max() > 1e-4
    assert make_learner()._candidate.state.average is None


@pytest.mark.parametrize(
    ("before", "seconds", "swaps", "left"), [(100, 0.12, 2, True), (100, 0.6, 10, False), (0, 0.12, 10, False)]
)
def test_a_drafter_goes_live_a_few_times_a_second(make_learner, some_ended, monkeypatch, before, seconds, swaps, left):
    """Of ten updates so far apart, after so many; what the last one taught does so too, though nothing more is learned.

    One that is young does so after each.
    """
    now = [0.0]
    learner = make_learner(clock=lambda: now[0])
    learner.status, last = replace(learner.status, updates=before), before + 10
    monkeypatch.setattr(learner._candidate, "has_enough", lambda: learner.status.updates < last)
    for ended in some_ended:
        learner.take(ended, requests()[0])
    while learner.status.updates < last:
        turned(learner)
        until(lambda: learner._candidate.has_updated or learner.status.updates == last)
        now[0] += seconds
    assert learner.status.swaps == swaps
    newest = learner._candidate.point()
    assert equal(learner._live.served, newest.served) != left
    now[0] += learner_module.SWAP_SECONDS
    until(learner.has_work)
    turned(learner)
    assert equal(learner._live.served, newest.served)
    assert learner.status.swaps == swaps + left


def test_a_young_drafter_waits_where_nothing_is_drafted(make_learner, some_ended, monkeypatch):
    """Of ten updates, 0.12 seconds apart, the first, the sixth and what is new when rounds draft again go live."""
    now, live_after = [0.0], []
    learner = make_learner(clock=lambda: now[0])
    for ended in some_ended:
        learner.take(ended, requests()[0])
    monkeypatch.setattr(learner._candidate, "has_enough", lambda: learner.status.updates < 10)
    while learner.status.updates < 10:
        now[0] += 0.12
        turned(learner, plan="plain")
        until(lambda: learner._candidate.has_updated or learner.status.updates == 10)
        if learner.status.swaps > len(live_after):
            live_after.append(learner.status.updates)
    turned(learner, plan="plain")
    assert live_after == [1, 6]
    assert learner.status.swaps == 2
    turned(learner)
    assert learner.status.swaps == 3
    assert equal(learner._live.served, learner._candidate.point().served)


def test_what_was_under_way_when_learning_stopped_goes_nowhere(make_learner, some_ended, monkeypatch):
    learner = make_learner()
    for ended in some_ended:
        learner.take(ended, requests()[0])
    until(learner.has_work)
    turned(learner)
    assert learner._candidate.is_updating
    until(learner._candidate.wants_more)  # the device has been given it
    monkeypatch.setattr(candidate_module, "keep", lambda *_, **__: int(Failed()))
    learner.take(some_ended[0], requests()[0])
    assert learner.status.state.startswith("stopped")
    until(lambda: learner._candidate.has_updated)
    assert turned(learner) is None
    assert learner._live is learner._good
    assert (learner.status.swaps, learner.status.updates) == (0, 0)


def test_the_digest_shown_is_the_live_drafters(make_learner, some_ended):
    """While nothing is asked, and at the end."""
    learner = make_learner()
    for ended in some_ended:
        learner.take(ended, requests()[0])
    until(learner.has_work)
    while (
        not learner.status.swaps or learner.has_work() or learner._candidate.is_updating or learner._digest is not None
    ):
        turned(learner)  # as an idle engine does while there is work
    assert learner.status.digest == f"{int(learning.checksum(learner._live.served)):08x}"
    state, progress = learner.finish()
    assert progress["digest"] == f"{int(learning.checksum(state.served)):08x}"


def test_memory_is_counted_as_what_is_live(make_learner, some_ended, monkeypatch):
    """While a young drafter goes live again and again during a trial, which keeps the most states."""
    counted, live, update = [], [], candidate_module.update

    def noted(*given, **named):
        live.append(held())
        return update(*given, **named)

    def held():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    monkeypatch.setattr(candidate_module, "check_room", lambda size, what: counted.append(size))
    noted.lower = update.lower
    monkeypatch.setattr(candidate_module, "update", noted)
    before = held()
    learner = make_learner()
    while learner.status.swaps < 4:
        for ended in some_ended:
            learner.take(ended, requests()[0])
        until(learner.has_work)
        turned(learner)
    # Logits of an update are no arrays of ours: the verifier's, a draft's and its gradient, at 64 positions.
    most = counted.pop() - 3 * 64 * learner.params().base["llama"]["embed"].shape[0] * 4
    assert not counted
    drafter = sum(leaf.nbytes for leaf in jax.tree.leaves(learner.params().drafter))
    assert most - 12 * drafter < max(live) - before + 2 * drafter <= most  # an engine's own, and gradients
