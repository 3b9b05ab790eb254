"""The fast update on real rollouts of a tiny model: what moves, what must not, and that it learns."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig, ObjectiveConfig, OptimizerConfig
from dvi_jax.decode.acceptance import measure_acceptance
from dvi_jax.learn.fast_update import (
    Batch,
    Positions,
    choose_windows,
    evaluate_positions,
    fast_loss,
    fast_update,
    init_learner,
    make_optimizer,
    with_trainable,
)
from dvi_jax.learn.replay import Replay, Windows, push, sample
from dvi_jax.learn.rollout import rollout, window_length
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import join

SETTINGS = DecodeConfig(draft_steps=3, max_new_tokens=24)
OPTIMIZER = OptimizerConfig(lora_lr=5e-3, head_lr=5e-3, warmup=0)
PROMPTS = [[5, 9, 2], [7, 7, 1, 30, 4]]
# Every objective is a program of its own. This one is all KL at first, and has the policy's term from ACT on.
ACT = 1000
OBJECTIVE = ObjectiveConfig(warmup=ACT - 1, ramp=1, kl_min=0.5, learn_from_prompt=False)


def update(model, learner, windows, current=True, optimizer=OPTIMIZER, rate=1.0):
    return fast_update(
        model.definition,
        model.params,
        learner,
        windows,
        jnp.array(current),
        objective=OBJECTIVE,
        optimizer=optimizer,
        size=Batch(0, 0, 40),
        rate=rate,
    )


def new_learner(model, step=0, optimizer=OPTIMIZER):
    window = window_length(SETTINGS, 8)
    learner = init_learner(model.params, optimizer, Replay.empty(5, window, 32), jax.random.key(0))
    return learner.replace(step=jnp.int32(step))


def test_windows_hold_what_the_loop_did(make_tiny):
    """Tokens, proposals, rewards and verifier states, checked against the generation and the verifier itself."""
    model = make_tiny()
    windows, generations = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)

    @jax.jit
    def verifier(tokens):
        llama, positions = join(model.definition, model.params).llama, jnp.broadcast_to(jnp.arange(32), (2, 32))
        return llama.deep(llama.shallow(tokens, None, positions)[0], None, positions)[0]

    ids = [generation.output_ids for generation in generations]
    expected = np.asarray(verifier(jnp.array([row + [0] * (32 - len(row)) for row in ids])))
    windows = jax.device_get(windows)
    for row, generation in enumerate(generations):
        length = len(generation.output_ids)
        assert int(windows.length[row]) == length
        assert windows.tokens[row, :length].tolist() == generation.output_ids
        rewards, proposals = windows.reward[row, :length], windows.proposal[row, :length]
        judged = sum(min(d, a) for d, a in zip(generation.drafted, generation.accept_lengths, strict=True))
        assert int((rewards >= 0).sum()) == judged
        assert int((rewards == 1).sum()) == generation.accepted
        is_right = proposals == windows.tokens[row, :length]
        np.testing.assert_array_equal(is_right[rewards >= 0], rewards[rewards >= 0] == 1)
        assert rewards[: len(PROMPTS[row])].tolist() == [-1] * len(PROMPTS[row])
        assert set(windows.reward[row, length:].tolist()) == {-1}  # nothing is judged at the end or beyond
        assert set(windows.proposal[row, length:].tolist()) == {-1}
        features = windows.features.final[row, 1:length].astype(np.float32)
        np.testing.assert_allclose(features, expected[row, : length - 1], atol=0.03)


def test_only_the_drafter_moves(make_tiny):
    """Every trainable leaf moves; the verifier's own arrays are not even arguments of the gradient."""
    model = make_tiny()
    windows, _ = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
    learner = new_learner(model, ACT)
    before = jax.tree.map(np.asarray, learner.trainable)
    base = jax.tree.map(np.asarray, model.params.base)
    for _ in range(2):  # lora's A gets a gradient once B is no longer zero
        learner, _ = update(model, learner, windows)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.tree.map(np.asarray, learner.trainable))
    assert all(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, base, jax.tree.map(np.asarray, model.params.base))
    assert int(learner.step) == ACT + 2


