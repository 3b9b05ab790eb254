"""Rollout windows and their fixed-capacity FIFO on the device.

A window is a whole generation from its first prompt token, so re-running the shallow layers over it gives the drafter
the very context it acted in. Letters: C capacity, N windows in a batch, T window length, D hidden.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from dvi_jax.decode.state import DecodeState
from dvi_jax.model.features import Features


class Windows(struct.PyTreeNode):
    """Generations with their learning signals, indexed by the position they predict (see `Signals`)."""

    tokens: jax.Array  # int32 [N, T], prompt and answer
    proposal: jax.Array  # int32 [N, T], the draft that was judged here, -1 where there was none
    reward: jax.Array  # int8 [N, T], 1 accepted, 0 rejected, -1 not judged
    step: jax.Array  # int8 [N, T], which draft of its round the proposal was, from 0
    prompt_length: jax.Array  # int32 [N]
    length: jax.Array  # int32 [N], valid positions; 0 marks an empty window
    features: Features  # bfloat16 [N, T, ...], the verifier's of the row before each position

    @classmethod
    def empty(cls, count: int, window: int, hidden_size: int, taps: int) -> Windows:
        """`count` windows of length 0, whose features have so many taps."""
        return cls(
            tokens=jnp.zeros((count, window), jnp.int32),
            proposal=jnp.full((count, window), -1, jnp.int32),
            reward=jnp.full((count, window), -1, jnp.int8),
            step=jnp.zeros((count, window), jnp.int8),
            prompt_length=jnp.zeros(count, jnp.int32),
            length=jnp.zeros(count, jnp.int32),
            features=Features.zeros((count, window, hidden_size), taps, jnp.dtype(jnp.bfloat16)),
        )


class Replay(struct.PyTreeNode):
    """A ring of windows: `cursor` is written next, `size` slots are filled."""

    windows: Windows  # N = C
    cursor: jax.Array  # int32 scalar
    size: jax.Array  # int32 scalar

    @classmethod
    def empty(cls, capacity: int, window: int, hidden_size: int, taps: int = 0) -> Replay:
        """An empty ring."""
        return cls(Windows.empty(capacity, window, hidden_size, taps), jnp.int32(0), jnp.int32(0))


@partial(jax.jit, static_argnames="window")
def read_windows(state: DecodeState, prompt_length: jax.Array, *, window: int) -> Windows:
    """The windows of a finished rollout (a `DecodeState` with signals), cut to `window` positions."""
    signals = state.signals
    assert signals is not None
    return Windows(
        tokens=state.tokens[:, :window],
        proposal=signals.proposal[:, :window],
        reward=signals.reward[:, :window],
        step=signals.step[:, :window],
        prompt_length=prompt_length,
        length=jnp.minimum(state.length, window),
        features=jax.tree.map(lambda x: x[:, :window].astype(jnp.bfloat16), signals.features),
    )


# The ring is donated: a push writes N windows, it does not copy C.
@partial(jax.jit, donate_argnames="replay")
def push(replay: Replay, windows: Windows) -> Replay:
    """Append N windows, overwriting the oldest once the ring is full. N must not exceed the capacity.

    A window whose features are not all finite becomes an empty one: it would spoil every update that drew it.
    """
    capacity, count = replay.windows.length.shape[0], windows.length.shape[0]
    windows = _without_non_finite(windows)
    slots = (replay.cursor + jnp.arange(count)) % capacity
    return Replay(
        jax.tree.map(lambda ring, new: ring.at[slots].set(new), replay.windows, windows),
        (replay.cursor + count) % capacity,
        jnp.minimum(replay.size + count, capacity),
    )


def _without_non_finite(windows: Windows) -> Windows:
    leaves = jax.tree.leaves(windows.features)
    finite = jnp.array([jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves]).all(axis=0)

    def cleared(leaf: jax.Array) -> jax.Array:
        return jnp.where(finite.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)

    return windows.replace(features=jax.tree.map(cleared, windows.features), length=cleared(windows.length))


def sample(replay: Replay, key: jax.Array, count: int) -> Windows:
    """`count` windows drawn uniformly with replacement from the filled slots (empty windows while there are none)."""
    slots = jax.random.randint(key, (count,), 0, jnp.maximum(replay.size, 1))
    return jax.tree.map(lambda ring: ring[slots], replay.windows)
