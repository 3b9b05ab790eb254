"""Products of a round's rows with weights, as GPU kernels written in Pallas for Triton.

Bit-exact losslessness: a row's result does not depend on how many rows are computed beside it. XLA chooses a kernel for
every number of rows, by measuring, so another number may be summed in another order. Here the order is fixed by the
weight's shape alone: `part_count` equal parts of the sum, each worked off from its first term to its last, 16 at a
time, in tiles of 16 rows that the tensor cores treat alike. Sizes of blocks, warps and stages change times, not bits.

A product of a few rows has too few results to occupy a GPU, so its sum is split into parts that are worked on side by
side. They stay apart for the kernel that comes next, which adds them on its way: attention, or sum and norm.

Weights in fewer bits (`quantised.py`) are read as they are and converted in registers; integers and eight-bit floats
are exact in bfloat16. A channel's scale multiplies its finished sum, a group's the sum of the group's terms
(`quantised_products.py`).

Letters: P parts, R rows, K terms of a sum.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dvi_jax.model.eight_bits import widened
from dvi_jax.model.product_blocks import (
    MOST_BLOCK_ROWS,
    MOST_ROWS,
    Blocks,
    Place,
    Ref,
    blocks_for,
    fitted,
    gated_blocks_for,
    padded_rows,
    sum_parts,
)
from dvi_jax.model.products import has_gpu_kernels, linear, total
from dvi_jax.model.quantised import Matrix, Quantised, by_group
from dvi_jax.model.quantised_products import sums_of_groups, sums_of_words


def is_supported(rows: int, dtype: jnp.dtype) -> bool:
    """Whether the kernels take this many rows of this type on the default backend."""
    return has_gpu_kernels(dtype) and rows <= MOST_ROWS


# Traced and lowered once for all layers.
@partial(jax.jit, static_argnames=("parts", "out_dtype", "wanted", "interpret"))
def product(
    x: jax.Array,
    weight: Matrix,
    *,
    parts: int = 1,
    out_dtype: jnp.dtype | None = None,
    wanted: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x [R, in] times weight [out, in] -> [P, R, out]: float32 sums, in `out_dtype` or x's where P is 1.

    R as `padded_rows` has it; of the results, the first `wanted` rows. `interpret` runs the kernel on any device, for
    tests. It has no derivative.
    """
    dtype = jnp.float32 if parts > 1 else jnp.dtype(out_dtype or x.dtype)
    blocks = fitted(blocks_for(weight.shape, parts, len(x)), weight, len(x))
    return _run(_kernel, x, weight, blocks, dtype, wanted or len(x), interpret)


