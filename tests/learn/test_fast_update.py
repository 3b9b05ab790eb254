"""The fast update on real rollouts of a tiny model: what moves, what must not, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig, ObjectiveConfig, OptimizerConfig
from dvi_jax.decode.generate import generate
from dvi_jax.learn.fast_update import fast_update, init_learner, with_trainable
from dvi_jax.learn.replay import Replay, Windows, push, sample
from dvi_jax.learn.rollout import rollout, window_length

SETTINGS = DecodeConfig(3, 0.0, 24)
OPTIMIZER = OptimizerConfig(lora_lr=5e-3, head_lr=5e-3)
PROMPTS = [[5, 9, 2], [7, 7, 1, 30, 4]]


def update(model, learner, windows, objective, current=True, replayed=0):
    return fast_update(
        model.graphdef,
        model.params,
        learner,
        windows,
        jnp.array(current),
        objective=objective,
        optimizer=OPTIMIZER,
        replayed=replayed,
        positions=40,
    )


def new_learner(model, seed=0):
    window = window_length(SETTINGS, 8)
    return init_learner(model.params, OPTIMIZER, Replay.empty(5, window, 32), jax.random.key(seed))


def test_windows_hold_what_the_loop_did(make_tiny):
    """Tokens, proposals, rewards and verifier states, checked against the generation and the verifier itself."""
    model = make_tiny()
    windows, generations = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
    from dvi_jax.model.speculative_llama import join

    llama = join(model.graphdef, model.params).llama
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
        tokens = jnp.array([generation.output_ids])
        positions = jnp.arange(length)[None]
        expected, _ = llama.deep(llama.shallow(tokens, None, positions)[0], None, positions)
        np.testing.assert_allclose(
            windows.verifier_hidden[row, 1:length].astype(jnp.float32), expected[0, :-1], atol=0.03
        )


def test_only_the_drafter_moves(make_tiny):
    """Every trainable leaf moves; the verifier's own arrays are not even arguments of the gradient."""
    model = make_tiny()
    windows, _ = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
    learner = new_learner(model)
    before = jax.tree.map(np.asarray, learner.trainable)
    base = jax.tree.map(np.asarray, model.params.base)
    for _ in range(2):  # lora's A gets a gradient once B is no longer zero
        learner, _ = update(model, learner, windows, ObjectiveConfig(warmup=0, ramp=1, kl_min=0.5))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.tree.map(np.asarray, learner.trainable))
    assert all(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, base, jax.tree.map(np.asarray, model.params.base))
    assert int(learner.step) == 2


def test_learns_and_stays_lossless(make_tiny):
    """KL falls, drafts get better on the very prompts, and the output does not change by a token."""
    model = make_tiny(seed=3)
    before, _ = generate(model, PROMPTS, SETTINGS, plain=True, eos_ids=())
    learner, first, last = new_learner(model), None, None
    for _ in range(60):
        windows, generations = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
        learner, metrics = update(model, learner, windows, ObjectiveConfig(warmup=1000))
        model = model.with_params(with_trainable(model.params, learner.trainable))
        accepted = sum(g.accepted for g in generations)
        first, last = first or (float(metrics["kl"]), accepted), (float(metrics["kl"]), accepted)
    assert last[0] < 0.5 * first[0]
    assert last[1] > first[1]
    after, _ = generate(model, PROMPTS, SETTINGS, eos_ids=())
    plain, _ = generate(model, PROMPTS, SETTINGS, plain=True, eos_ids=())
    assert [g.output_ids for g in after] == [g.output_ids for g in plain] == [g.output_ids for g in before]


def test_policy_term_only_from_the_current_drafter(make_tiny):
    model = make_tiny()
    windows, _ = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
    objective = ObjectiveConfig(warmup=0, ramp=1, learn_from_prompt=False)
    _, fresh = update(model, new_learner(model), windows, objective, current=True)
    _, stale = update(model, new_learner(model), windows, objective, current=False)
    assert float(fresh["pg"]) != 0.0
    assert float(stale["pg"]) == 0.0
    assert float(stale["baseline"]) == 0.0
    assert float(stale["kl"]) == pytest.approx(float(fresh["kl"]), rel=1e-5)


def test_non_finite_gradient_is_skipped(make_tiny):
    model = make_tiny()
    windows, _ = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
    poisoned = windows.replace(verifier_hidden=windows.verifier_hidden.at[:, 3].set(jnp.nan))
    learner = new_learner(model)
    before = jax.tree.map(np.asarray, learner.trainable)
    learner, metrics = update(model, learner, poisoned, ObjectiveConfig())
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, learner.trainable))
    assert int(metrics["skipped_updates"]) == 1


def test_replay_is_a_ring():
    """Seven one-window pushes into five slots leave the last five, counted."""

    def window(value):
        new = Windows.empty(1, 4, 2)
        return new.replace(tokens=jnp.full((1, 4), value, jnp.int32), length=jnp.array([4]))

    replay = Replay.empty(5, 4, 2)
    for value in range(7):
        replay = push(replay, window(value))
    assert sorted(replay.windows.tokens[:, 0].tolist()) == [2, 3, 4, 5, 6]
    assert (int(replay.size), int(replay.cursor)) == (5, 2)
    partial = push(Replay.empty(5, 4, 2), window(9))
    assert int(partial.size) == 1
    assert set(sample(partial, jax.random.key(0), 20).tokens[:, 0].tolist()) == {9}