def test_learns_and_stays_lossless(make_tiny, rollout_ids):
    """KL falls, drafts get better on the very prompts, and the output does not change by a token."""
    model = make_tiny(seed=3)
    before = rollout_ids(model, PROMPTS, SETTINGS, longest_prompt=8, plain=True)
    learner, first, last = new_learner(model), None, None
    for _ in range(60):
        windows, generations = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
        learner, metrics = update(model, learner, windows)
        model = model.with_params(with_trainable(model.params, learner.trainable))
        accepted = sum(g.accepted for g in generations)
        first, last = first or (float(metrics["kl"]), accepted), (float(metrics["kl"]), accepted)
    assert last[0] < 0.5 * first[0]
    assert last[1] > first[1]
    fast, plain = (rollout_ids(model, PROMPTS, SETTINGS, longest_prompt=8, plain=p) for p in (False, True))
    assert fast == plain == before


def test_policy_term_only_from_the_current_drafter(make_tiny):
    model = make_tiny()
    windows, generations = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
    learner, fresh = update(model, new_learner(model, ACT), windows, current=True)
    # The baseline moves from 0 towards the share of judged drafts that were accepted, as the generations count them.
    share = measure_acceptance(generations).accept_rate
    assert 0 < share < 1
    assert float(learner.baseline) == pytest.approx(0.05 * share)
    again, _ = update(model, learner, windows, current=True)
    assert float(again.baseline) == pytest.approx(0.05 * share + 0.95 * 0.05 * share)
    _, stale = update(model, new_learner(model, ACT), windows, current=False)
    assert float(fresh["pg"]) != 0.0
    assert float(stale["pg"]) == 0.0
    assert float(stale["baseline"]) == 0.0
    assert float(stale["kl"]) == pytest.approx(float(fresh["kl"]), rel=1e-5)


@pytest.mark.parametrize(("learn_from_prompt", "expected"), [(True, 26 + 28), (False, 23 + 23)])
def test_positions_that_are_learned_from(make_tiny, learn_from_prompt, expected):
    """24 new tokens, of which prefill gave the first; every token of a prompt but its first, or none."""
    model = make_tiny()
    windows, _ = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
    assert windows.length.tolist() == [27, 29]
    objective = ObjectiveConfig(learn_from_prompt=learn_from_prompt)

    @jax.jit
    def positions(windows):
        current, key = jnp.ones(2, bool), jax.random.key(0)
        return evaluate_positions(join(model.definition, model.params), windows, current, key, objective, 60)

    picked = positions(windows)
    assert float(picked.valid.sum()) == expected
    assert float((picked.reward >= 0).sum()) == float((windows.reward >= 0).sum())
    assert not np.asarray(picked.on_policy)[np.asarray(picked.reward) < 0].any()


def test_non_finite_gradient_is_skipped(make_tiny):
    model = make_tiny()
    windows, _ = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
    poisoned = windows.replace(features=Features(windows.features.final.at[:, 9].set(jnp.nan)))
    learner = new_learner(model)
    before = jax.tree.map(np.asarray, learner.trainable)
    learner, metrics = update(model, learner, poisoned)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, learner.trainable))
    assert int(metrics["skipped_updates"]) == 1


def flat(weights):
    """All of them, float64 [N]."""
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(weights)])


def test_half_the_rate_is_half_the_step(make_tiny):
    model = make_tiny()
    windows, _ = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
    start = flat(new_learner(model).trainable)
    whole, half = (
        flat(update(model, new_learner(model), windows, rate=rate)[0].trainable) - start for rate in (1.0, 0.5)
    )
    assert np.abs(whole).max() > 1e-3
    np.testing.assert_allclose(half, whole / 2, atol=1e-6)


def test_the_average_of_the_weights_drafts(make_tiny):
    """Weights move as without one. After n updates it is decay^n w0 + (1 - decay) sum of decay^(n - k) wk."""
    model, optimizer = make_tiny(), replace(OPTIMIZER, average=0.75)
    windows, _ = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
    learner, plain = new_learner(model, optimizer=optimizer), new_learner(model)
    weights, served = [flat(plain.served)], [learner.served]
    for _ in range(3):
        learner, _ = update(model, learner, windows, optimizer=optimizer)
        plain, _ = update(model, plain, windows)
        weights.append(flat(plain.served))
        served.append(learner.served)  # an update leaves it as it is, for whoever decodes with it
    np.testing.assert_allclose(flat(learner.trainable), weights[3], atol=1e-5)
    for average, shares in ((served[0], [1]), (served[2], [0.5625, 0.1875, 0.25])):
        by_hand = sum(share * each for share, each in zip(shares, weights, strict=False))
        np.testing.assert_allclose(flat(average), by_hand, atol=1e-5)
    assert np.abs(flat(learner.served) - weights[3]).max() > 1e-3


