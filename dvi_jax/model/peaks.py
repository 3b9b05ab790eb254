"""The best few of each row of logits and a sum over all of it: two GPU kernels written in Pallas for Triton.

XLA takes two kernels for every entry and two for every sum, one after the other, and a drafter asks for up to eight
entries behind every node; the largest alone takes it longer than both kernels here, of which one looks at blocks of a
row, and another at what the blocks have found. Entries and their places are exact, so that the verifier's token may be
one of them. Sums decide what is drafted, and nothing else.

Letters: V entries of a row, K of them wanted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dvi_jax.model.early_start import next_may_start
from dvi_jax.model.products import compute_capability

BLOCK = 1024  # entries that one program looks at
WARPS = 4
_AMPERE = (8, 0)
Ref = Any  # a pointer into an array; indexing gives another, `plt.load` and `plt.store` use it


def is_supported() -> bool:
    """Whether the first device has these kernels."""
    return compute_capability() >= _AMPERE


@partial(jax.jit, static_argnames=("count", "interpret"))  # traced and lowered once for all drafts
def peaks(logits: jax.Array, count: int, *, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `count` largest of logits float32 [..., V] and their indices int32, [..., K] each, the first of equals first.

    And float32 [...], the sum of exp(logit - largest logit) over the row. Where a logit is no number, indices are any.
    `interpret` runs the kernels on any device, for tests. They have no derivative.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    size, blocks = len(rows), pl.cdiv(rows.shape[1], BLOCK)
    found = pl.pallas_call(
        partial(_block_kernel, inline=not interpret),
        grid=(size, blocks),
        out_shape=_shapes((size, blocks), count),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="peaks_of_blocks",
    )(rows)
    values, index, total = pl.pallas_call(
        partial(_row_kernel, entries=rows.shape[1], inline=not interpret),
        grid=(size,),
        out_shape=_shapes((size,), count),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="peaks",
    )(*(array.reshape(size, -1) for array in found))
    before = logits.shape[:-1]
    return values.reshape(*before, count), index.reshape(*before, count), total.reshape(before)


def _shapes(before: tuple[int, ...], count: int) -> list[jax.ShapeDtypeStruct]:
    """Values, indices, and the sum."""
    entries = (*before, count)
    return [jax.ShapeDtypeStruct(*of) for of in ((entries, jnp.float32), (entries, jnp.int32), (before, jnp.float32))]


def _block_kernel(logits: Ref, values: Ref, indices: Ref, sums: Ref, *, inline: bool) -> None:
    """One block of a row; `inline` as in `early_start.next_may_start`."""
    row, block, entries = pl.program_id(0), pl.program_id(1), logits.shape[1]
    index, impossible = block * BLOCK + jnp.arange(BLOCK), _impossible(BLOCK, inline=inline)
    found = plt.load(logits.at[row, index], mask=index < entries, other=impossible)
    plt.store(sums.at[row, block], _sum(found, jnp.ones_like(found)))
    _store_largest(found, index, entries, (values, indices), (row, block))


def _row_kernel(
    found: Ref, places: Ref, totals: Ref, values: Ref, indices: Ref, sums: Ref, *, entries: int, inline: bool
) -> None:
    """What the blocks of a row have found: `count` entries of each, and the sums beside the first of these."""
    row, (_, width), blocks = pl.program_id(0), found.shape, totals.shape[1]
    lane = jnp.arange(pl.next_power_of_2(width))
    largest = plt.load(found.at[row, lane], mask=lane < width, other=_impossible(len(lane), inline=inline))
    place = plt.load(places.at[row, lane], mask=lane < width, other=entries)
    count = width // blocks
    is_first = (lane < width) & (lane % count == 0)
    weights = plt.load(totals.at[row, lane // count], mask=is_first, other=0.0)
    plt.store(sums.at[row], _sum(largest, weights))
    _store_largest(largest, place, entries, (values, indices), (row,))


def _impossible(count: int, *, inline: bool) -> jax.Array:
    """Logits of tokens that are none, float32 [count]; not their indices, whose order the compiler is to know."""
    return next_may_start(jnp.zeros(count, jnp.int32), inline=inline).astype(jnp.float32) - jnp.inf


def _sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Of weight * exp(value - largest value), nothing where all are minus infinity."""
    top = jnp.max(values)
    return jnp.sum(jnp.where(values > -jnp.inf, weights * jnp.exp(values - top), 0.0))


def _store_largest(
    values: jax.Array, index: jax.Array, entries: int, outputs: tuple[Ref, Ref], at: tuple[jax.Array, ...]
) -> None:
    """The largest values and their `index`, the first among equals first; each is below `entries` in any case."""
    count = outputs[0].shape[-1]
    lane = jnp.arange(pl.next_power_of_2(count))
    kept, where = jnp.zeros(lane.shape, values.dtype), jnp.zeros(lane.shape, jnp.int32)
    for number in range(count):
        largest = jnp.max(values)
        first = jnp.min(jnp.where(values == largest, index, entries))
        kept = jnp.where(lane == number, largest, kept)
        where = jnp.where(lane == number, jnp.minimum(first, entries - 1), where)
        values = jnp.where(index == first, -jnp.inf, values)
    for output, of in zip(outputs, (kept, where), strict=True):
        plt.store(output.at[(*at, lane)], of, mask=lane < count)
