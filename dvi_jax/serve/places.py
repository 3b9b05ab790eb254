"""Small arrays on their way between host and programs, which find them where they lay before.

A GPU gets a program as a graph that XLA has recorded with the addresses of its arrays. If one has moved, every kernel
is recorded anew: four microseconds of the host each, two milliseconds for a prompt's few hundred. What the host gives
is therefore copied into an array that stays, and what it is told is copied out of one. And what a program needs for a
while, its temporaries, must find the same place free each time (`gaps`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Tree = TypeVar("Tree")

GAP_BYTES = tuple(2**power for power in range(8, 18))  # the allocator's smallest block to a turn's largest array
GAPS_EACH = 32  # of a size: more than there are of such arrays at a time


def gaps(devices: Iterable[jax.Device]) -> list[jax.Array]:
    """Places for small arrays in the memory of each of these GPUs: between arrays that are to be kept, -> those.

    An array gets the smallest free place that holds it. Carved out of the large one, from which programs take their
    temporaries, it would push these further back, and they would move again once it is freed.
    """
    kept = []
    for device, size in itertools.product(devices, GAP_BYTES):
        row = [jax.device_put(np.zeros(size, np.uint8), device) for _ in range(2 * GAPS_EACH)]
        kept += jax.block_until_ready(row)[1::2]
    return kept


@partial(jax.jit, donate_argnums=0, keep_unused=True)
def written_over(old: Tree, new: Tree) -> Tree:
    """`new`, in the arrays of `old`, which are used up."""
    return jax.tree.map(jnp.copy, new)


def written_into(place: jax.Array, values: jax.Array) -> jax.Array:
    """`values`, where `place` lay, if a program uses that up.

    Without it a program that reads nothing of an array is not given that, and what takes its place lies elsewhere.
    """
    return jax.lax.dynamic_update_slice(place, values, (0,) * place.ndim)


@jax.jit
def _taken_out(array: jax.Array) -> jax.Array:
    return jnp.copy(array)


def on_its_way(array: jax.Array) -> jax.Array:
    """The same in an array of its own, which the host is sent."""
    copy = _taken_out(array)
    copy.copy_to_host_async()
    return copy


class Places:
    """One array on the device for each kind that the host gives, by shape and dtype."""

    def __init__(self, *, stay: bool) -> None:
        """Not `stay`: on a mesh, where every process gives its own copy; arrays come as they are."""
        self._stay = stay
        self._arrays: dict[tuple[tuple[int, ...], np.dtype], jax.Array] = {}

    def put(self, given: np.ndarray) -> jax.Array | np.ndarray:
        """`given` in the array of its kind. Good until the next of that kind is put."""
        if not self._stay:
            return given
        kind = given.shape, given.dtype
        old = self._arrays.pop(kind, None)
        self._arrays[kind] = array = written_over(jnp.zeros_like(given) if old is None else old, given)
        return array
