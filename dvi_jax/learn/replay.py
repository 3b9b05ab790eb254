"""Rollout windows and their fixed-capacity FIFO on the device.

A window is a whole generation from its first prompt token, so re-running the shallow layers over it gives the drafter
the very context it acted in. Drafts that were not taken (`decode/branches.py`) stand beside it, as many as there is
room for. Letters: C capacity, N windows in a batch, T window length, X branches of a window, D hidden.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from dvi_jax.decode.branches import NO_BRANCH, Branches
from dvi_jax.decode.state import DecodeState
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import join


class WindowBranches(struct.PyTreeNode):
    """Rows of drafts that were verified and not taken, one token off the window's text."""

    position: jax.Array  # int32 [N, X], of the draft, in the window
    token: jax.Array  # int32 [N, X], the draft; NO_BRANCH where there is none
    hidden: jax.Array  # bfloat16 [N, X, D], its exit hidden state
    final: jax.Array  # bfloat16 [N, X, D], the verifier's final hidden state behind it

    @classmethod
    def empty(cls, count: int, room: int, hidden_size: int) -> WindowBranches:
        """None in any of `count` windows."""
        hidden, final = (jnp.zeros((count, room, hidden_size), jnp.bfloat16) for _ in range(2))  # a push donates both
        none = jnp.full((count, room), NO_BRANCH, jnp.int32)
        return cls(jnp.zeros((count, room), jnp.int32), none, hidden, final)

    @classmethod
    def of(cls, branches: Branches, length: jax.Array, room: int) -> WindowBranches:
        """Those behind the first `length` int32 [N] positions; of more than there is room for, evenly spread ones."""
        count, slots, most = branches.tokens.shape
        flat = jax.tree.map(lambda x: x.reshape(count, slots * most, *x.shape[3:]), branches)
        position = jnp.repeat(jnp.arange(slots) - 1, most)
        known = (flat.tokens != NO_BRANCH) & (position < length[:, None])
        # The r-th of n known ones goes to place r; of too many, to r * room / n, where the first stays.
        number, total = jnp.cumsum(known, axis=1) - 1, jnp.sum(known, axis=1, keepdims=True)
        place = number * room // jnp.maximum(total, room)
        is_first = known & (place != jnp.where(number > 0, (number - 1) * room // jnp.maximum(total, room), -1))
        places = jnp.where(is_first, place, room)
        index = jnp.full((count, room), -1, jnp.int32)
        entries = jnp.broadcast_to(jnp.arange(slots * most, dtype=jnp.int32), places.shape)
        index = index.at[jnp.arange(count)[:, None], places].set(entries, mode="drop")
        chosen = jnp.maximum(index, 0)
        token = jnp.where(index < 0, NO_BRANCH, jnp.take_along_axis(flat.tokens, chosen, axis=1))
        states = (jnp.take_along_axis(x, chosen[..., None], axis=1) for x in (flat.hidden, flat.final))
        return cls(position[chosen], token, *(x.astype(jnp.bfloat16) for x in states))


class Windows(struct.PyTreeNode):
    """Generations with their learning signals, indexed by the position they predict (see `Signals`)."""

    tokens: jax.Array  # int32 [N, T], prompt and answer
    proposal: jax.Array  # int32 [N, T], the draft that was judged here, -1 where there was none
    reward: jax.Array  # int8 [N, T], 1 accepted, 0 rejected, -1 not judged
    step: jax.Array  # int8 [N, T], which draft of its round the proposal was, from 0
    prompt_length: jax.Array  # int32 [N]
    length: jax.Array  # int32 [N], valid positions; 0 marks an empty window
    features: Features  # bfloat16 [N, T, ...], the verifier's of the row before each position
    branches: WindowBranches | None = None  # None where nobody learns from them

    @classmethod
    def empty(cls, count: int, window: int, hidden_size: int, taps: int, branches: int = 0) -> Windows:
        """`count` windows of length 0, whose features have so many taps, with room for so many branches."""
        return cls(
            tokens=jnp.zeros((count, window), jnp.int32),
            proposal=jnp.full((count, window), -1, jnp.int32),
            reward=jnp.full((count, window), -1, jnp.int8),
            step=jnp.zeros((count, window), jnp.int8),
            prompt_length=jnp.zeros(count, jnp.int32),
            length=jnp.zeros(count, jnp.int32),
            features=Features.zeros((count, window, hidden_size), taps, jnp.dtype(jnp.bfloat16)),
            branches=WindowBranches.empty(count, branches, hidden_size) if branches else None,
        )


class Replay(struct.PyTreeNode):
    """A ring of windows: `cursor` is written next, `size` slots are filled."""

    windows: Windows  # N = C
    cursor: jax.Array  # int32 scalar
    size: jax.Array  # int32 scalar

    @classmethod
    def empty(cls, capacity: int, window: int, hidden_size: int, taps: int = 0, branches: int = 0) -> Replay:
        """An empty ring of windows as in `Windows.empty`."""
        return cls(Windows.empty(capacity, window, hidden_size, taps, branches), jnp.int32(0), jnp.int32(0))


def window_bytes(window: int, hidden_size: int, taps: int, branches: int) -> int:
    """Bytes of one window of the replay, but for the few that do not grow with it."""
    state = 2 * hidden_size
    return window * (state * (1 + taps) + 10) + branches * (2 * state + 8)


def check_branches(model: LoadedModel, unroll_steps: int) -> None:
    """Raise `UserError` where nothing would be learned from branches.

    So it is in a model whose draft pass is not the verifier's: its exit hidden states are not kept. And where a round's
    first draft alone is learned, since what is learned behind a branch are the drafts after it.
    """
    if join(model.definition, model.params).separate_trunk:
        raise UserError("branches are learned from where lora_S lies outside the shallow layers: set branches to 0")
    if model.drafts_blocks:
        if model.max_drafts == 1:
            raise UserError("behind a branch second drafts are learned, and this drafter makes one: set branches to 0")
    elif unroll_steps < 2:
        raise UserError(
            "behind a branch a round's second draft is learned, and those after it:"
            f" raise objective.unroll_steps above {unroll_steps}, or set branches to 0"
        )


@partial(jax.jit, static_argnames=("window", "branches"))
def read_windows(state: DecodeState, prompt_length: jax.Array, *, window: int, branches: int = 0) -> Windows:
    """The windows of a finished rollout (a `DecodeState` with signals), cut to `window` positions.

    With room for so many `branches` each, which the rollout must have recorded.
    """
    signals = state.signals
    assert signals is not None
    length = jnp.minimum(state.length, window)
    return Windows(
        tokens=state.tokens[:, :window],
        proposal=signals.proposal[:, :window],
        reward=signals.reward[:, :window],
        step=signals.step[:, :window],
        prompt_length=prompt_length,
        length=length,
        features=jax.tree.map(lambda x: x[:, :window].astype(jnp.bfloat16), signals.features),
        branches=WindowBranches.of(signals.branches, length, branches) if signals.branches and branches else None,
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
    leaves = jax.tree.leaves((windows.features, windows.branches))
    finite = jnp.array([jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves]).all(axis=0)

    def cleared(leaf: jax.Array) -> jax.Array:
        return jnp.where(finite.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)

    features, branches = jax.tree.map(cleared, (windows.features, windows.branches))
    return windows.replace(features=features, branches=branches, length=cleared(windows.length))


def sample(replay: Replay, key: jax.Array, count: int) -> Windows:
    """`count` windows drawn uniformly with replacement from the filled slots (empty windows while there are none)."""
    slots = jax.random.randint(key, (count,), 0, jnp.maximum(replay.size, 1))
    return jax.tree.map(lambda ring: ring[slots], replay.windows)
