"""Learning while serving: replies stay as they are, the drafter gets better, and what makes it worse is taken back."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from dvi_jax.errors import UserError
from dvi_jax.serve import candidate as candidate_module
from dvi_jax.serve import learner as learner_module
from dvi_jax.serve import learning
from dvi_jax.serve.learner import TRIAL_UPDATES
from dvi_jax.serve.requests import EngineStatus
from dvi_jax.serve.shadow import BLOCK, ENOUGH, LEAST, Verdict
from tests.serve.server.live import until
from tests.serve.traffic import SETTINGS, Failed, equal, requests, serve, turned

PROGRAMS = (learning.update, learning.compare)


def test_replies_stay_and_drafts_get_better(new_model, make_engine, make_learner, pieces_of, monkeypatch):
    monkeypatch.setattr(learner_module, "SWAP_SECONDS", 0.0)
    with make_engine(new_model) as engine:
        (frozen, before), again = (serve(engine, requests(), pieces_of) for _ in range(2))
    assert again == (frozen, before)
    learner = make_learner(settings=replace(SETTINGS, branches=8))
    digest, rates = learner.status.digest, []
    compiled = [program._cache_size() for program in PROGRAMS]
    with make_engine(new_model, learner=learner) as engine:
        while learner.status.updates < 30:
            replies, rate = serve(engine, requests(), pieces_of)
            assert replies == frozen
            rates.append(rate)
        assert engine.drain(30)
    status = learner.status
    assert [program._cache_size() for program in PROGRAMS] == compiled
    assert before < 0.8
    assert rates[-1] > before + 0.5  # 1.5 of 2 are reached
    assert status.state == "learning"
    assert status.updates <= status.windows <= 2 * (status.updates + 2)  # one update under way, and one to come
    assert 64 <= status.learned_positions <= 64 * status.updates
    assert status.swaps > 10
    assert digest != status.digest
    assert {kind for kind, _ in learner.records} >= {"update", "held"}


def go_bad(learner, params):
    """As if updates had led there: weights go live, with an optimiser that has moved on."""
    trainable = {"drafter": params.drafter, "lora_s": params.lora_s}
    candidate, state = learner._candidate, learner._candidate.state
    optimizer = jax.tree.map(lambda leaf: leaf + 1 if leaf.dtype != bool else leaf, state.optimizer)
    step = state.step + 7
    candidate.state = state.replace(trainable=trainable, average=trainable, step=step, optimizer=optimizer)
    learner._swap()


def test_a_harmful_drafter_is_taken_back(model, make_engine, make_learner, pieces_of, train_noise, monkeypatch):
    """Traffic finds it out, windows confirm it; the good one's weights are back in every bit, and learn more slowly."""
    learner = make_learner(model)
    monkeypatch.setattr(learner._candidate, "has_enough", lambda: False)  # no update comes between
    good = learner._good
    with make_engine(model, learner=learner) as engine:
        before = [serve(engine, requests(), pieces_of) for _ in range(4)][-1]
        until(lambda: not engine.status().running)  # its thread is done with the learner's state
        go_bad(learner, train_noise(model.params, "drafter", seed=1, std=1.0))
        engine.swap(learner.params())
        replies, harmed = serve(engine, requests(), pieces_of)
        assert replies == before[0]
        assert harmed < 0.5 * before[1]
        assert learner.status.digest != f"{int(learning.checksum(good.trainable)):08x}"
        until(lambda: serve(engine, requests(), pieces_of) and learner.status.rollbacks, 60)
        assert serve(engine, requests(), pieces_of) == before
    (values,) = [values for kind, values in learner.records if kind == "rollback"]
    assert values["live_agreement"] < values["good_agreement"]
    assert values["accept_rate"] < values["accept_rate_before"]
    assert learner.status.rollbacks == 1
    assert learner.status.digest == f"{int(learning.checksum(good.trainable)):08x}"
    assert equal(learner.params().drafter, model.params.drafter)
    state = learner._candidate.state
    assert equal(state.trainable, good.trainable)
    assert int(state.step) == 7  # updates only count up
    now, then = (jax.tree.leaves(one.optimizer) for one in (state, good))
    assert equal(now[:2] + now[3:], then[:2] + then[3:])  # all but the count of updates skipped since the start
    assert learner._rate(0) < learner._usual_rate(0)


@pytest.mark.parametrize(("trained", "updates", "cautious"), [(True, 16, 100), (False, 16, 20), (False, 1000, 20)])
def test_a_new_drafter_is_cautious_for_a_short_time(model, new_model, make_learner, trained, updates, cautious):
    learner = make_learner(model if trained else new_model)
    learner.status = replace(learner.status, updates=updates)
    learner._take_back({"reason": "a test's"})
    later = range(updates, updates + 300)
    assert [learner._rate(step) < learner._usual_rate(step) for step in later] == [n < cautious for n in range(300)]