@partial(jax.jit, static_argnames=("interpret",))
def gated_product(x: jax.Array, weight: Matrix, *, interpret: bool = False) -> jax.Array:
    """SwiGLU: silu(x gate) * (x up) for x [R, in] and weight [2F, in], gate's rows before up's -> [R, F].

    Both products are rounded to x's dtype, as is silu's result; R, `interpret` and derivative as for `product`.
    """
    blocks = fitted(gated_blocks_for((weight.shape[0] // 2, weight.shape[1]), len(x)), weight, len(x))
    return _run(_gated_kernel, x, weight, blocks, x.dtype, len(x), interpret)[0]


def round_linear(
    x: jax.Array, weight: Matrix, out_dtype: jnp.dtype | None = None, like: jax.Array | None = None
) -> jax.Array:
    """`products.linear` of a round's rows x [B, T, in], by the kernels where they take them: [B, T, out].

    The rows of `like` [B, T, ...] may be given as `laid_flat` has laid them: [R, in].
    """
    of_round = x if like is None else like
    if x.ndim == 3 and not is_supported(x.shape[0] * x.shape[1], x.dtype):
        return linear(x, weight, out_dtype)
    flat, wanted = laid_flat(x) if x.ndim == 3 else x, of_round.shape[0] * of_round.shape[1]
    parts = product(flat, weight, parts=sum_parts(weight), out_dtype=out_dtype, wanted=wanted)
    return by_sequence(total(parts, out_dtype or x.dtype), of_round)


def laid_flat(x: jax.Array) -> jax.Array:
    """A round's rows [B, T, D] one after the other, filled up with zeros as the kernels want them: [R, D]."""
    rows = x.shape[0] * x.shape[1]
    return jnp.pad(x.reshape(rows, x.shape[2]), ((0, padded_rows(rows) - rows), (0, 0)))


def by_sequence(x: jax.Array, like: jax.Array) -> jax.Array:
    """The rows [B, T, ...] of `like` from [R, D], without what filled them up; [B, T, D] as it is."""
    if x.ndim == 3:
        return x
    batch, rows = like.shape[:2]
    return x[: batch * rows].reshape(batch, rows, x.shape[1])


def _run(
    kernel: Any, x: jax.Array, weight: Matrix, blocks: Blocks, dtype: jnp.dtype, wanted: int, interpret: bool
) -> jax.Array:
    """`kernel` over blocks of rows, columns and parts. [P, `wanted` rows, columns that the result has]."""
    rows, out = len(x), weight.shape[0] // (2 if kernel is _gated_kernel else 1)
    block_rows = min(rows, MOST_BLOCK_ROWS)
    return pl.pallas_call(
        partial(kernel, blocks=blocks, block_rows=block_rows, inline=not interpret),
        # Blocks of rows first: programs that read the same weights run together.
        grid=(rows // block_rows, pl.cdiv(out, blocks.columns), blocks.parts),
        out_shape=jax.ShapeDtypeStruct((blocks.parts, wanted, out), dtype),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="product" if kernel is _kernel else "gated_product",
    )(x, *_arrays(weight))


def _arrays(weight: Matrix) -> list[jax.Array]:
    """What a kernel reads of a weight; what there is for each group by groups."""
    if not isinstance(weight, Quantised):
        return [weight]
    parts = [part for part in weight if part is not None]
    return [parts[0], *(by_group(part) for part in parts[1:])] if weight.is_grouped else parts


def _kernel(x: Ref, *refs: Ref, blocks: Blocks, block_rows: int, inline: bool) -> None:
    """One block of results: all their sums over one part of the terms. `refs`: the weight's arrays, the output."""
    *weight, out = refs
    place = Place.here(out, blocks, block_rows)
    (sums,) = _sums(x, weight, (0,), place, blocks, inline=inline)
    mask = place.inside.T if x.shape[0] == out.shape[1] else place.inside.T & (place.rows < out.shape[1])
    plt.store(out.at[place.part, place.rows, place.columns.T], sums.astype(out.dtype), mask=mask)


def _gated_kernel(x: Ref, *refs: Ref, blocks: Blocks, block_rows: int, inline: bool) -> None:
    """One block of gate's and of up's results, rounded where products and silu by themselves would be."""
    *weight, out = refs
    place = Place.here(out, blocks, block_rows)
    both = _sums(x, weight, (0, out.shape[2]), place, blocks, inline=inline)
    gate, up = (sums.astype(out.dtype).astype(jnp.float32) for sums in both)
    gated = (gate / (1 + jnp.exp(-gate))).astype(out.dtype).astype(jnp.float32) * up
    plt.store(out.at[0, place.rows, place.columns.T], gated.astype(out.dtype), mask=place.inside.T)


def _sums(
    x: Ref, weight: list[Ref], offsets: tuple[int, ...], place: Place, blocks: Blocks, *, inline: bool
) -> tuple[jax.Array, ...]:
    """float32 [block rows, block columns] for each offset into the weight's rows, step by step over one part.

    `inline`: with what only a GPU understands.
    """
    values, *scales = weight
    if scales and len(scales[0].shape) == 2:
        if values.dtype == jnp.uint16:
            return sums_of_words(x, weight, offsets, place, blocks, inline=inline)
        return sums_of_groups(x, weight, offsets, place, blocks, inline=inline)
    length = x.shape[1] // blocks.parts
    whole = length % blocks.step == 0
    zero = 0.0 if jnp.issubdtype(values.dtype, jnp.floating) else 0

    def step(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        term = index * blocks.step + jnp.arange(blocks.step)[None, :]
        at, there = place.part * length + term, term < length
        left = plt.load(x.at[place.rows, at]) if whole else plt.load(x.at[place.rows, at], mask=there, other=0.0)
        mask = place.inside if whole else place.inside & there
        kept = [plt.load(values.at[place.columns + by, at], mask=mask, other=zero) for by in offsets]
        rights = [widened(right, left.dtype, inline=inline) for right in kept]
        return tuple(total + plt.dot(left, right.T) for total, right in zip(sums, rights, strict=True))

    nothing = place.nothing_summed(blocks, len(offsets), inline=inline)
    sums = jax.lax.fori_loop(0, pl.cdiv(length, blocks.step), step, nothing)
    if not scales:
        return sums
    return tuple(
        total * plt.load(scales[0].at[place.columns.T + by], mask=place.inside.T, other=0.0)
        for total, by in zip(sums, offsets, strict=True)
    )
