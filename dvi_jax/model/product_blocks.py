"""How the products of a round (`decode_products.py`) are cut into programs of a GPU.

Sizes of blocks, warps and stages change times, not bits: the order of a sum is fixed by the weight's shape alone,
`part_count` equal parts of it, each worked off from its first term to its last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dvi_jax.model.early_start import next_may_start
from dvi_jax.model.quantised import PACKING, Matrix, Quantised

ROW_TILE = 16  # rows of the smallest matrix product in Triton
MOST_BLOCK_ROWS = 64  # rows of one program; more are further programs, which read the weight again
MOST_ROWS = 256  # beyond which a round is bound by arithmetic, where XLA is faster
STEP = 64  # terms of one step of a sum, at least
STAGES = {STEP: 5, 2 * STEP: 4}  # steps of each length whose loads are under way at once, usually
SHARE_STAGES = 6  # the same for narrow blocks of a device's share of a matrix
DEEP_STAGES = 7  # the same where a program of few rows and results has many steps, or reads little in each
SHORT_STEPS, MANY_STEPS = 6, 32  # steps of a program, up to and from which that is so
SHORT = 2048  # terms of a gated product's sums, up to which the first steps' loads are what counts
MOST_PARTS = 4
WIDE, NARROW = 64, 32  # results of a row in one program
WIDE_FROM = 4096  # results of a row, from which on blocks are wide
ENOUGH = 128  # programs that keep a large GPU's memory busy
ENOUGH_PACKED = 384  # the same where they read half as much and convert it
TOO_FEW, TOO_FEW_NARROW = 80, 64  # programs, below which narrower blocks are faster; the same of few rows and results

Ref = Any  # a pointer into an array; indexing gives another, `plt.load` and `plt.store` use it


class Blocks(NamedTuple):
    """How a product is cut into programs. Only `parts` has a say in the bits."""

    columns: int  # results of a row that one program works out
    step: int  # terms of one step
    stages: int  # steps whose loads are under way at once
    parts: int
    warps: int = 4


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
    shape = whole or weight.shape
    if not isinstance(weight, Quantised) or not weight.is_grouped:
        return part_count(shape)
    return part_count(shape, weight.group) if weight.packing < PACKING["uint16"] else _word_parts(shape, weight.block)


def _word_parts(shape: tuple[int, ...], block: int) -> int:
    """The same for integers in words, `block` inputs of which are a step; the last part may have fewer steps."""
    out, width = shape
    counts = [n for n in range(1, MOST_PARTS + 1) if width // block // n >= 3]
    return next((n for n in counts if pl.cdiv(out, NARROW) * n >= ENOUGH_PACKED), max(counts, default=1))


def blocks_for(shape: tuple[int, ...], parts: int, rows: int) -> Blocks:
    """Blocks of a product with a weight of `shape` (out, in): measured on H100s, for SmolLM2 to 7B shapes."""
    out, width = shape
    length = width // parts
    if rows > MOST_BLOCK_ROWS and out >= WIDE_FROM:
        return Blocks(2 * WIDE, STEP, 4, parts)
    columns = WIDE if out >= WIDE_FROM else NARROW
    step = 2 * STEP if length % (2 * STEP) == 0 and length >= 6 * STEP else STEP
    programs = pl.cdiv(out, columns) * parts
    if columns == WIDE and programs < ENOUGH and rows <= 2 * ROW_TILE:
        # A device's share of a large matrix: half the columns have half as much under way, unless it is more steps.
        return Blocks(NARROW, step, SHARE_STAGES, parts)
    if rows == MOST_BLOCK_ROWS and ENOUGH < programs <= 2 * ENOUGH:
        # More than an H100 has multiprocessors: with a stage less two fit on each, so that all run at once.
        return Blocks(columns, step, STAGES[step] - 1, parts)
    if columns == NARROW and rows <= 2 * ROW_TILE:
        return _few_and_narrow(programs, length, step, parts)
    return Blocks(columns // 2 if programs < TOO_FEW else columns, step, STAGES[step], parts)


def _few_and_narrow(programs: int, length: int, step: int, parts: int) -> Blocks:
    """Blocks of a tile or two of rows and few results, of so many programs with so many terms each."""
    columns, stages = NARROW if programs >= TOO_FEW_NARROW else NARROW // 2, STAGES[step]
    if length <= SHORT_STEPS * STEP:  # all that a program reads is under way at once
        step, stages = STEP, min(pl.cdiv(length, STEP) + 1, SHORT_STEPS)
    elif step == 2 * STEP and TOO_FEW <= programs <= ENOUGH:  # twice as many programs, which have more under way
        columns, stages = columns // 2, DEEP_STAGES
    elif step == STEP and length >= MANY_STEPS * STEP:
        stages = DEEP_STAGES
    return Blocks(columns, step, stages, parts, warps=2)


def gated_blocks_for(shape: tuple[int, ...], rows: int) -> Blocks:
    """Blocks of a `gated_product` with weights of `shape` (F, in) for gate and up each, measured likewise."""
    if rows >= MOST_BLOCK_ROWS:  # twice the sums: longer steps would leave a multiprocessor one program
        return Blocks(WIDE if shape[0] >= WIDE_FROM else NARROW, STEP, 4, 1, warps=8)
    step = STEP if shape[1] <= SHORT else blocks_for(shape, 1, rows).step
    return Blocks(NARROW, step, STAGES[step], 1)


def fitted(blocks: Blocks, weight: Matrix, rows: int) -> Blocks:
    """`blocks` as a quantised weight wants them, measured on an H100; its steps are whole groups."""
    if not isinstance(weight, Quantised):
        return blocks
    # Of 64 rows four warps would make another instruction, which adds up in another order; two do not.
    many = rows >= MOST_BLOCK_ROWS
    blocks = blocks._replace(columns=NARROW, stages=STAGES[blocks.step], warps=2 if many else 4)
    if not weight.is_grouped:
        length = weight.shape[1] // blocks.parts
        step = next(n for n in (4 * STEP, 2 * STEP, STEP) if length % n == 0 or n == STEP)
        return blocks._replace(step=STEP if many else step, stages=3 if step == 4 * STEP else 5)
    if weight.packing == PACKING["uint16"]:
        if rows == 2 * ROW_TILE:  # in narrower blocks every warp would convert all of the block's weights
            return blocks._replace(step=weight.block, columns=WIDE, stages=3)
        return blocks._replace(step=weight.block, stages=4)
    groups = weight.shape[1] // blocks.parts // weight.group
    most = max(blocks.step // weight.group, 1)
    return blocks._replace(step=weight.group * next(n for n in range(most, 0, -1) if groups % n == 0))


class Place(NamedTuple):
    """Where one program's results lie."""

    rows: jax.Array  # [block rows, 1]
    columns: jax.Array  # [block columns, 1]
    inside: jax.Array  # bool [block columns, 1], there is such a column
    part: jax.Array  # int32 scalar

    @classmethod
    def here(cls, out: Ref, blocks: Blocks, block_rows: int) -> Place:
        columns = pl.program_id(1) * blocks.columns + jnp.arange(blocks.columns)[:, None]
        rows = pl.program_id(0) * block_rows + jnp.arange(block_rows)[:, None]
        return cls(rows, columns, columns < out.shape[2], pl.program_id(2))

    def nothing_summed(self, blocks: Blocks, count: int, *, inline: bool) -> tuple[jax.Array, ...]:
        """float32 zeros [block rows, block columns], `count` times; `inline` as in `next_may_start`.

        The kernel after a single sum is for sum and norm or attention, and small where there are few rows. After a
        gated product comes another product, whose programs would lie unevenly.
        """
        zeros = jnp.zeros((self.rows.shape[0], blocks.columns), jnp.float32)
        if count == 1 and len(self.rows) < MOST_BLOCK_ROWS:
            zeros += next_may_start(jnp.zeros(self.rows.shape, jnp.int32), inline=inline).astype(jnp.float32)
        return (zeros,) * count