def test_warm_up_by_hand():
    """Update n moves by n / warmup of the rate, each part by its own; an update that is skipped does not count."""
    config = OptimizerConfig(lora_lr=0.3, head_lr=0.1, warmup=2, b2=0.9, weight_decay=0.1, clip_norm=1e9)
    optimizer, rng = make_optimizer(config), np.random.default_rng(0)
    weights = {"drafter": {"norm": jnp.array([1.0, -2.0])}, "lora_s": {"a": jnp.array([0.5])}}
    by_hand = {"drafter": np.array([1.0, -2.0]), "lora_s": np.array([0.5])}
    moments = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in by_hand.items()}
    state = optimizer.init(weights)

    @jax.jit
    def step(gradients, state, weights):
        updates, state = optimizer.update(gradients, state, weights)
        return jax.tree.map(jnp.add, weights, updates), state

    for number, share in enumerate((0.5, 1.0, 1.0), 1):
        grads = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), weights)
        for gradients in (grads, jax.tree.map(lambda g: g * jnp.nan, grads)):
            weights, state = step(gradients, state, weights)
        for name, rate in (("drafter", 0.1), ("lora_s", 0.3)):
            g = np.asarray(jax.tree.leaves(grads[name])[0], np.float64)
            m, v = moments[name] = 0.9 * moments[name][0] + 0.1 * g, 0.9 * moments[name][1] + 0.1 * g * g
            moved = m / (1 - 0.9**number) / (np.sqrt(v / (1 - 0.9**number)) + 1e-8)
            by_hand[name] = by_hand[name] - share * rate * (moved + 0.1 * by_hand[name])
            np.testing.assert_allclose(jax.tree.leaves(weights[name])[0], by_hand[name], rtol=1e-5)
    assert int(state.total_notfinite) == 3


@pytest.mark.parametrize(("drafts", "temperature", "entropy_weight"), [(3, 1.0, 0.0), (3, 2.0, 0.3), (1, 1.0, 0.3)])
def test_loss_and_gradient_are_those_of_the_formula(drafts, temperature, entropy_weight):
    """The module's formula from the probabilities themselves, each term on the draft and the positions it is for."""
    weights = {"entropy_weight": entropy_weight, "tv_weight": entropy_weight / 2}
    config = ObjectiveConfig(kl_temperature=temperature, ce_weight=0.7, unroll_decay=0.5, **weights)
    rng, count, vocab = np.random.default_rng(0), 24, 9
    logits = jnp.asarray(3 * rng.normal(size=(drafts, count, vocab)), jnp.float32)
    teacher = jnp.asarray(3 * rng.normal(size=(count, vocab)), jnp.float32)
    reward, proposal = np.arange(count) % 3 - 1, rng.integers(0, vocab, count)
    step, valid = rng.integers(0, 4, count), rng.integers(0, 2, count)  # more drafts may act than are unrolled
    picked = Positions(
        draft_logits=list(logits),
        verifier_logits=teacher,
        proposal=jnp.asarray(np.where(reward < 0, -1, proposal), jnp.int32),
        reward=jnp.asarray(reward, jnp.int8),
        step=jnp.asarray(step, jnp.int8),
        valid=jnp.asarray(valid, jnp.float32),
        on_policy=jnp.asarray(reward >= 0, jnp.float32),
    )

    def formula(logits):
        p, rows = jax.nn.softmax(teacher / temperature), np.arange(count)
        kl = jnp.sum(p * jnp.log(p / jax.nn.softmax(logits / temperature)), axis=-1)[:, valid == 1].mean(axis=1)
        decay = np.array([1, 0.5, 0.25])[:drafts]
        # What they have in common is what total variation leaves.
        common = jnp.minimum(jax.nn.softmax(teacher), jax.nn.softmax(logits)).sum(axis=-1)
        total_variation = 1 - common[:, valid == 1].mean(axis=1)
        q = jax.nn.softmax(logits[np.minimum(step, drafts - 1), rows])
        policy = ((reward - 0.4) * jnp.log(q[rows, proposal]))[reward >= 0]
        accepted = (reward == 1) & (valid == 1)
        terms = {
            "kl": temperature**2 * (decay * kl).sum() / decay.sum(),
            "pg": -policy.mean(),
            "ce": -jnp.log(q[rows, teacher.argmax(-1)])[accepted].mean(),
            "tv": (decay * total_variation).sum() / decay.sum(),
            "entropy": -jnp.sum(q * jnp.log(q), axis=-1)[valid == 1].mean(),
        }
        loss = 0.6 * terms["kl"] + 0.3 * terms["pg"] + 0.7 * terms["ce"]
        return loss + entropy_weight * (terms["tv"] / 2 - terms["entropy"]), terms

    def loss(logits):
        return fast_loss(picked._replace(draft_logits=list(logits)), jnp.float32(0.4), (0.6, 0.3), config)

    (expected, expected_terms), expected_grad = jax.jit(jax.value_and_grad(formula, has_aux=True))(logits)
    (value, terms), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert expected_terms.keys() - terms.keys() == ({"entropy", "tv"} if not entropy_weight else set())
    for name in expected_terms.keys() & terms.keys():
        np.testing.assert_allclose(terms[name], expected_terms[name], rtol=1e-5)
    assert np.abs(expected_grad).max(axis=(1, 2)).min() > 1e-3  # every draft has one
    np.testing.assert_allclose(grad, expected_grad, atol=1e-6)


