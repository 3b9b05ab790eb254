"""The guard around every optimiser: nothing that is not finite gets through, however often it is tried."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dvi_jax.learn.fast_update import LearnerState
from dvi_jax.learn.optimizer import guarded
from dvi_jax.learn.replay import Replay
from dvi_jax.learn.rollback import failing_updates, non_finite_updates
from dvi_jax.learn.slow_update import SlowState

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
