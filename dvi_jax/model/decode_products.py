"""Products of a round's rows with weights, as GPU kernels written in Pallas for Triton.

Bit-exact losslessness: a row's result does not depend on how many rows are computed beside it. XLA chooses a kernel for
every number of rows, by measuring, so another number may be summed in another order. Here the order is fixed by the
weight's shape alone: `part_count` equal parts of the sum, each worked off from its first term to its last, 16 at a
time, in tiles of 16 rows that the tensor cores treat alike. Sizes of blocks, warps and stages change times, not bits.

A product of a few rows has too few results to occupy a GPU, so its sum is split into parts that are worked on side by
side. They stay apart for the kernel that comes next, which adds them on its way: attention, or sum and norm.

Weights in fewer bits (`quantised.py`) are read as they are and converted in registers; integers and eight-bit floats
are exact in bfloat16. A channel's scale multiplies its finished sum, a group's the sum of the group's terms. Four bits
set into the mantissa of 128 are a bfloat16 at once, and the 128 is taken off behind the sum.

Letters: P parts, R rows, K terms of a sum.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dvi_jax.model.products import has_gpu_kernels, linear, total
from dvi_jax.model.quantised import OFFSET, PACKING, Matrix, Quantised

ROW_TILE = 16  # rows of the smallest matrix product in Triton
MOST_BLOCK_ROWS = 64  # rows of one program; more are further programs, which read the weight again
MOST_ROWS = 256  # beyond which a round is bound by arithmetic, where XLA is faster
STEP = 64  # terms of one step of a sum, at least
MOST_PARTS = 4
WIDE, NARROW = 64, 32  # results of a row in one program
WIDE_FROM = 4096  # results of a row, from which on blocks are wide
ENOUGH = 128  # programs that keep a large GPU's memory busy
TOO_FEW = 80  # programs, below which narrower blocks are faster
Ref = Any  # a pointer into an array; indexing gives another, `plt.load` and `plt.store` use it


class Blocks(NamedTuple):
    """How a product is cut into programs. Only `parts` has a say in the bits."""

    columns: int  # results of a row that one program works out
    step: int  # terms of one step
    stages: int  # steps whose loads are under way at once
    parts: int
    warps: int = 4


def is_supported(rows: int, dtype: jnp.dtype) -> bool:
    """Whether the kernels take this many rows of this type on the default backend."""
    return has_gpu_kernels(dtype) and rows <= MOST_ROWS


def padded_rows(rows: int) -> int:
    """Rows that are computed for so many: the kernels take 16, 32, or a multiple of 64."""
    for tiles in (ROW_TILE, 2 * ROW_TILE):
        if rows <= tiles:
            return tiles
    return pl.cdiv(rows, MOST_BLOCK_ROWS) * MOST_BLOCK_ROWS


def part_count(shape: tuple[int, ...], group: int = STEP) -> int:
    """Into how many parts to split the sums of a product with a weight of `shape` (out, in), in groups of `group`."""
    out, width = shape
    programs = pl.cdiv(out, WIDE if out >= WIDE_FROM else NARROW)
    least = max(group, STEP)
    counts = [n for n in range(1, MOST_PARTS + 1) if width % (n * least) == 0 and width // n >= 3 * STEP]
    return next((n for n in counts if programs * n >= ENOUGH), max(counts, default=1))


def sum_parts(weight: Matrix, whole: tuple[int, int] | None = None) -> int:
    """`part_count` of a weight, quantised or not; with `whole`, of a weight of that shape which is kept as this one."""
    group = weight.group if isinstance(weight, Quantised) and weight.is_grouped else STEP
    return part_count(whole or weight.shape, group)


@partial(jax.jit, static_argnames=("parts", "out_dtype", "interpret"))  # traced and lowered once for all layers
def product(
    x: jax.Array, weight: Matrix, *, parts: int = 1, out_dtype: jnp.dtype | None = None, interpret: bool = False
) -> jax.Array:
    """x [R, in] times weight [out, in] -> [P, R, out]: float32 sums, in `out_dtype` or x's where P is 1.

    R as `padded_rows` has it. `interpret` runs the kernel on any device, for tests. It has no derivative.
    """
    dtype = jnp.float32 if parts > 1 else jnp.dtype(out_dtype or x.dtype)
    blocks = _fitted(blocks_for(weight.shape, parts, len(x)), weight, len(x))
    return _run(_kernel, x, weight, blocks, dtype, interpret)


@partial(jax.jit, static_argnames=("interpret",))
def gated_product(x: jax.Array, weight: Matrix, *, interpret: bool = False) -> jax.Array:
    """SwiGLU: silu(x gate) * (x up) for x [R, in] and weight [2F, in], gate's rows before up's -> [R, F].

    Both products are rounded to x's dtype, as is silu's result; R, `interpret` and derivative as for `product`.
    """
    blocks = _fitted(gated_blocks_for((weight.shape[0] // 2, weight.shape[1]), len(x)), weight, len(x))
    return _run(_gated_kernel, x, weight, blocks, x.dtype, interpret)[0]


def round_linear(x: jax.Array, weight: Matrix, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """`products.linear` of a round's rows x [B, T, in], by the kernels where they take them: [B, T, out]."""
    batch, rows, _ = x.shape
    if not is_supported(batch * rows, x.dtype):
        return linear(x, weight, out_dtype)
    parts = product(laid_flat(x), weight, parts=sum_parts(weight), out_dtype=out_dtype)
    result = total(parts, out_dtype or x.dtype)
    return result[: batch * rows].reshape(batch, rows, -1)


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