def test_windows_of_an_update():
    """As many different fresh windows as asked for, another choice each time; then old ones, off-policy."""
    fresh, old = (Windows.empty(6, 4, 2, 0) for _ in range(2))
    fresh = fresh.replace(tokens=jnp.broadcast_to(jnp.arange(6)[:, None], (6, 4)))
    replay = push(Replay.empty(9, 4, 2), old.replace(tokens=jnp.full((6, 4), 99)))
    choose, chosen = jax.jit(choose_windows, static_argnums=4), []
    for seed in range(4):
        windows, on_policy = choose(replay, fresh, jnp.array(True), jax.random.key(seed), Batch(4, 3, 1))
        assert on_policy.tolist() == [True] * 4 + [False] * 3
        assert (windows.tokens[4:] == 99).all()
        chosen.append(tuple(sorted(windows.tokens[:4, 0].tolist())))
        assert len(set(chosen[-1])) == 4
        assert set(chosen[-1]) <= set(range(6))
    assert len(set(chosen)) > 1
    windows, on_policy = choose(replay, fresh, jnp.array(False), jax.random.key(0), Batch(0, 0, 1))
    assert windows.tokens[:, 0].tolist() == list(range(6))
    assert not on_policy.any()


def test_a_window_that_is_not_finite_enters_the_replay_empty():
    features = Features(jnp.ones((2, 4, 2), jnp.bfloat16).at[1, 3, 0].set(jnp.nan))
    windows = Windows.empty(2, 4, 2, 0).replace(features=features, length=jnp.array([4, 4]))
    replay = push(Replay.empty(5, 4, 2), windows).windows
    assert replay.length.tolist() == [4, 0, 0, 0, 0]
    assert replay.features.final.astype(float).sum(axis=(1, 2)).tolist() == [8, 0, 0, 0, 0]


def test_replay_is_a_ring():
    """Seven one-window pushes into five slots leave the last five, counted."""

    def window(value):
        new = Windows.empty(1, 4, 2, 0)
        return new.replace(tokens=jnp.full((1, 4), value, jnp.int32), length=jnp.array([4]))

    replay = Replay.empty(5, 4, 2)
    for value in range(7):
        replay = push(replay, window(value))
    assert sorted(replay.windows.tokens[:, 0].tolist()) == [2, 3, 4, 5, 6]
    assert (int(replay.size), int(replay.cursor)) == (5, 2)
    partial = push(Replay.empty(5, 4, 2), window(9))
    assert int(partial.size) == 1
    assert set(sample(partial, jax.random.key(0), 20).tokens[:, 0].tolist()) == {9}
