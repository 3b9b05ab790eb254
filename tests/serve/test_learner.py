"""Learning while serving: replies stay as they are, the drafter gets better, and what makes it worse is taken back."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dvi_jax.config import OptimizerConfig, SamplingConfig
from dvi_jax.errors import UserError
from dvi_jax.learn import fast_update
from dvi_jax.serve import learning
from dvi_jax.serve.learner import Learner, LearnSettings
from dvi_jax.serve.requests import Request
from tests.serve.server.live import until

pytestmark = pytest.mark.optimized  # the engine's own tests have compiled these programs
PROGRAMS = (fast_update._fast_update, learning.keep, learning.newest, learning.moved, learning.compare)
SETTINGS = LearnSettings(
    share=0.9,
    window=64,
    fresh_windows=2,
    replayed_windows=2,
    positions=64,
    replay_capacity=16,
    optimizer=OptimizerConfig(lora_lr=1e-2, head_lr=1e-2, warmup=0),
)


def requests(learn=True):
    """Six that come again and again: greedy and sampled."""
    rng = np.random.default_rng(0)
    return [
        Request(
            prompt_ids=tuple(rng.integers(2, 258, 12).tolist()),
            max_new_tokens=50,
            sampling=SamplingConfig(temperature=0.5, seed=index) if index % 3 == 2 else None,
            eos_ids=(),
            learn=learn,
        )
        for index in range(6)
    ]


def serve(engine, asked, pieces_of):
    """All replies' ids, and the accept rate of their drafts."""
    handles = [engine.submit(request) for request in asked]
    replies = [pieces_of(handle)[0] for handle in handles]
    drafts = [(handle.statistics.accepted, handle.statistics.rounds) for handle in handles]
    accepted, rounds = np.sum(drafts, axis=0)
    return replies, accepted / rounds  # drafts accepted in a round, of two


@pytest.fixture(scope="module")
def new_model(model):
    """As if its drafter had never been trained, so that it learns quickly."""
    return replace(model, drafter_is_trained=False)


@pytest.fixture
def make_learner(new_model):
    """make_learner(...): one whose records are kept in `records`."""

    def make(model=new_model, settings=SETTINGS, **options):
        records = []
        learner = Learner(model, settings, 96, report=lambda kind, step, values: records.append((kind, values)), **options)
        learner.records = records
        return learner

    return make


def kinds(learner):
    return [kind for kind, _ in learner.records]


def equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_replies_stay_and_drafts_get_better(model, make_engine, make_learner, pieces_of):
    with make_engine(model) as engine:
        frozen = [serve(engine, requests(), pieces_of) for _ in range(2)]
    assert frozen[0] == frozen[1]
    learner = make_learner()
    digest, compiled = learner.status.digest, None
    with make_engine(model, learner=learner, warm_up=True) as engine:
        rates = []
        while learner.status.updates < 150:
            replies, rate = serve(engine, requests(), pieces_of)
            assert replies == frozen[0][0]
            rates.append(rate)
            compiled = compiled or [program._cache_size() for program in PROGRAMS]
        assert [program._cache_size() for program in PROGRAMS] == compiled
        assert engine.drain(30)
    status = learner.status
    assert np.mean(rates[-3:]) > frozen[0][1] + 0.3
    assert status.state == "learning"
    assert status.windows >= 6 * len(rates)
    assert 0 < status.learned_positions <= 64 * status.updates
    assert status.swaps > 10
    assert digest != status.digest
    assert {"update", "held"} <= set(kinds(learner))


