"""The device's side of learning while serving, beside the fast update: windows kept, weights moved and compared.

Letters: S positions of a slot, T of a window, F newest windows, M positions looked at.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dvi_jax.config import ObjectiveConfig
from dvi_jax.learn.fast_update import Trainable, evaluate_positions, with_trainable
from dvi_jax.learn.objectives import masked_mean
from dvi_jax.learn.replay import Replay, Windows, push
from dvi_jax.model.speculative_llama import Definition, Params, join

Tree = TypeVar("Tree")


@partial(jax.jit, static_argnames="window", donate_argnames="replay")
def keep(replay: Replay, windows: Windows, window: int) -> tuple[Replay, jax.Array]:
    """Put one window of S positions into the replay, cut to its newest `window`; and how many are valid, int32 scalar.

    What is cut off is missing as context, so the first positions after it are learned from a little less of it.
    """
    cut = jnp.maximum(windows.length[0] - window, 0)

    def newest_part(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(leaf, cut, window, axis=1) if leaf.ndim > 1 else leaf

    branches = windows.branches
    windows = jax.tree.map(newest_part, windows.replace(branches=None))
    windows = windows.replace(
        prompt_length=jnp.maximum(windows.prompt_length - cut, 0),
        length=jnp.minimum(windows.length, window),
        branches=branches and branches.replace(position=branches.position - cut),
    )
    replay = push(replay, windows)
    return replay, replay.windows.length[replay.cursor - 1]


@partial(jax.jit, static_argnames="count")
def newest(replay: Replay, count: int) -> Windows:
    """The newest `count` windows, F of them; empty ones while there are fewer."""
    rows = (replay.cursor - 1 - jnp.arange(count)) % replay.windows.length.shape[0]
    return jax.tree.map(lambda ring: ring[rows], replay.windows)


@partial(jax.jit, static_argnames=("definition", "objective", "count"))
def compare(
    definition: Definition,
    params: Params,
    good: Trainable,
    live: Trainable,
    windows: Windows,
    key: jax.Array,
    *,
    objective: ObjectiveConfig,
    count: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How often the first choices of two drafters are the verifier's, at the same M random positions.

    -> float32 scalars: the share of drafts for good, for live, and the standard error of their difference.
    """

    def right(trainable: Trainable) -> tuple[jax.Array, jax.Array]:
        model, nothing = join(definition, with_trainable(params, trainable)), jnp.zeros(windows.length.shape, bool)
        picked = evaluate_positions(model, windows, nothing, key, objective, count)
        top = jnp.argmax(picked.verifier_logits, axis=-1)
        drafts = jnp.stack([jnp.argmax(logits, axis=-1) == top for logits in picked.draft_logits])
        return jnp.mean(drafts.astype(jnp.float32), axis=0), picked.valid

    windows = windows.replace(branches=None)  # as in decoding, where nothing behind a wrong draft counts
    (of_good, valid), (of_live, _) = right(good), right(live)
    difference = of_good - of_live
    spread = masked_mean(jnp.square(difference - masked_mean(difference, valid)), valid)
    error = jnp.sqrt(spread / jnp.maximum(jnp.sum(valid), 1))
    return masked_mean(of_good, valid), masked_mean(of_live, valid), error


@jax.jit
def copied(tree: Tree) -> Tree:
    """The same in arrays of its own, which a donation elsewhere leaves alone."""
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """A uint32 that tells weights apart: any bit of any leaf changes it. Against accidents, not against intent."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).ravel()
        odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1  # odd factors lose no bit
        total = total * jnp.uint32(2654435761) + jnp.sum(bits.astype(jnp.uint32) * odd, dtype=jnp.uint32)
    return total
