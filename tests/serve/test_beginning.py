"""A drafter from nothing: first weights from the first replies, then updates by an optimiser of its own."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from optax.contrib import MuonState

from dvi_jax.errors import UserError
from dvi_jax.learn.first_weights import NormalEquations, added, solved
from dvi_jax.serve import candidate as candidate_module
from dvi_jax.serve import learner as learner_module
from dvi_jax.serve.candidate import PATIENCE, SOLVE_AT
from dvi_jax.serve.ended import take_window
from dvi_jax.serve.learning import newest_positions
from tests.serve.server.live import until
from tests.serve.traffic import SETTINGS, Collecting, equal, random_requests, requests, serve, turned


@pytest.fixture(scope="module")
def fused(make_model):
    return replace(make_model(drafter="fused"), drafter_is_trained=False)


@pytest.fixture(scope="module")
def many_ended(fused, make_engine, pieces_of):
    """What a learner gets of sixty replies."""
    learner = Collecting()
    with make_engine(fused, learner=learner) as engine:
        serve(engine, random_requests(60, seed=1), pieces_of)
    return learner.ended


def keep(learner, ended):
    """A reply, until the device has come to what is kept of it."""
    learner.take(ended, requests()[0])
    until(lambda: all(window.length.is_ready() for window in learner._candidate._arriving))


def test_first_weights_come_before_updates(fused, make_learner, many_ended, monkeypatch):
    """Each time from all replies so far, each of which counts once; updates go on from the last of them."""
    monkeypatch.setattr(learner_module, "SWAP_SECONDS", 0.0)
    learner, found = make_learner(fused, settings=replace(SETTINGS, share=1e-6)), []
    add, solve = (jax.jit(partial(work, fused.definition)) for work in (added, solved))
    equations, rows, learned = NormalEquations.empty(fused), 0, 0
    inputs = len(equations.gram)
    for ended in many_ended:
        if len(found) == len(SOLVE_AT):
            break
        windows = newest_positions(take_window(ended), SETTINGS.window)
        equations, rows = add(fused.params, equations, windows), rows + int(windows.length[0])
        keep(learner, ended)
        turned(learner)
        assert learner._candidate.is_updating == (rows - learned >= SOLVE_AT[len(found)] * inputs)
        if learner._candidate.is_updating:
            until(lambda: learner._candidate.has_updated)
            new = turned(learner)  # looked at, and live
            expected = solve(fused.params, equations)
            jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4), new.drafter, expected)
            learned = learner.status.learned_positions
            assert learned == rows
            assert equal(learner._good.trainable["drafter"], new.drafter)  # what was before is not gone back to
            found += [record for record in learner.records[-2:] if record[0] == "solved"]
    assert [(kind, values["rate"], values["grad_norm"]) for kind, values in found] == 3 * [("solved", 1.0, 0.0)]
    agreements = [values["agreement"] for _, values in found]
    assert agreements[0] > 5 / 258

    for ended in many_ended[:4]:
        learner.take(ended, requests()[0])
    until(lambda: (turned(learner), learner.status.updates > len(SOLVE_AT))[1])
    assert learner._candidate.state.trainable["drafter"]["drafter"]["out"].any()  # which first weights leave zero


def test_replies_stay_while_a_drafter_begins(fused, make_engine, make_learner, pieces_of):
    asked = random_requests(30, seed=2)
    with make_engine(fused) as engine:
        alone = [serve(engine, asked, pieces_of)[0] for _ in range(2)]
    learner = make_learner(fused)
    with make_engine(fused, learner=learner) as engine:
        replies = []
        while learner.status.updates <= len(SOLVE_AT):
            replies.append(serve(engine, asked, pieces_of)[0])
    assert all(each == alone[0] for each in (*alone, *replies))
    assert learner.status.state == "learning"


def test_who_begins_with_first_weights(model, fused, new_model, make_learner, monkeypatch):
    """A drafter that can, and has learned nothing yet, of a model that is not too wide."""
    assert make_learner(fused)._candidate.is_beginning
    for other in (replace(fused, drafter_is_trained=True), new_model, model):
        assert not make_learner(other)._candidate.is_beginning
    learner, state = make_learner(fused), make_learner(fused)._good
    progress = {"updates": 1, "swaps": 1}
    learner.restore(state.replace(step=state.step + 1), progress)
    assert not learner._candidate.is_beginning
    monkeypatch.setattr(candidate_module, "WIDEST_SOLVED", 31)
    assert not make_learner(fused)._candidate.is_beginning


def test_first_weights_that_are_not_finite_move_nothing(fused, make_learner, many_ended):
    learner = make_learner(fused)
    learner._candidate._equations = jax.tree.map(lambda leaf: leaf * np.nan, learner._candidate._equations)
    for ended in many_ended[:20]:
        learner.take(ended, requests()[0])
    until(lambda: (turned(learner), learner.status.updates)[1])
    assert equal(learner.params().drafter, fused.params.drafter)
    state = learner._candidate.state
    assert equal(state.trainable["drafter"], fused.params.drafter)
    assert (int(state.optimizer.notfinite_count), int(state.optimizer.total_notfinite)) == (1, 1)


def test_updates_begin_where_replies_are_rare(fused, make_learner, many_ended):
    """Not before the drafter has first weights; then after a while, however few replies there were."""
    now, replies = [0.0], iter(many_ended)
    learner = make_learner(fused, clock=lambda: now[0])

    def go_on(seconds):
        """A reply after each so many seconds, until an update is done."""
        done = learner.status.updates
        while learner.status.updates == done:
            now[0] += seconds
            keep(learner, next(replies))
            until(lambda: (turned(learner), not learner._candidate.is_updating)[1])

    go_on(PATIENCE)
    assert learner._candidate.is_beginning
    assert not learner._candidate.state.trainable["drafter"]["drafter"]["out"].any()
    go_on(PATIENCE / 2 + 1)
    go_on(1)
    assert not learner._candidate.is_beginning
    assert learner._candidate.state.trainable["drafter"]["drafter"]["out"].any()


def test_what_is_taken_back_does_not_end_the_beginning(fused, make_learner):
    learner = make_learner(fused)
    learner._take_back({"reason": "a test's"})
    assert learner._candidate.is_beginning


def momenta(learner):
    """Shapes of the matrices that Muon moves."""
    states = jax.tree.leaves(learner._candidate.state.optimizer, is_leaf=lambda each: isinstance(each, MuonState))
    return [leaf.shape for state in states if isinstance(state, MuonState) for leaf in jax.tree.leaves(state.mu)]


def test_what_moves_the_weights(model, fused, new_model, make_learner, monkeypatch):
    """Muon the matrices of a drafter from nothing; AdamW a trained one, and where a product of them takes too long."""
    matrices = [leaf.shape for leaf in jax.tree.leaves(fused.params.drafter) if leaf.ndim == 2]
    assert sorted(momenta(make_learner(fused))) == sorted(matrices)
    assert momenta(make_learner(new_model))
    assert not momenta(make_learner(model))
    assert not momenta(make_learner(fused, settings=replace(SETTINGS, matrices="adamw")))
    monkeypatch.setattr(candidate_module, "WIDEST_MUON", 31)
    assert not momenta(make_learner(fused))


def test_settings_of_the_optimiser():
    with pytest.raises(UserError, match=r"^matrices.*adamw or muon"):
        replace(SETTINGS, matrices="sgd")
    with pytest.raises(UserError, match="a learning server's is the setting matrices"):
        replace(SETTINGS, optimizer=replace(SETTINGS.optimizer, matrices="muon"))