def test_windows_decide_what_traffic_does_not(model, make_learner, train_noise, some_ended, monkeypatch):
    """After many updates in which no draft was judged: a worse drafter is taken back, an equal one is good."""
    learner = make_learner(model)
    monkeypatch.setattr(learner._candidate, "has_enough", lambda: False)  # no update comes between
    for ended in some_ended:
        learner.take(ended, requests()[0])

    stretches = itertools.count()

    def turn():
        status = EngineStatus(4, running=0, waiting=0, context=96, plan="plain", stretches=next(stretches))
        return learner.turn(status, idle=True)

    for params, kind in [(model.params, "held"), (train_noise(model.params, "drafter", std=1.0), "rollback")]:
        go_bad(learner, params)
        assert turn() is not None  # live, on trial
        assert turn() is None
        learner.status = replace(learner.status, updates=learner.status.updates + TRIAL_UPDATES)
        assert (turn() is not None) == (kind == "rollback")
        assert learner.records[-1][0] == kind


def test_what_goes_live_late_in_a_trial_is_not_good_by_it(model, make_learner, train_noise, some_ended, monkeypatch):
    """A harmful drafter behind a harmless one, whose trial it ends: its own drafts find it out."""
    learner = make_learner(model)
    monkeypatch.setattr(learner._candidate, "has_enough", lambda: False)
    for ended in some_ended:
        learner.take(ended, requests()[0])
    judged = accepted = stretches = 0
    settled = []  # accept rates on trial when the device was waited for

    def settle():
        settled.append(learner._shadow.rates[1])
        return status()

    def status():
        counts = {"judged": (judged,), "accepted": (accepted,), "stretches": stretches}
        return EngineStatus(4, running=4, waiting=0, context=96, plan="chain:2", **counts)

    def traffic(rate, blocks):
        """Stretches of a block of drafts each; the newest kind of record."""
        nonlocal judged, accepted, stretches
        for _ in range(blocks):
            judged, accepted, stretches = judged + BLOCK, accepted + round(rate * BLOCK), stretches + 1
            learner.turn(status(), idle=True, settle=settle)
        return learner.records[-1][0] if learner.records else None

    traffic(0.6, ENOUGH)
    go_bad(learner, model.params)
    traffic(0.6, ENOUGH)  # the stretch in which it went live counts for what was live before
    assert not learner.records
    go_bad(learner, train_noise(model.params, "drafter", std=1.0))
    assert traffic(0.1, 1) == "held"
    assert not settled  # where nothing is taken back, nothing need be waited for
    assert traffic(0.1, LEAST + 2) == "rollback"
    assert settled == [pytest.approx(0.1)]
    assert equal(learner.params().drafter, model.params.drafter)


def test_a_suspicion_that_the_last_stretch_clears_decides_nothing(model, make_learner, monkeypatch):
    learner, told = make_learner(model), {"stretches": 0, "judged": (0,), "accepted": (0,)}
    monkeypatch.setattr(learner._candidate, "has_enough", lambda: False)

    def more(rate):
        told["stretches"] += 1
        told["judged"], told["accepted"] = (told["judged"][0] + 100,), (told["accepted"][0] + round(100 * rate),)

    def settle():
        more(0.99)
        return EngineStatus(4, running=0, waiting=0, context=96, plan="chain:2", **told)

    for rates, what in [([0.6] * 12, None), ([0.6] + [0.45] * 3, "swap"), ([0.45], "suspicion")]:
        if what == "swap":
            go_bad(learner, model.params)
        for rate in rates:
            more(rate)
            turned(learner, settle, **told)
    assert learner._shadow.verdict() is Verdict.OPEN
    assert learner._shadow.on_trial
    assert not {kind for kind, _ in learner.records} & {"held", "rollback"}


def test_what_was_drafted_before_a_swap_is_not_on_its_trial(model, make_learner, monkeypatch):
    """A stretch may be under way when weights change: what it judged counts for those before."""
    learner = make_learner(model)
    monkeypatch.setattr(learner._candidate, "has_enough", lambda: False)

    def turn(stretches, judged, accepted):
        counts = {"stretches": stretches, "judged": (judged,), "accepted": (accepted,)}
        learner.turn(EngineStatus(4, running=4, waiting=0, context=96, plan="chain:1", **counts), idle=False)
        return learner._shadow.rates

    assert turn(1, 100, 50) == (0.5, None)
    go_bad(learner, model.params)
    assert turn(1, 100, 50) == (0.5, None)
    assert turn(2, 200, 110) == (0.5, None)
    assert turn(3, 300, 120) == (0.5, 0.1)


