"""Attention over a long cache, cut into chunks that are worked on side by side and put together at the end.

The split-KV form of FlashAttention (Flash-Decoding, arXiv 2307.08691). Chunks are fixed ranges of slots, and a row's
result depends on its own position alone. One whose slots all lie in the first chunk has its result when that chunk is
done, and the second kernel has only to see so: most contexts are short, however long the cache is.

Letters: C chunks, B batch, T rows of a sequence, R >= B * T rows in all, N query heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dvi_jax.model.early_start import product_may_start

CHUNK_SLOTS = 512  # slots of a chunk
UNCUT_SLOTS = 1024  # caches up to here are one chunk: a short context is not worth a second kernel
CHUNKS_AT_ONCE = 32  # that are put together by one step
WARPS = 4
MASKED = -1e30  # finite: the maximum of a chunk that a row cannot see must not give inf - inf
Ref = Any  # a pointer into an array; indexing gives another, `plt.load` and `plt.store` use it
Carry = tuple[jax.Array, jax.Array, jax.Array]  # of Q queries: weighted sum of values [Q, H], highest score and sum [Q]


def chunk_count(slots: int) -> int:
    """C: how many chunks a cache of so many slots is cut into."""
    return 1 if slots <= UNCUT_SLOTS else pl.cdiv(slots, CHUNK_SLOTS)


def output_shapes(chunks: int, shape: tuple[int, int, int], dtype: jnp.dtype) -> list[jax.ShapeDtypeStruct]:
    """The rows' attention, `shape` (R, N, H); of several chunks also each one's part, highest scores and weights' sums.

    Rows that reach the first chunk alone are in the attention, the others in the parts.
    """
    whole = jax.ShapeDtypeStruct(shape, dtype)
    if chunks == 1:
        return [whole]
    parts = ((chunks, *shape), (chunks, *shape[:2]), (chunks, *shape[:2]))
    return [whole, *(jax.ShapeDtypeStruct(part, jnp.float32) for part in parts)]


def in_its_chunk(chunks: int, is_reached: jax.Array, work: Callable[[], None]) -> None:
    """A program's `work` where its chunk has a slot that one of its rows sees, which the first of all chunks has.

    Of the others nothing is written: `combine` does not look there. So what a row costs follows its own length, not the
    cache's.
    """
    if chunks == 1:
        work()
    else:
        pl.when(is_reached)(work)


def write(
    outputs: Sequence[Ref],
    carry: Carry,
    row: jax.Array,
    head: jax.Array,
    chunk: jax.Array,
    position: jax.Array,
) -> None:
    """What 16 queries, of `row` and `head` [16] each at `position` [16], have found."""
    mixed, top, weight = carry
    whole, *parts = outputs
    at = (row[:, None], head[:, None], jnp.arange(mixed.shape[1])[None, :])
    found = (mixed / weight[:, None]).astype(whole.dtype)
    if not parts:
        plt.store(whole.at[at], found)
        return
    is_whole = position < CHUNK_SLOTS
    plt.store(whole.at[at], found, mask=(is_whole & (chunk == 0))[:, None])
    plt.store(parts[0].at[(chunk, *at)], mixed, mask=~is_whole[:, None])
    plt.store(parts[1].at[chunk, row, head], top, mask=~is_whole)
    plt.store(parts[2].at[chunk, row, head], weight, mask=~is_whole)


def combine(
    mixed: jax.Array,
    top: jax.Array,
    total: jax.Array,
    positions: jax.Array,
    whole: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Chunks [C, R, N, H] with the maxima and sums of their scores [C, R, N] -> [R, N, H], in the memory of `whole`.

    Of those that the rows at `positions` int32 [B, T] reach: the others hold anything. Rows that reach but one are in
    `whole`, and stay; rows beyond B * T hold anything. A kernel, since how XLA orders a sum may depend on how many rows
    there are.
    """
    chunks, rows, heads, size = mixed.shape
    block = min(pl.next_power_of_2(chunks), CHUNKS_AT_ONCE)
    return pl.pallas_call(
        partial(_combine_kernel, block=block, inline=not interpret),
        grid=(rows, heads),
        out_shape=jax.ShapeDtypeStruct(whole.shape, whole.dtype),
        input_output_aliases={4: 0},
        compiler_params=plt.CompilerParams(num_warps=1 if block * size <= 1024 else WARPS, num_stages=1),
        interpret=interpret,
        name="combine",
    )(mixed, top, total, positions.reshape(-1), whole)


def _combine_kernel(
    mixed: Ref, top: Ref, total: Ref, positions: Ref, whole: Ref, out: Ref, *, block: int, inline: bool
) -> None:
    """One head of one row, `block` chunks at a time; `inline` as in `early_start.next_may_start`.

    `whole` is `out` before.
    """
    chunks, (heads, size) = mixed.shape[0], whole.shape[1:]
    row, head = pl.program_id(0), pl.program_id(1)
    position = plt.load(positions.at[jnp.minimum(row, positions.shape[0] - 1)])
    reached = jnp.minimum(position // CHUNK_SLOTS + 1, chunks)
    column, steps = jnp.arange(size)[None, :], pl.cdiv(reached, block)
    masked = MASKED + product_may_start(jnp.zeros(block, jnp.int32), heads * size, inline=inline).astype(jnp.float32)

    def of_step(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        chunk = step * block + jnp.arange(block)
        return chunk, plt.load(top.at[chunk, row, head], mask=chunk < reached, other=masked)

    def add(highest: jax.Array, step: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chunk, tops = of_step(step)
        weight, there = jnp.exp(tops - highest), chunk < reached
        values = plt.load(mixed.at[chunk[:, None], row, head, column], mask=there[:, None], other=0.0)
        scores = plt.load(total.at[chunk, row, head], mask=there, other=0.0)
        return sums[0] + jnp.sum(values * weight[:, None], axis=0), sums[1] + jnp.sum(scores * weight)

    @pl.when(reached > 1)
    def _() -> None:
        highest = jax.lax.fori_loop(0, steps, lambda step, best: jnp.maximum(best, jnp.max(of_step(step)[1])), MASKED)
        nothing = (jnp.zeros(size, jnp.float32), jnp.float32(0))
        found, weights = jax.lax.fori_loop(0, steps, partial(add, highest), nothing)
        plt.store(out.at[row, head, jnp.arange(size)], (found / weights).astype(out.dtype))