def blocks_for(shape: tuple[int, ...], parts: int, rows: int) -> Blocks:
    """Blocks of a product with a weight of `shape` (out, in): measured on H100s, for SmolLM2 to 7B shapes."""
    out, width = shape
    length = width // parts
    if rows > MOST_BLOCK_ROWS and out >= WIDE_FROM:
        return Blocks(2 * WIDE, STEP, 4, parts)
    columns = WIDE if out >= WIDE_FROM else NARROW
    if pl.cdiv(out, columns) * parts < TOO_FEW:
        columns //= 2
    if length % (2 * STEP) == 0 and length >= 6 * STEP:
        return Blocks(columns, 2 * STEP, 4, parts)
    return Blocks(columns, STEP, 5, parts)


def gated_blocks_for(shape: tuple[int, ...], rows: int) -> Blocks:
    """Blocks of a `gated_product` with weights of `shape` (F, in) for gate and up each, measured likewise."""
    if rows >= MOST_BLOCK_ROWS:  # twice the sums: longer steps would leave a multiprocessor one program
        return Blocks(WIDE if shape[0] >= WIDE_FROM else NARROW, STEP, 4, 1, warps=8)
    return blocks_for(shape, 1, rows)._replace(columns=NARROW)


def _fitted(blocks: Blocks, weight: Matrix, rows: int) -> Blocks:
    """`blocks` as a quantised weight wants them, measured on an H100; its steps are whole groups."""
    if not isinstance(weight, Quantised):
        return blocks
    # Of 64 rows four warps would make another instruction, which adds up in another order; two do not.
    many = rows >= MOST_BLOCK_ROWS
    blocks = blocks._replace(columns=NARROW, warps=2 if many else 4)
    if not weight.is_grouped:
        length = weight.shape[1] // blocks.parts
        step = next(n for n in (4 * STEP, 2 * STEP, STEP) if length % n == 0 or n == STEP)
        return blocks._replace(step=STEP if many else step, stages=3 if step == 4 * STEP else 5)
    if weight.packing == PACKING["uint16"]:
        return blocks._replace(step=4 * weight.group, stages=3)
    groups = weight.shape[1] // blocks.parts // weight.group
    most = max(blocks.step // weight.group, 1)
    return blocks._replace(step=weight.group * next(n for n in range(most, 0, -1) if groups % n == 0))


def _run(kernel: Any, x: jax.Array, weight: Matrix, blocks: Blocks, dtype: jnp.dtype, interpret: bool) -> jax.Array:
    """`kernel` over blocks of rows, columns and parts. [P, R, columns of all blocks that the result has]."""
    rows, out = len(x), weight.shape[0] // (2 if kernel is _gated_kernel else 1)
    block_rows = min(rows, MOST_BLOCK_ROWS)
    arrays = [part for part in weight if part is not None] if isinstance(weight, Quantised) else [weight]
    return pl.pallas_call(
        partial(kernel, blocks=blocks, block_rows=block_rows),
        # Blocks of rows first: programs that read the same weights run together.
        grid=(rows // block_rows, pl.cdiv(out, blocks.columns), blocks.parts),
        out_shape=jax.ShapeDtypeStruct((blocks.parts, rows, out), dtype),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="product" if kernel is _kernel else "gated_product",
    )(x, *arrays)


def _kernel(x: Ref, *refs: Ref, blocks: Blocks, block_rows: int) -> None:
    """One block of results: all their sums over one part of the terms. `refs`: the weight's arrays, the output."""
    *weight, out = refs
    place = _Place.here(out, blocks, block_rows)
    (sums,) = _sums(x, weight, (0,), place, blocks)
    plt.store(out.at[place.part, place.rows, place.columns.T], sums.astype(out.dtype), mask=place.inside.T)


def _gated_kernel(x: Ref, *refs: Ref, blocks: Blocks, block_rows: int) -> None:
    """One block of gate's and of up's results, rounded where products and silu by themselves would be."""
    *weight, out = refs
    place = _Place.here(out, blocks, block_rows)
    gate, up = (
        sums.astype(out.dtype).astype(jnp.float32) for sums in _sums(x, weight, (0, out.shape[2]), place, blocks)
    )
    gated = (gate / (1 + jnp.exp(-gate))).astype(out.dtype).astype(jnp.float32) * up
    plt.store(out.at[0, place.rows, place.columns.T], gated.astype(out.dtype), mask=place.inside.T)


class _Place(NamedTuple):
    """Where one program's results lie."""

    rows: jax.Array  # [block rows, 1]
    columns: jax.Array  # [block columns, 1]
    inside: jax.Array  # bool [block columns, 1], there is such a column
    part: jax.Array  # int32 scalar

    @classmethod
    def here(cls, out: Ref, blocks: Blocks, block_rows: int) -> _Place:
        columns = pl.program_id(1) * blocks.columns + jnp.arange(blocks.columns)[:, None]
        rows = pl.program_id(0) * block_rows + jnp.arange(block_rows)[:, None]
        return cls(rows, columns, columns < out.shape[2], pl.program_id(2))


def _sums(x: Ref, weight: list[Ref], offsets: tuple[int, ...], place: _Place, blocks: Blocks) -> tuple[jax.Array, ...]:
    """float32 [block rows, block columns] for each offset into the weight's rows, step by step over one part."""
    values, *scales = weight
    length = x.shape[1] // blocks.parts
    whole = length % blocks.step == 0
    zero = 0.0 if jnp.issubdtype(values.dtype, jnp.floating) else 0

    def step(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        term = index * blocks.step + jnp.arange(blocks.step)[None, :]
        at, there = place.part * length + term, term < length
        left = plt.load(x.at[place.rows, at]) if whole else plt.load(x.at[place.rows, at], mask=there, other=0.0)
        mask = place.inside if whole else place.inside & there
        rights = [plt.load(values.at[place.columns + by, at], mask=mask, other=zero) for by in offsets]
        return tuple(
            total + plt.dot(left, right.astype(left.dtype).T) for total, right in zip(sums, rights, strict=True)
        )

    def step_of_groups(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        group = x.shape[1] // scales[0].shape[1]
        first = (place.part * length + index * blocks.step) // group
        for number in range(blocks.step // group):
            added = [_group_sums(x, weight, first + number, place, by) for by in offsets]
            sums = tuple(total + more for total, more in zip(sums, added, strict=True))
        return sums

    if values.dtype == jnp.uint16:
        return _word_sums(x, weight, offsets, place, blocks)
    grouped = bool(scales) and len(scales[0].shape) == 2
    zeros = jnp.zeros((place.rows.shape[0], blocks.columns), jnp.float32)
    steps = pl.cdiv(length, blocks.step)
    sums = jax.lax.fori_loop(0, steps, step_of_groups if grouped else step, (zeros,) * len(offsets))
    if not scales or grouped:
        return sums
    return tuple(
        total * plt.load(scales[0].at[place.columns.T + by], mask=place.inside.T, other=0.0)
        for total, by in zip(sums, offsets, strict=True)
    )


def _group_sums(x: Ref, weight: list[Ref], group: jax.Array, place: _Place, by: int) -> jax.Array:
    """float32 [block rows, block columns]: the terms of one group, scaled; `by`: offset into the weight's rows."""
    values, scales, *minima = weight
    size = x.shape[1] // scales.shape[1]
    columns, inside = place.columns.T + by, place.inside.T

    def of_group(ref: Ref) -> jax.Array:
        return plt.load(ref.at[columns, group], mask=inside, other=0.0).astype(jnp.float32)

    if values.dtype != jnp.uint8:
        term = group * size + jnp.arange(size)
        left = plt.load(x.at[place.rows, term[None, :]])
        right = plt.load(values.at[columns, term[:, None]], mask=inside, other=0)
        return plt.dot(left, right.astype(left.dtype)) * of_group(scales)
    # A byte's low four bits are a term of the group's first half, its high ones one of the second.
    half = size // 2
    byte = jnp.arange(half)
    lefts = [plt.load(x.at[place.rows, group * size + start + byte[None, :]]) for start in (0, half)]
    packed = plt.load(values.at[columns, group * half + byte[:, None]], mask=inside, other=0)
    offset = 0 if minima else OFFSET
    rights = [_as_bfloat16(packed & 15, offset), _as_bfloat16(packed >> 4, offset)]
    total = plt.dot(lefts[0], rights[0]) + plt.dot(lefts[1], rights[1])
    total *= of_group(scales)
    if minima:  # of every term the same: the minimum times the terms of x, added up as they are above
        ones = jnp.ones(rights[0].shape, rights[0].dtype)
        total += (plt.dot(lefts[0], ones) + plt.dot(lefts[1], ones)) * of_group(minima[0])
    return total


def _word_sums(
    x: Ref, weight: list[Ref], offsets: tuple[int, ...], place: _Place, blocks: Blocks
) -> tuple[jax.Array, ...]:
    """`_sums` of four-bit integers in words: a step is the words of four groups, with a product for each of them."""
    values, scales, *_ = weight
    group, blocks_of_four = x.shape[1] // scales.shape[1], scales.shape[1] // 4
    steps = pl.cdiv(blocks_of_four, blocks.parts)
    columns, inside, word = place.columns.T, place.inside.T, jnp.arange(group)

    def scales_of(number: jax.Array) -> list[list[list[jax.Array]]]:
        """For each offset, of scales and of minima: [1, block columns] for each group of the four."""
        at = jnp.minimum(number, blocks_of_four - 1) * 4
        return [
            [[plt.load(ref.at[columns + by, at + i], mask=inside, other=0.0) for i in range(4)] for ref in weight[1:]]
            for by in offsets
        ]

    def step(index: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        sums, scaling = carry
        number = place.part * steps + index
        following = scales_of(number + 1)  # asked for a step before they are needed
        there = (number < blocks_of_four) & (word >= 0)  # the last part may have fewer
        packed = [
            plt.load(values.at[columns + by, number * group + word[:, None]], mask=inside & there[:, None], other=0)
            for by in offsets
        ]
        for i in range(4):
            left = plt.load(x.at[place.rows, (number * 4 + i) * group + word[None, :]], mask=there[None, :], other=0.0)
            terms = plt.dot(left, jnp.ones((group, blocks.columns), left.dtype))  # of x, the same in every column
            sums = tuple(
                total + _scaled(plt.dot(left, _above_128((words >> 4 * i) & 15)), terms, [part[i] for part in parts])
                for total, words, parts in zip(sums, packed, scaling, strict=True)
            )
        return sums, following

    zeros = jnp.zeros((place.rows.shape[0], blocks.columns), jnp.float32)
    start = (zeros,) * len(offsets), scales_of(place.part * steps)
    return jax.lax.fori_loop(0, steps, step, start)[0]


def _scaled(product: jax.Array, terms: jax.Array, scaling: list[jax.Array]) -> jax.Array:
    """A group's product with 128 and more in place of its integers, put right: `terms` is that with ones."""
    scale, *minimum = (part.astype(jnp.float32) for part in scaling)
    if minimum:
        return (product - 128 * terms) * scale + terms * minimum[0]
    return (product - (128 + OFFSET) * terms) * scale


def _above_128(integers: jax.Array) -> jax.Array:
    """bfloat16 128 + n for uint16 n below 128: set into the mantissa of 128, whose last bit counts one."""
    return jax.lax.bitcast_convert_type(integers | 0x4300, jnp.bfloat16)


def _as_bfloat16(integers: jax.Array, offset: int) -> jax.Array:
    """uint8 integers below 128, less `offset`."""
    return _above_128(integers.astype(jnp.uint16)) - jnp.bfloat16(128 + offset)
