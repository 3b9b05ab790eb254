"""What the devices of a mesh tell each other inside a pass: those along `model`, and at the end those along `data`.

Each has `shards`-th parts of heads, feed-forward and vocabulary (`mesh.py`). In a round every sum is made of parts in
one order on all devices, wherever a row lies, so that a row's bits depend on no other: parts are exchanged, not sums.
The kernel that comes next adds them up, as it does those of a product on one device.

Letters: n devices, P parts, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dvi_jax.mesh import DATA, MODEL
from dvi_jax.model import peer_memory
from dvi_jax.model.peer_memory import Inbox

_alone = False  # `each_alone`


def inbox_for(parts: int, rows: int, size: int) -> Inbox | None:
    """For the `joined_parts` of a pass, [parts, rows, size] each at the most: peer memory, if that serves here.

    Not where a batch is split too: an inbox is opened by all devices of the mesh together, and a device whose sequences
    have ended makes no more passes, while others go on.
    """
    if _alone or jax.lax.axis_size(DATA) > 1 or not peer_memory.is_available():
        return None
    if not peer_memory.takes(parts, rows, size):
        return None
    return peer_memory.new_inbox(parts, rows, size)


def joined_parts(
    parts: jax.Array, rows: int | None = None, inbox: Inbox | None = None
) -> tuple[jax.Array, Inbox | None]:
    """Parts float32 [P, ..., D] of this device's share of sums -> of the whole sums, [n * P, ..., D] in order.

    Of parts [P, R, D] only the first `rows` rows, if given. Through the `inbox` if there is one, which comes back for
    the exchange after.
    """
    if inbox is not None:
        return peer_memory.joined_parts(parts, parts.shape[1] if rows is None else rows, inbox)
    return _gathered(parts[:, :rows], axis=0), None


def summed(parts: jax.Array) -> jax.Array:
    """The same as one part [1, ..., D], for many rows: half the bytes with more devices, in whatever order."""
    return _sum(jnp.sum(parts, axis=0, keepdims=True))


def looked_up(rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding [V, D], of which `rows` [V/n, D] are here, for int tokens [...]: [..., D], exact."""
    local = tokens - first_id(rows.shape[0])
    inside = (local >= 0) & (local < rows.shape[0])
    found = jnp.where(inside[..., None], rows[jnp.clip(local, 0, rows.shape[0] - 1)], 0)
    return _sum(found)


def first_id(count: int) -> jax.Array:
    """The first token of the `count` that this device has of the vocabulary."""
    return jax.lax.axis_index(MODEL) * count


def whole(columns: jax.Array) -> jax.Array:
    """[..., V] from each device's [..., V/n]."""
    return _gathered(columns, axis=columns.ndim - 1)


def sum_in_order(tree: Any, axis: str) -> Any:
    """Sums over the devices along `axis`, of every array; the terms added in the order of the devices, on any network.

    Each device adds up a part of every array and hands it to the others: no more bytes than a ring would send.
    """
    count = jax.lax.axis_size(axis)

    def one(x: jax.Array) -> jax.Array:
        parts = jnp.pad(x.ravel(), (0, -x.size % count)).reshape(count, -1)
        mine = jnp.sum(jax.lax.all_to_all(parts, axis, 0, 0), axis=0)
        return jax.lax.all_gather(mine, axis, axis=0, tiled=True)[: x.size].reshape(x.shape)

    return tree if count == 1 else jax.tree.map(one, tree)


def from_each(numbers: jax.Array) -> jax.Array:
    """[n, ...]: what each device has, in one message."""
    return _gathered(numbers[None], axis=0)


@contextlib.contextmanager
def each_alone() -> Iterator[None]:
    """What is traced inside exchanges nothing: each device takes its own part for everybody's."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _gathered(x: jax.Array, axis: int) -> jax.Array:
    """What all devices have, one after the other along `axis`."""
    if _alone:
        return jnp.concatenate([x] * jax.lax.axis_size(MODEL), axis=axis)
    return jax.lax.all_gather(x, MODEL, axis=axis, tiled=True)


def _sum(x: jax.Array) -> jax.Array:
    return x if _alone else jax.lax.psum(x, MODEL)
