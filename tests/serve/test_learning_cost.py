"""What learning while serving costs: how long an update takes, what it is of, and what share of the time it gets."""

import time
from dataclasses import replace

import pytest

from dvi_jax.serve import candidate as candidate_module
from dvi_jax.serve import learner as learner_module
from dvi_jax.serve.requests import EngineStatus, Request
from tests.serve.traffic import SETTINGS, requests


def watched_updates(learner, monkeypatch):
    """A learner that always has enough to learn from, but whose updates only note what they would be of."""
    begun = []
    monkeypatch.setattr(learner._candidate, "has_enough", lambda: True)
    monkeypatch.setattr(learner._candidate, "begin_update", lambda rate, first_drafts: begun.append(first_drafts))
    learner._candidate.seconds, learner._candidate.seconds_of_first = 0.01, 0.004
    return begun


@pytest.mark.parametrize(
    ("gain", "least", "most"),
    [
        (0.0, 0.018, 0.025),
        (0.03, 0.018, 0.025),
        (0.08, 0.048, 0.055),
        (1.0, 0.095, 0.105),
        (None, 0.095, 0.105),
    ],
)
def test_learning_takes_a_part_of_what_it_brings(new_model, make_learner, monkeypatch, gain, least, most):
    """Of ten seconds; with what is saved up at the beginning."""
    now = [0.0]
    learner = make_learner(new_model, settings=replace(SETTINGS, share=0.1), clock=lambda: now[0])
    begun = watched_updates(learner, monkeypatch)
    status = EngineStatus(4, running=4, waiting=0, context=96, plan="chain:2", gain=gain)
    while now[0] < 10:
        now[0] += 0.005
        learner.turn(status, idle=False)
    assert least < learner.status.seconds / 10 < most
    assert learner.status.seconds == pytest.approx((0.004 if gain == 0 else 0.01) * len(begun))
    assert begun == [gain == 0] * len(begun)


def test_windows_that_are_kept_are_a_part_of_learning(new_model, make_learner, monkeypatch):
    """The host has less time for rounds then; but what takes long waits for something else.

    What an engine hands over as it warms up compiles programs, and first weights are charged with their windows.
    """
    now, keeping = [0.0], 0.002
    learner = make_learner(new_model, settings=replace(SETTINGS, share=0.1), clock=lambda: now[0])
    begun = watched_updates(learner, monkeypatch)
    monkeypatch.setattr(learner._candidate, "wants_more", lambda: True)
    monkeypatch.setattr(learner._candidate, "take", lambda ended: now.__setitem__(0, now[0] + keeping))
    learner.take(None, Request((), 0))
    with monkeypatch.context() as patch:
        patch.setattr(candidate_module.Candidate, "is_beginning", True)
        learner.take(None, requests()[0])
    assert learner.status.seconds == 0
    for _ in range(50):
        learner.take(None, requests()[0])
    assert learner.status.seconds == pytest.approx(0.1)
    status = EngineStatus(4, running=4, waiting=0, context=96, plan="chain:2")
    for wait, updates in ((0.7, 0), (0.3, 1)):  # until 0.1 of the time is as much
        now[0] += wait
        learner.turn(status, idle=False)
        assert len(begun) == updates
    keeping, spent = 5.0, learner.status.seconds
    learner.take(None, requests()[0])
    assert learner.status.seconds == pytest.approx(spent + learner_module.MOST_KEEPING)


def test_updates_of_more_windows_than_drafters_are_compared_on(model, some_ended):
    """There are fewer positions to compare on than an update looks at."""
    settings = replace(SETTINGS, fresh_windows=candidate_module.COMPARED + 2, replay_capacity=32, positions=1 << 20)
    candidate = candidate_module.Candidate(model, settings, 96, time.monotonic)
    for ended in some_ended:
        candidate.take(ended)
    same = candidate.state.served
    good, live, error = candidate.agreements(same, same)
    assert good == live
    assert error == 0


def test_who_learns_first_drafts_alone(model, new_model, make_learner, monkeypatch):
    """A new drafter, while others wait for the device and rounds have a draft at most; all drafts now and then.

    A trained one would unlearn its other drafts. What is tried in vain does not count.
    """
    most, every = learner_module.FIRST_DRAFTS, learner_module.ALL_DRAFTS
    assert most % every == 0
    for tried, plan, gain, updates, idle, expected in (
        (new_model, "plain", 0.0, 0, False, True),
        (new_model, "plain", 0.0, most - 1, False, True),
        (new_model, "plain", 0.0, most, False, False),
        (new_model, "plain", 0.0, most + 1, False, True),
        (new_model, "tree:4", 0.0, most - 1, False, True),
        (new_model, "chain:1", 0.05, every + 1, False, True),
        (new_model, "chain:1", 0.05, every, False, False),
        (new_model, "chain:1", 0.05, most + 1, False, True),
        (new_model, "chain:2", 0.05, 1, False, False),
        (new_model, "plain", 0.0, 0, True, False),
        (model, "plain", 0.0, 1, False, False),
    ):
        status = EngineStatus(4, running=4, waiting=0, context=96, plan=plan, gain=gain)
        learner = make_learner(tried)
        begun = watched_updates(learner, monkeypatch)
        learner.status = replace(learner.status, updates=updates)
        learner.turn(status, idle=idle)
        assert begun == [expected]


@pytest.mark.parametrize(
    ("alone", "behind", "expected"),
    [
        ((4.0, 0.004, 6.0), (0.016, 5.0, 3.0), 0.003),  # hiccups cost no learning
        ((0.005, 3.0, 0.004), (0.006, 0.02, 0.03), 0.002),  # too good to be true
        ((0.5, 0.4, 0.6), (), 0.4),  # by itself
    ],
)
def test_how_long_an_update_takes(make_model, alone, behind, expected):
    """The quickest of one alone, and of five one behind the other, in seconds."""
    moments = [0.0, 60.0]  # while one is compiled
    for seconds in (*alone, *behind):
        moments += [moments[-1] + 1, moments[-1] + 1 + seconds]
    times = iter(moments * 2)  # of all drafts, and of first ones
    candidate = candidate_module.Candidate(make_model(drafter="fused"), SETTINGS, 96, lambda: next(times))
    assert (candidate.seconds, candidate.seconds_of_first) == (pytest.approx(expected), pytest.approx(expected))


def test_updates_of_first_drafts_learn_these(make_model, make_learner, some_ended):
    """On the same windows, from the same drafter, they come to the loss of a learner that knows no other drafts."""
    model, found = make_model(drafter="fused"), {}
    for steps, first_drafts in ((3, True), (3, False), (1, False)):
        objective = replace(SETTINGS.objective, unroll_steps=steps)
        candidate = make_learner(model, settings=replace(SETTINGS, objective=objective))._candidate
        for ended in some_ended[:4]:
            candidate.take(ended)
        candidate.begin_update(1.0, first_drafts=first_drafts)
        found[steps, first_drafts] = candidate.look().values["loss"]
    assert found[3, True] == pytest.approx(found[1, False], rel=1e-6)
    assert found[3, True] != pytest.approx(found[3, False], rel=1e-3)


def test_a_drafter_that_makes_all_drafts_alike_has_updates_of_one_kind(new_model, make_learner):
    """A second program would be compiled in vain."""
    candidate = make_learner(new_model)._candidate
    assert candidate.seconds_of_first == candidate.seconds
