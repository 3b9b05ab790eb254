"""How the kernels of a round (`decode_products.py`) add up products with weights that have scales for groups of inputs.

Integers are read as they lie and converted in registers, exactly: four bits set into the mantissa of 128 are a bfloat16
at once, from which 128, and the offset, is taken off. A group's product is finished before its scale multiplies it, in
float32, so that nothing is rounded which the matrix is not.

What a matrix has for its groups, scales and minima, comes by groups here, [G, O], so that a load of neighbouring
channels is one of neighbouring bytes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dvi_jax.model.eight_bits import PAIR, widened
from dvi_jax.model.product_blocks import Blocks, Place, Ref
from dvi_jax.model.quantised import OFFSET

ABOVE = 128  # a bfloat16 of this size has a last bit that counts one, and the four lowest free
Offsets = tuple[int, ...]  # into the rows of a weight: for each a sum with other channels, of gate and of up


def sums_of_groups(
    x: Ref, weight: list[Ref], offsets: Offsets, place: Place, blocks: Blocks, *, inline: bool
) -> tuple[jax.Array, ...]:
    """float32 [block rows, block columns] for each offset, of integers in bytes: a product for each group, in turn."""
    group = x.shape[1] // weight[1].shape[0]
    length = x.shape[1] // blocks.parts

    def step(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        first = (place.part * length + index * blocks.step) // group
        for number in range(blocks.step // group):
            added = [_group_sum(x, weight, first + number, place, by, inline=inline) for by in offsets]
            sums = tuple(total + more for total, more in zip(sums, added, strict=True))
        return sums

    nothing = place.nothing_summed(blocks, len(offsets), inline=inline)
    return jax.lax.fori_loop(0, pl.cdiv(length, blocks.step), step, nothing)


def _group_sum(x: Ref, weight: list[Ref], group: jax.Array, place: Place, by: int, *, inline: bool) -> jax.Array:
    """float32 [block rows, block columns]: the terms of one group, scaled; `by`: offset into the weight's rows."""
    values, scales, *minima = weight
    size = x.shape[1] // scales.shape[0]
    columns, inside = place.columns.T + by, place.inside.T

    def of_group(ref: Ref) -> jax.Array:
        return plt.load(ref.at[group, columns], mask=inside, other=0.0).astype(jnp.float32)

    if values.dtype != jnp.uint8:
        term = group * size + jnp.arange(size)
        left = plt.load(x.at[place.rows, term[None, :]])
        right = plt.load(values.at[columns, term[:, None]], mask=inside, other=0)
        return plt.dot(left, widened(right, left.dtype, inline=inline)) * of_group(scales)
    # A byte's low four bits are a term of the group's first half, its high ones one of the second.
    half = size // 2
    byte = jnp.arange(half)
    lefts = [plt.load(x.at[place.rows, group * size + start + byte[None, :]]) for start in (0, half)]
    packed = plt.load(values.at[columns, group * half + byte[:, None]], mask=inside, other=0).astype(jnp.uint16)
    offset = 0 if minima else OFFSET
    total = plt.dot(lefts[0], _converted(packed, 0, offset)) + plt.dot(lefts[1], _converted(packed, 1, offset))
    total *= of_group(scales)
    for left in lefts if minima else ():
        total += _terms(left, place.columns.shape[0]) * of_group(minima[0])
    return total


def sums_of_words(
    x: Ref, weight: list[Ref], offsets: Offsets, place: Place, blocks: Blocks, *, inline: bool
) -> tuple[jax.Array, ...]:
    """The same of integers in words: a step is the words of four groups, with a product for each of them.

    `inline`: by instructions that convert two integers at a time, which only a GPU has.
    """
    values, scales, *_ = weight
    group, blocks_of_four = x.shape[1] // scales.shape[0], scales.shape[0] // 4
    steps = pl.cdiv(blocks_of_four, blocks.parts)
    is_whole = blocks_of_four % blocks.parts == 0  # else the last part has fewer
    columns, inside, word = place.columns.T, place.inside.T, jnp.arange(group)
    convert = _converted_inline if inline else _converted
    offset = 0 if len(weight) > 2 else OFFSET

    def scales_of(number: jax.Array) -> list[list[list[jax.Array]]]:
        """For each offset, of scales and of minima: [1, block columns] for each group of the four."""
        at = jnp.minimum(number, blocks_of_four - 1) * 4
        return [
            [[plt.load(ref.at[at + i, columns + by], mask=inside, other=0.0) for i in range(4)] for ref in weight[1:]]
            for by in offsets
        ]

    def step(index: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        sums, scaling = carry
        number = place.part * steps + index
        following = scales_of(number + 1)  # asked for a step before they are needed
        there = (number < blocks_of_four) & (word >= 0)
        packed = [
            plt.load(
                values.at[columns + by, number * group + word[:, None]],
                mask=inside if is_whole else inside & there[:, None],
                other=0,
            )
            for by in offsets
        ]
        for i in range(4):
            terms = x.at[place.rows, (number * 4 + i) * group + word[None, :]]
            left = plt.load(terms) if is_whole else plt.load(terms, mask=there[None, :], other=0.0)
            added = []
            for words, (scale, *minimum) in zip(packed, scaling, strict=True):
                total = plt.dot(left, convert(words, i, offset)) * scale[i].astype(jnp.float32)
                for part in minimum:
                    total += _terms(left, blocks.columns) * part[i].astype(jnp.float32)
                added.append(total)
            sums = tuple(total + more for total, more in zip(sums, added, strict=True))
        return sums, following

    start = place.nothing_summed(blocks, len(offsets), inline=inline), scales_of(place.part * steps)
    return jax.lax.fori_loop(0, steps, step, start)[0]


def _terms(left: jax.Array, columns: int) -> jax.Array:
    """float32 [block rows, block columns]: the terms of x added up as a product adds them, the same in every column."""
    return plt.dot(left, jnp.ones((left.shape[1], columns), left.dtype))


def _converted(packed: jax.Array, number: int, offset: int) -> jax.Array:
    """bfloat16: of four-bit integers in uint16 elements the one of that number, less `offset`."""
    above = ((packed >> 4 * number) & 15) | _bits(ABOVE)
    return jax.lax.bitcast_convert_type(above, jnp.bfloat16) - jnp.bfloat16(ABOVE + offset)


def _converted_inline(words: jax.Array, number: int, offset: int) -> jax.Array:
    """`_converted`, two neighbouring words in one register: shift, then mask and set in one instruction, subtract.

    Subtracted by a multiplication with one and an addition, which GPUs before Hopper have too.
    """
    both = 0xEA  # of lop3: (a & b) | c
    one, minus = 0x3F80, 0x8000  # of a bfloat16
    assembly = f"""{{
        .reg .b32 above, one, less;
        shr.u32 above, $1, {4 * number};
        lop3.b32 above, above, {15 * PAIR:#x}, {_bits(ABOVE) * PAIR:#x}, {both:#x};
        mov.b32 one, {one * PAIR:#x};
        mov.b32 less, {(_bits(ABOVE + offset) | minus) * PAIR:#x};
        fma.rn.bf16x2 $0, above, one, less;
    }}"""
    (integers,) = plt.elementwise_inline_asm(
        assembly,
        args=[words],
        constraints="=r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
    )
    return integers


def _bits(number: int) -> int:
    """Of a bfloat16 from 128 on and below 256, which is whole."""
    return 0x4300 | (number - ABOVE)