def test_drafts_are_judged_as_the_plan_that_made_them(model, make_learner):
    """Those of a try are there when decoding is plain again; those of another plan are told apart."""
    learner, found = make_learner(model), []
    for look, plan in enumerate(["plain", "tree:4", "plain", "plain", "chain:1", "chain:1", "plain"], 1):
        counts = {"judged": (100 * look,), "accepted": (50 * look,), "stretches": look}
        learner.turn(EngineStatus(4, running=4, waiting=0, context=96, plan=plan, **counts), idle=False)
        found.append({plan: len(rates) for plan, rates in learner._shadow._good.items() if plan})
    assert found[1:4] == [{"tree:4": 1}, {"tree:4": 2}, {"tree:4": 3}]
    assert found[4] == found[3]  # of either
    assert found[5:] == [{"tree:4": 3, "chain:1": 1}, {"tree:4": 3, "chain:1": 2}]


def test_chance_takes_nothing_back(model, make_learner, monkeypatch):
    """Traffic that looks worse is not enough, nor is what windows say within three standard errors."""
    for good, live, suspected, kind in (
        (0.50, 0.45, True, "traffic_changed"),
        (0.50, 0.43, True, "rollback"),
        (0.50, 0.45, False, "held"),
        (0.50, 0.43, False, "rollback"),
    ):
        learner = make_learner(model)
        go_bad(learner, model.params)
        learner.turn(EngineStatus(4, running=0, waiting=0, context=96, plan="plain"), idle=True)
        agreements = (good, live, 0.02)
        monkeypatch.setattr(learner._candidate, "agreements", lambda *_, agreements=agreements: agreements)
        learner._decide(suspected=suspected)
        assert learner.records[0][0] == kind


def test_who_opts_out_is_not_learned_from(model, make_engine, make_learner, pieces_of):
    learner = make_learner()
    with make_engine(model, learner=learner) as engine:
        for _ in range(5):
            serve(engine, requests(learn=False), pieces_of)
        assert (learner.status.windows, learner.status.updates) == (0, 0)
        assert not np.asarray(learner._candidate.replay.windows.tokens).any()
        while not learner.status.updates:
            serve(engine, [*requests(learn=False), requests()[0]], pieces_of)
    windows = learner._candidate.replay.windows  # while the engine is there, another reply uses up the arrays
    asked = requests()[0].prompt_ids
    for tokens, length in zip(np.asarray(windows.tokens), np.asarray(windows.length), strict=True):
        assert length == 0 or tuple(tokens[:12].tolist()) == asked


def test_an_idle_engine_learns_on(model, make_engine, make_learner, pieces_of):
    """What lies ready when the last reply has ended is learned without another request."""
    learner = make_learner(settings=replace(SETTINGS, share=1e-6))
    with make_engine(model, learner=learner) as engine:
        for count in (1, 2, 3):  # the share allows one at the most
            serve(engine, requests(), pieces_of)
            until(lambda count=count: learner.status.updates >= count)


def test_a_model_whose_replies_learning_would_change(new_model, make_learner):
    with_lora_d = new_model.with_params(new_model.params._replace(lora_d={"layers": np.zeros(1)}))
    with pytest.raises(UserError, match=r"has a lora_D, whose learning would change replies"):
        make_learner(with_lora_d)


def test_a_failure_stops_learning_once(model, make_learner, train_noise):
    """Looked at turn after turn, it is told of once; what is drafted with, and its digest, are the good drafter's."""
    learner = make_learner(model)
    good = learner.status.digest
    go_bad(learner, train_noise(model.params, "drafter", std=1.0))
    learner._digest = Failed()
    status = EngineStatus(4, running=0, waiting=0, context=96, plan="plain")
    params = [learner.turn(status, idle=True) for _ in range(3)]
    assert [kind for kind, _ in learner.records].count("stopped") == 1
    assert params.count(None) == 3  # the engine never had another one
    assert learner.status.digest == good
    assert equal(learner.params().drafter, model.params.drafter)


@pytest.mark.parametrize("what", ["an update", "a window, as is seen later"])
def test_a_device_without_memory_stops_learning_alone(model, make_engine, make_learner, pieces_of, monkeypatch, what):
    learner = make_learner()
    if what == "an update":
        monkeypatch.setattr(candidate_module, "update", lambda *_, **__: int(Failed()))
    else:
        keep = candidate_module.keep
        monkeypatch.setattr(candidate_module, "keep", lambda *given, **named: (keep(*given, **named)[0], Failed()))
    with make_engine(model, learner=learner) as engine:
        until(lambda: serve(engine, requests(), pieces_of) and learner.status.state != "learning")
        assert learner.status.state == "stopped: RESOURCE_EXHAUSTED: out of memory"
        assert serve(engine, requests(), pieces_of)
        assert engine.status().failure is None
