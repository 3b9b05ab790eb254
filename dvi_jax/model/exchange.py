"""What the devices along a mesh's `model` axis tell each other inside a pass.

Each has `shards`-th parts of heads, feed-forward and vocabulary (`mesh.py`). In a round every sum is made of parts in
one order on all devices, wherever a row lies, so that a row's bits depend on no other: parts are exchanged, not sums.
The kernel that comes next adds them up, as it does those of a product on one device.

Letters: n devices, P parts, D hidden, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dvi_jax.mesh import MODEL


def joined_parts(parts: jax.Array) -> jax.Array:
    """Parts float32 [P, ..., D] of this device's share of sums -> of the whole sums, [n * P, ..., D] in order."""
    return jax.lax.all_gather(parts, MODEL, axis=0, tiled=True)


def summed(parts: jax.Array) -> jax.Array:
    """The same as one part [1, ..., D], for many rows: half the bytes with more devices, in whatever order."""
    return jax.lax.psum(jnp.sum(parts, axis=0, keepdims=True), MODEL)


def looked_up(rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding [V, D], of which `rows` [V/n, D] are here, for int tokens [...]: [..., D], exact."""
    local = tokens - first_id(rows.shape[0])
    inside = (local >= 0) & (local < rows.shape[0])
    found = jnp.where(inside[..., None], rows[jnp.clip(local, 0, rows.shape[0] - 1)], 0)
    return jax.lax.psum(found, MODEL)


def first_id(count: int) -> jax.Array:
    """The first token of the `count` that this device has of the vocabulary."""
    return jax.lax.axis_index(MODEL) * count


def whole(columns: jax.Array) -> jax.Array:
    """[..., V] from each device's [..., V/n]."""
    return jax.lax.all_gather(columns, MODEL, axis=columns.ndim - 1, tiled=True)


def from_each(numbers: jax.Array) -> jax.Array:
    """[n, ...]: what each device has, in one message."""
    return jax.lax.all_gather(numbers, MODEL, axis=0)