def test_a_harmful_drafter_is_taken_back(model, make_engine, make_learner, pieces_of, train_noise):
    """Noise goes live as if updates had made it; traffic finds it out, windows confirm it."""
    learner = make_learner(settings=replace(SETTINGS, positions=10**6))  # never enough for an update of its own
    learner._positions_wanted = 10**9
    with make_engine(model, learner=learner) as engine:
        _, before = serve(engine, requests() * 10, pieces_of)
        bad = train_noise(model.params, "drafter", seed=1, std=1.0)
        learner._state = learner._state.replace(
            trainable={"drafter": bad.drafter, "lora_s": bad.lora_s}, step=learner._state.step + 7
        )
        good = learner._good
        learner._swap()
        engine.swap(learner.params())
        _, harmed = serve(engine, requests(), pieces_of)
        assert harmed < 0.5 * before
        for _ in range(20):
            replies, rate = serve(engine, requests(), pieces_of)
            if learner.status.rollbacks:
                break
        replies, rate = serve(engine, requests(), pieces_of)
    assert learner.status.rollbacks == 1
    assert rate == before
    (values,) = [values for kind, values in learner.records if kind == "rollback"]
    assert values["live_agreement"] < values["good_agreement"]
    assert learner._live is good
    assert equal(learner.params().drafter, model.params.drafter)
    assert equal(learner._state.trainable, good.trainable)
    assert equal(learner._state.optimizer, good.optimizer)
    assert int(learner._state.step) == 7  # updates only count up
    assert learner._rate(0) < learner._usual_rate(0)


def test_windows_decide_without_traffic(make_learner, new_model, train_noise):
    """After many updates that no traffic has judged: a worse drafter is taken back, an equal one is kept."""


def test_who_opts_out_is_not_learned_from(model, make_engine, make_learner, pieces_of):
    learner = make_learner()
    with make_engine(model, learner=learner) as engine:
        for _ in range(5):
            serve(engine, requests(learn=False), pieces_of)
        assert (learner.status.windows, learner.status.updates) == (0, 0)
        assert not np.asarray(learner._state.replay.windows.tokens).any()
        while not learner.status.updates:
            serve(engine, [*requests(learn=False), requests()[0]], pieces_of)
        windows = learner._state.replay.windows
    asked = requests()[0].prompt_ids
    for tokens, length in zip(np.asarray(windows.tokens), np.asarray(windows.length), strict=True):
        assert length == 0 or tuple(tokens[:12].tolist()) == asked


def test_an_idle_engine_learns_on(model, make_engine, make_learner, pieces_of):
    """What lies ready when the last reply has ended is learned without another request."""
    learner = make_learner(settings=replace(SETTINGS, share=1e-6))
    with make_engine(model, learner=learner) as engine:
        serve(engine, requests(), pieces_of)
        until(lambda: learner.status.updates >= 1)


def test_a_long_reply_is_cut_to_its_newest_positions(new_model, make_engine, pieces_of):
    full, learner = [], Learner(new_model, SETTINGS, 96)

    class Both:
        has_work, turn = staticmethod(lambda: False), staticmethod(lambda *_, **__: None)

        @staticmethod
        def take(windows, request):
            full.append(jax.device_get(windows))
            learner.take(windows, request)

    with make_engine(new_model, learner=Both) as engine:
        reply = pieces_of(engine.submit(Request((5, 6, 7), 80, eos_ids=())))[0]
    kept = jax.device_get(learning.newest(learner._state.replay, 1))
    assert (kept.length[0], kept.prompt_length[0]) == (64, 0)
    assert kept.tokens[0].tolist() == [5, 6, 7, *reply][-64:]
    for name in ("proposal", "reward", "step"):
        assert np.array_equal(getattr(kept, name)[0], getattr(full[0], name)[0, 19:83])
    assert np.array_equal(kept.features.final[0], full[0].features.final[0, 19:83])


def test_a_model_whose_replies_learning_would_change(new_model, make_learner):
    with_lora_d = new_model.with_params(new_model.params._replace(lora_d={"layers": np.zeros(1)}))
    with pytest.raises(UserError, match=r"has a lora_D, whose learning would change replies"):
        make_learner(with_lora_d)


def test_a_device_without_memory_stops_learning_alone(model, make_engine, make_learner, pieces_of, monkeypatch):
    learner = make_learner()

    def fails(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of\nmemory")

    monkeypatch.setattr(learner, "_fast_update", fails)
    with make_engine(model, learner=learner) as engine:
        until(lambda: serve(engine, requests(), pieces_of) and learner.status.state != "learning")
        assert learner.status.state == "stopped: RESOURCE_EXHAUSTED: out of memory"
        assert serve(engine, requests(), pieces_of)
        assert engine.status().failure is None
