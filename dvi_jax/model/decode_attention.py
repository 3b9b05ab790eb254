"""Attention of a few new rows over the KV cache as one GPU kernel, written in Pallas for Triton.

An einsum takes five kernels for what is microseconds of work, and reads every slot of the cache. This one reads the
slots that are filled; it also adds up the parts of the rows' product with the q/k/v weight, turns queries and keys
(RoPE), and writes the new rows into the cache. A long cache is cut into chunks that are worked on side by side and put
together at the end (`attention_chunks.py`).

Bit-exact losslessness: a row's result depends on its own query and on slots 0 .. position alone. Chunks are fixed
ranges of slots, a masked slot or chunk adds an exact zero, rows never meet in a sum, and a new row is read back from
its slot like any other. Nor does it depend on how many rows there are: 16 queries are one tile, whatever else is there.

Letters: P parts, B batch, T rows of a sequence in this call, R >= B * T rows in all, N query heads, K KV heads,
G = N/K, H head size, S cache slots, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dvi_jax.model.attention_chunks import (
    CHUNK_SLOTS,
    MASKED,
    WARPS,
    Carry,
    Ref,
    chunk_count,
    combine,
    in_its_chunk,
    output_shapes,
    write,
)
from dvi_jax.model.early_start import product_may_start
from dvi_jax.model.eight_bits import widened
from dvi_jax.model.kept_kv import Rows, quantised
from dvi_jax.model.products import has_gpu_kernels

STEP_SLOTS = 64  # slots of one step inside a chunk
STAGES = 3  # steps whose loads are under way at once
TILE = 16  # queries that one program works on: rows of the smallest matrix product in Triton
MOST_ROUND_ROWS = 64  # T: more rows than any round has belong to a prefill
Rope = tuple[jax.Array, jax.Array]


def is_supported(rows: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes `rows` = T rows of 16-bit heads of this size on the default backend."""
    return has_gpu_kernels(dtype) and rows <= MOST_ROUND_ROWS and fits(head_dim)


def fits(head_dim: int) -> bool:
    """Whether half a head of this size may be an operand of Triton's matrix product."""
    half = head_dim // 2
    return half >= 16 and half & (half - 1) == 0


