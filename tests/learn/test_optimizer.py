"""The guard around every optimiser, through which nothing gets that is not finite, and the optimiser of matrices."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dvi_jax.checkpoint import Manifest
from dvi_jax.config import OptimizerConfig
from dvi_jax.errors import UserError
from dvi_jax.learn.fast_update import LearnerState, make_optimizer
from dvi_jax.learn.optimizer import guarded, maps_apart
from dvi_jax.learn.replay import Replay
from dvi_jax.learn.rollback import failing_updates, non_finite_updates
from dvi_jax.learn.slow_update import SlowState
from dvi_jax.loading import build_model
from dvi_jax.model.drafters import DRAFTERS
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import split
from dvi_jax.presets import TINY

WEIGHTS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3e38)}
GOOD = {"a": jnp.array([0.5, 0.5]), "b": jnp.array(0.0)}


def test_no_number_of_bad_updates_gets_through():
    """optax's own guard applies the sixth of five that it allows."""
    optimizer = guarded(optax.sgd(1.0, momentum=0.5), 1e9)
    update = jax.jit(optimizer.update)
    state = optimizer.init(WEIGHTS)
    for number, bad in enumerate([np.nan, np.inf, -np.inf] * 4, 1):
        updates, state = update(GOOD | {"a": jnp.array([0.5, bad])}, state, WEIGHTS)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
        assert (int(state.notfinite_count), int(state.total_notfinite)) == (number, number)
    updates, state = update(GOOD, state, WEIGHTS)
    np.testing.assert_array_equal(updates["a"], [-0.5, -0.5])  # no momentum of the bad ones
    assert (int(state.notfinite_count), int(state.total_notfinite)) == (0, 12)


def test_a_finite_gradient_that_makes_a_weight_infinite_is_skipped():
    optimizer = guarded(optax.sgd(1e38), 1.0)
    updates, state = optimizer.update(GOOD | {"b": jnp.array(-0.9)}, optimizer.init(WEIGHTS), WEIGHTS)
    assert float(updates["b"]) == 0.0
    assert int(state.notfinite_count) == 1


def test_bad_slow_updates_are_seen_and_withhold_no_snapshot():
    def counted(bad):
        state = guarded(optax.sgd(1.0), 1.0).init(WEIGHTS)
        return state._replace(notfinite_count=jnp.int32(bad))

    def learner(fast, slow):
        slow_state = SlowState({}, counted(slow), jnp.int32(0))
        replay = Replay.empty(1, 2, 2)
        return LearnerState({}, counted(fast), replay, jnp.float32(0), jnp.int32(0), jax.random.key(0), slow_state)

    assert [(failing_updates(s), non_finite_updates(s)) for s in (learner(0, 3), learner(2, 1))] == [(0, 3), (2, 2)]


def test_muon_moves_a_matrix_alike_in_all_directions():
    """Against the singular value decomposition of the gradient; tables, vectors and lora_S move as by AdamW."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape) @ np.diag(0.5 ** np.arange(shape[-1])), jnp.float32)

    shapes = {"fuse": (8, 6), "qkv": (5, 12), "blocks": (2, 7, 5), "markov_before": (9, 4), "norm": (6,)}
    weights = {"drafter": {name: random(*shape) for name, shape in shapes.items()}, "lora_s": {"a": random(3, 4)}}
    gradient = {"drafter": {name: random(*shape) for name, shape in shapes.items()}, "lora_s": {"a": random(3, 4)}}
    config = OptimizerConfig(matrices="muon", head_lr=0.3, lora_lr=0.1, warmup=2, weight_decay=0.0, clip_norm=1e9)
    moved, by_adam = (
        optimizer.update(gradient, optimizer.init(weights), weights)[0]
        for optimizer in (make_optimizer(config), make_optimizer(replace(config, matrices="adamw")))
    )
    for name in ("fuse", "qkv", "blocks"):
        step, all_of_it = (np.asarray(tree["drafter"].pop(name)) for tree in (moved, gradient))
        by_adam["drafter"].pop(name)
        if step.ndim == 3:  # one of a stack
            step, all_of_it = step[1], all_of_it[1]
        left, values, right = np.linalg.svd(all_of_it, full_matrices=False)
        assert values[0] > 10 * values[-1]
        size = 0.15 * 0.2 * np.sqrt(max(step.shape))  # half of the rate, and of Adam's usual size
        step = left.T @ step @ right.T / size
        np.testing.assert_allclose(step, np.diag(np.diagonal(step)), atol=0.05)
        assert np.all((np.diagonal(step) < -0.6) & (np.diagonal(step) > -1.3))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4), moved, by_adam)


@pytest.mark.parametrize("kind", sorted(DRAFTERS))
def test_no_row_of_a_token_is_a_part_of_a_map(kind):
    """Of any drafter: all matrices are maps of states but those with a row for each token, or for each place."""
    options = {"markov_rank": 5} if "markov_rank" in DRAFTERS[kind].Options.__dataclass_fields__ else {}
    drafter = {"exit_layer": 1, "drafter": kind, "drafter_config": options}
    manifest = Manifest(source="random", source_sha256="", dtype="float32", **drafter)

    config = replace(TINY, vocab_size=71)  # as large as nothing else

    def params():
        return split(build_model(config, manifest, random_base(config, jax.random.key(0), jnp.float32)))[1]

    leaves = jax.tree.leaves_with_path(jax.eval_shape(params).drafter)
    labels = jax.tree.leaves(maps_apart({"drafter": jax.eval_shape(params).drafter})["drafter"])
    for (path, leaf), label in zip(leaves, labels, strict=True):
        is_table = config.vocab_size in leaf.shape or "places" in jax.tree_util.keystr(path)
        is_map = len(leaf.shape) > 1 and not is_table
        assert label == ("maps" if is_map else "drafter"), path


def test_an_optimiser_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"optimizer\.matrices.*adamw or muon"):
        OptimizerConfig(matrices="sgd")
