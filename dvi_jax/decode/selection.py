"""The largest entries of an array, in kernels that fit a round of decoding.

On a GPU `jax.lax.top_k` takes 20 to 140 microseconds for a row of logits, and no less than 10 for the few nodes of a
tree; these take 2 to 4 microseconds an entry, or two small kernels. All give the same, the first among equals first.
What a greedy drafter wants of its logits is `model/peaks.py`'s.
Letters: N entries, K of them wanted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def top(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of logits [..., N] and their indices int32, [..., K] each, the largest first."""
    if jax.default_backend() == "cpu":
        values, index = jax.lax.top_k(x, count)
        return values, index.astype(jnp.int32)
    return repeated_argmax(x, count)


def repeated_argmax(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`top` by one argmax after the other: for a handful out of many."""
    values, indices = [], []
    for _ in range(count):
        index = jnp.argmax(x, axis=-1, keepdims=True)
        values.append(jnp.take_along_axis(x, index, axis=-1))
        indices.append(index)
        x = jnp.where(jnp.arange(x.shape[-1]) == index, -jnp.inf, x)
    return jnp.concatenate(values, axis=-1), jnp.concatenate(indices, axis=-1).astype(jnp.int32)


def ranks(x: jax.Array) -> jax.Array:
    """int32 [..., N]: how many entries come before each when the largest is first. For some hundreds of entries."""
    index = jnp.arange(x.shape[-1])
    mine, other = x[..., :, None], x[..., None, :]
    before = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return jnp.sum(before, axis=-1, dtype=jnp.int32)


def at_places(places: jax.Array, count: int) -> jax.Array:
    """int32 [..., K]: for each place below `count` the entry that has it; places int32 [..., N], distinct below it."""
    index = jnp.arange(places.shape[-1], dtype=jnp.int32)
    is_here = places[..., None, :] == jnp.arange(count)[:, None]
    return jnp.sum(jnp.where(is_here, index, 0), axis=-1, dtype=jnp.int32)