@partial(jax.jit, static_argnames=("interpret",))  # traced and lowered once for all layers: seconds of every start
def cached_attention(
    qkv: jax.Array,
    rope: Rope,
    key: Rows,
    value: Rows,
    positions: jax.Array,
    bias: jax.Array | None = None,
    places: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, Rows, Rows]:
    """Rows qkv [P, R, N+2K, H], not turned yet, into slots `positions` [B, T] of key, value [B, K, S, H].

    Row t of sequence b is row b * T + t; rows beyond B * T are left out. With `places` int32 [B], no number twice, the
    cache is one of more sequences, and that of sequence b is at places[b].

    `bias` [N+2K, H] is added to every row's sum of parts, which are then in float32, before that is rounded.
    Returns the rows' attention [R, N*H] over slots 0 .. position, with anything in the rows left out, and key and
    value, in place where they are not needed any more; all in key's dtype, though keys and values in 8 bits are kept so
    (`kept_kv.py`). rope: cos and sin [B, T, 1, H/2]. `interpret` runs it on any device, for tests.
    """
    _, rows, heads, size = qkv.shape
    batch, tokens = positions.shape
    kv_heads, slots = key.shape[1:3]
    queries = heads - 2 * kv_heads
    chunks = chunk_count(slots)
    tiles = pl.cdiv(tokens * queries // kv_heads, TILE)
    cos, sin = (table[:, :, 0] for table in rope)
    cache, structure = jax.tree.flatten((key, value))
    table = pl.BlockSpec((None, tokens, size // 2), lambda b, k, c: (b, 0, 0))
    outputs = output_shapes(chunks, (rows, queries, size), key.dtype)
    caches = [of_head(array) if places is None else entire(array.shape) for array in cache]
    given = [array for array in (bias, places) if array is not None]
    kernel = partial(_kernel, arrays=len(cache), biased=bias is not None, placed=places is not None)
    written = pl.pallas_call(
        partial(kernel, kv_heads=kv_heads, chunks=chunks, dtype=key.dtype, interpret=interpret),
        grid=(batch, kv_heads, tiles * chunks),
        in_specs=[
            *caches,
            entire(qkv.shape),
            table,
            table,
            pl.BlockSpec((None, tokens), lambda b, k, c: (b, 0)),
            *(entire(array.shape) for array in given),
        ],
        out_specs=[*caches, *(entire(output.shape) for output in outputs)],
        out_shape=[*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in cache), *outputs],
        input_output_aliases={i: i for i in range(len(cache))},
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="cached_attention",
    )(*cache, qkv, cos, sin, positions, *given)
    return results(written, structure, rows, positions, interpret=interpret)


def entire(shape: tuple[int, ...]) -> pl.BlockSpec:
    """Every program of a grid of three sees the whole array."""
    return pl.BlockSpec(shape, lambda b, k, c: (0,) * len(shape))


def of_head(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """A program of a grid (batch, KV heads, ...) sees all that an array [B, K, ...] has of its sequence and head."""
    return pl.BlockSpec((None, None, *array.shape[2:]), lambda b, k, c: (b, k, 0, 0))


def results(
    written: Sequence[jax.Array], structure: Any, rows: int, positions: jax.Array, *, interpret: bool
) -> tuple[jax.Array, Rows, Rows]:
    """From a kernel's outputs: the attention [R, N*H], and keys and values, of that structure, which come first."""
    key, value = jax.tree.unflatten(structure, written[: structure.num_leaves])
    whole, *parts = written[structure.num_leaves :]
    if parts:
        mixed, top, total = parts
        whole = combine(mixed, top, total, positions, whole, interpret=interpret)
    return whole.reshape(rows, -1), key, value


class HeadRows(NamedTuple):
    """Keys or values of a sequence and a head in a kernel: the arrays of a `kept_kv.Rows`."""

    values: Ref  # [..., S, H]
    scales: Ref | None  # [..., S, 1], of 8 bits
    inline: bool  # whether a GPU reads them, as in `eight_bits.widened`
    head: tuple[jax.Array, ...] = ()  # where they are: sequence and head, if the refs are to all of an array

    @classmethod
    def pair(cls, refs: Sequence[Ref], *, inline: bool, head: tuple[jax.Array, ...] = ()) -> tuple[HeadRows, HeadRows]:
        """Keys and values from all their arrays in order."""
        if len(refs) == 2:
            return cls(refs[0], None, inline, head), cls(refs[1], None, inline, head)
        key, key_scales, value, value_scales = refs
        return cls(key, key_scales, inline, head), cls(value, value_scales, inline, head)

    @property
    def shape(self) -> tuple[int, int]:
        """(S, H)."""
        slots, size = self.values.shape[-2:]
        return slots, size

    def store(self, slot: jax.Array, pieces: Sequence[jax.Array], mask: jax.Array | None = None) -> None:
        """Rows, in pieces [rows, H/n] that are joined, into `slot` [rows, 1]; where `mask` [rows, 1] says so."""
        if self.scales is not None:
            pieces, scale = quantised(pieces, self.values.dtype, self.scales.dtype)
            plt.store(self.scales.at[(*self.head, slot, 0)], scale, mask=mask)
        width = pieces[0].shape[1]
        for number, piece in enumerate(pieces):
            column = jnp.arange(width)[None, :] + number * width
            plt.store(self.values.at[(*self.head, slot, column)], piece, mask=mask)

    def load(self, slot: jax.Array, column: jax.Array, mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Columns [1, n] of rows `slot` [rows, 1], not scaled, in `dtype`; zeros outside `mask` [rows, 1]."""
        zero = 0 if self.values.dtype == jnp.int8 else 0.0
        found = plt.load(self.values.at[(*self.head, slot, column)], mask=mask, other=zero)
        return widened(found, dtype, inline=self.inline)

    def load_scales(self, slot: jax.Array, mask: jax.Array) -> jax.Array | None:
        """float32 [rows] of rows `slot` [rows]; None where there are none."""
        if self.scales is None:
            return None
        return plt.load(self.scales.at[(*self.head, slot, 0)], mask=mask, other=0.0).astype(jnp.float32)


def _kernel(
    *refs: Ref,
    arrays: int,
    biased: bool,
    placed: bool,
    kv_heads: int,
    chunks: int,
    dtype: jnp.dtype,
    interpret: bool,
) -> None:
    """One KV head, 16 queries and one chunk: write the new rows, then attend; where no row reaches the chunk, nothing.

    `refs`: the `arrays` of keys and values before the call; the rows, their tables and positions; the bias and the
    places if there are any; then the outputs, the same arrays in the same memory and what `cached_attention` makes its
    result of.
    """
    qkv, cos, sin, positions, *rest = refs[arrays:]
    bias, rest = (rest[0], rest[1:]) if biased else (None, rest)
    places, rest = (rest[0], rest[1:]) if placed else (None, rest)
    heads, size = qkv.shape[2:]
    (tokens,) = positions.shape
    queries, kv_head, chunk = heads - 2 * kv_heads, pl.program_id(1), pl.program_id(2) % chunks
    own = () if places is None else (plt.load(places.at[pl.program_id(0)]), kv_head)
    (key, value), outputs = HeadRows.pair(rest[:arrays], inline=not interpret, head=own), rest[arrays:]
    group, first_row = queries // kv_heads, pl.program_id(0) * tokens
    # Queries by row, then head; what fills up the last tile does the first one's work again.
    query_index = pl.program_id(2) // chunks * TILE + tile_queries(queries * size, inline=not interpret)
    query_index = jnp.where(query_index < tokens * group, query_index, 0)
    token, head = query_index // group, kv_head * group + query_index % group
    turn = partial(turned, qkv, bias, (cos, sin), first_row=first_row, dtype=dtype)
    slots, begin = key.shape[0], chunk * CHUNK_SLOTS
    limit = slots if chunks == 1 else jnp.minimum(begin + CHUNK_SLOTS, slots)
    position = plt.load(positions.at[token])
    end = jnp.minimum(limit, jnp.max(position) + 1)
    finish = partial(write, outputs, row=first_row + token, head=head, chunk=chunk, position=position)

    def work() -> None:
        query = turn((token[:, None], head[:, None]))
        # Every program writes all of the new rows, always the same: each then reads what it wrote itself.
        new = jnp.arange(pl.next_power_of_2(tokens))[:, None]
        new = jnp.where(new < tokens, new, 0)
        slot, column = plt.load(positions.at[new]), jnp.arange(size)[None, :]
        key.store(slot, turn((new, queries + kv_head)))
        at = (first_row + new, queries + kv_heads + kv_head, column)
        value.store(slot, [summed(qkv, bias, at, dtype)])
        if not interpret:
            plt.debug_barrier()  # the program's other threads wrote what the next lines read
        steps = (0, pl.cdiv(end - begin, STEP_SLOTS))
        finish(attend(nothing_yet(size), query, cached_slots(key, value, dtype), position, begin, steps))

    in_its_chunk(chunks, end > begin, work)


def tile_queries(width: int, *, inline: bool) -> jax.Array:
    """int32 [16], the queries of a tile, of heads `width` wide in all; `inline` as in `early_start.next_may_start`."""
    return product_may_start(jnp.arange(TILE), width, inline=inline)


class Slots(NamedTuple):
    """How a program reads slots [64] of keys and values; what is kept in 8 bits comes with scales float32 [64]."""

    keys: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array | None]]  # both halves, [64, H/2] each; scales
    values: Callable[[jax.Array], tuple[jax.Array, jax.Array | None]]  # [64, H]; scales


def cached_slots(key: HeadRows, value: HeadRows, dtype: jnp.dtype) -> Slots:
    """Slots of a cache; zeros beyond it."""
    slots, size = key.shape
    column, half = jnp.arange(size)[None, :], jnp.arange(size // 2)[None, :]

    def keys(slot: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        inside, at = (slot < slots)[:, None], slot[:, None]
        left = key.load(at, half, inside, dtype)
        right = key.load(at, half + size // 2, inside, dtype)
        return left, right, key.load_scales(slot, slot < slots)

    def values(slot: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        inside = slot < slots
        return value.load(slot[:, None], column, inside[:, None], dtype), value.load_scales(slot, inside)

    return Slots(keys, values)


def nothing_yet(size: int, tile: int = TILE) -> Carry:
    """What `attend` begins with, for `tile` queries and heads of `size`."""
    return jnp.zeros((tile, size), jnp.float32), jnp.full((tile,), MASKED), jnp.zeros((tile,), jnp.float32)


def attend(
    carry: Carry,
    query: tuple[jax.Array, jax.Array],
    slots: Slots,
    position: jax.Array,
    begin: jax.Array | int,
    steps: tuple[jax.Array | int, jax.Array | int],
) -> Carry:
    """Both halves of turned queries [Q, H/2] over steps of 64 slots, counted from slot `begin` (online softmax)."""
    scale = (2 * query[0].shape[1]) ** -0.5

    def step(index: jax.Array, carry: Carry) -> Carry:
        mixed, top, total = carry
        slot = begin + index * STEP_SLOTS + jnp.arange(STEP_SLOTS)
        left, right, key_scales = slots.keys(slot)
        scores = (plt.dot(query[0], left.T) + plt.dot(query[1], right.T)) * scale
        if key_scales is not None:
            scores = scores * key_scales[None, :]
        scores = jnp.where(slot[None, :] <= position[:, None], scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top[:, None])
        values, value_scales = slots.values(slot)
        scaled = weights if value_scales is None else weights * value_scales[None, :]
        mixed = mixed * shrink[:, None] + plt.dot(scaled.astype(values.dtype), values)
        return mixed, new_top, total * shrink + jnp.sum(weights, axis=1)

    return jax.lax.fori_loop(*steps, step, carry)


def summed(qkv: Ref, bias: Ref | None, at: tuple[Any, ...], dtype: jnp.dtype) -> jax.Array:
    """Sum of the parts of a product and its bias at (row, head, column), rounded as the product itself would be."""
    total = plt.load(qkv.at[(0, *at)]).astype(jnp.float32)
    for part in range(1, qkv.shape[0]):
        total += plt.load(qkv.at[(part, *at)])
    if bias is not None:
        total += plt.load(bias.at[at[1:]]).astype(jnp.float32)
    return total.astype(dtype)


def turned(
    qkv: Ref, bias: Ref | None, rope: tuple[Ref, Ref], at: tuple[Any, Any], *, first_row: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Both halves [rows, H/2] of the heads `at` (token, head) of a sequence, turned to the token's position."""
    (cos, sin), (token, head) = rope, at
    half = jnp.arange(cos.shape[-1])[None, :]
    first = summed(qkv, bias, (first_row + token, head, half), dtype).astype(jnp.float32)
    second = summed(qkv, bias, (first_row + token, head, half + cos.shape[-1]), dtype).astype(jnp.float32)
    c, s = plt.load(cos.at[token, half]), plt.load(sin.at[token, half])
    return (first * c - second * s).astype(dtype), (second * c + first * s).astype(dtype)
