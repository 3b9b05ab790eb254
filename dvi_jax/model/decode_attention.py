"""Attention of a few new rows over the KV cache as one GPU kernel, written in Pallas for Triton.

An einsum takes five kernels for what is microseconds of work, and reads every slot of the cache. This one reads the
slots that are filled; it also adds up the parts of the rows' product with the q/k/v weight, turns queries and keys
(RoPE), and writes the new rows into the cache. A long cache is cut into chunks that are worked on side by side and put
together at the end (Flash-Decoding, split-KV form of FlashAttention, arXiv 2307.08691).

Bit-exact losslessness: a row's result depends on its own query and on slots 0 .. position alone. Chunks are fixed
ranges of slots, a masked slot or chunk adds an exact zero, rows never meet in a sum, and a new row is read back from
its slot like any other.

Letters: P parts, B batch, T rows in this call, N query heads, K KV heads, G = N/K, H head size, S cache slots,
C chunks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dvi_jax.model.products import has_gpu_kernels

CHUNK_SLOTS = 512  # slots of a chunk
UNCUT_SLOTS = 1024  # caches up to here are one chunk: a short context is not worth a second kernel
STEP_SLOTS = 64  # slots of one step inside a chunk
WARPS = 4
STAGES = 3  # steps whose loads are under way at once
SMALLEST = 16  # rows of the smallest matrix product in Triton
MOST_QUERY_ROWS = 64  # T * G beyond which the accumulators no longer fit into registers
Ref = Any  # a pointer into an array; indexing gives another, `plt.load` and `plt.store` use it
Rope = tuple[jax.Array, jax.Array]
MASKED = -1e30  # finite: the maximum of a chunk that a row cannot see must not give inf - inf


def is_supported(rows: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes `rows` = T * G rows of 16-bit heads of this size on the default backend."""
    half = head_dim // 2
    sizes_fit = rows <= MOST_QUERY_ROWS and half >= SMALLEST and half & (half - 1) == 0
    return has_gpu_kernels(dtype) and sizes_fit


@partial(jax.jit, static_argnames=("interpret",))  # traced and lowered once for all layers: seconds of every start
def cached_attention(
    qkv: jax.Array,
    rope: Rope,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    bias: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows qkv [P, B, T, N+2K, H], not turned yet, into slots `positions` [B, T] of key, value [B, K, S, H].

    `bias` [N+2K, H] is added to every row's sum of parts, which are then in float32, before that is rounded.
    Returns the rows' attention [B, T, N*H] over slots 0 .. position, and key and value, in place where they are not
    needed any more; all in key's dtype. rope: cos and sin [B, T, 1, H/2]. `interpret` runs it on any device, for tests.
    """
    parts, batch, tokens, heads, size = qkv.shape
    kv_heads, slots = key.shape[1:3]
    queries = heads - 2 * kv_heads
    chunks = 1 if slots <= UNCUT_SLOTS else pl.cdiv(slots, CHUNK_SLOTS)
    cos, sin = (table[:, :, 0] for table in rope)
    cache = pl.BlockSpec((None, None, slots, size), lambda b, k, c: (b, k, 0, 0))
    table = pl.BlockSpec((None, tokens, size // 2), lambda b, k, c: (b, 0, 0))
    partial_shape = (batch, chunks, tokens, queries)
    whole = [(batch, tokens, queries, size)] if chunks == 1 else [(*partial_shape, size), partial_shape, partial_shape]
    dtype = key.dtype if chunks == 1 else jnp.float32
    key, value, *outputs = pl.pallas_call(
        partial(_kernel, biased=bias is not None, kv_heads=kv_heads, chunks=chunks, interpret=interpret),
        grid=(batch, kv_heads, chunks),
        in_specs=[
            cache,
            cache,
            pl.BlockSpec((parts, None, tokens, heads, size), lambda b, k, c: (0, b, 0, 0, 0)),
            table,
            table,
            pl.BlockSpec((None, tokens), lambda b, k, c: (b, 0)),
            *([] if bias is None else [pl.BlockSpec((heads, size), lambda b, k, c: (0, 0))]),
        ],
        out_specs=[cache, cache, *(_output_spec(shape, chunks) for shape in whole)],
        out_shape=[
            *[jax.ShapeDtypeStruct(key.shape, key.dtype)] * 2,
            *(jax.ShapeDtypeStruct(shape, dtype) for shape in whole),
        ],
        input_output_aliases={0: 0, 1: 1},
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="cached_attention",
    )(key, value, qkv, cos, sin, positions, *([] if bias is None else [bias]))
    mixed = outputs[0] if chunks == 1 else _combine(*outputs).astype(key.dtype)
    return mixed.reshape(batch, tokens, queries * size), key, value


def _output_spec(shape: tuple[int, ...], chunks: int) -> pl.BlockSpec:
    if chunks == 1:
        return pl.BlockSpec((None, *shape[1:]), lambda b, k, c: (b, 0, 0, 0))
    rest = len(shape) - 2
    return pl.BlockSpec((None, None, *shape[2:]), lambda b, k, c: (b, c, *[0] * rest))


def _combine(mixed: jax.Array, top: jax.Array, total: jax.Array) -> jax.Array:
    """Chunks [B, C, T, N, H] with the maxima and sums of their scores [B, C, T, N] -> [B, T, N, H]."""
    weight = jnp.exp(top - jnp.max(top, axis=1, keepdims=True))
    return jnp.sum(mixed * weight[..., None], axis=1) / jnp.sum(total * weight, axis=1)[..., None]


def _kernel(
    _key: Ref,
    _value: Ref,
    qkv: Ref,
    cos: Ref,
    sin: Ref,
    positions: Ref,
    *rest: Ref,
    biased: bool,
    kv_heads: int,
    chunks: int,
    interpret: bool,
) -> None:
    """One KV head and one chunk: write the new rows, then attend with all rows of the G query heads.

    `rest`: the bias if there is one, then the outputs key, value and what `cached_attention` makes its result of.
    `_key` and `_value` are key and value before the call: the same memory.
    """
    bias, (key, value, *outputs) = (rest[0], rest[1:]) if biased else (None, rest)
    _, tokens, heads, size = qkv.shape
    queries, kv_head = heads - 2 * kv_heads, pl.program_id(1)
    group = queries // kv_heads
    row = _rows(tokens * group, SMALLEST)
    token, head = row // group, kv_head * group + row % group
    query = _turned(qkv, bias, cos, sin, (token[:, None], head[:, None]), key.dtype)

    # Every chunk writes all of the new rows, always the same: each then reads what it wrote itself.
    new = _rows(tokens, 1)[:, None]
    slot, column = plt.load(positions.at[new]), jnp.arange(size)[None, :]
    half = jnp.arange(size // 2)[None, :]
    low, high = _turned(qkv, bias, cos, sin, (new, queries + kv_head), key.dtype)
    plt.store(key.at[slot, half], low)
    plt.store(key.at[slot, half + size // 2], high)
    plt.store(value.at[slot, column], _total(qkv, bias, (new, queries + kv_heads + kv_head, column), value.dtype))
    if not interpret:
        plt.debug_barrier()  # the program's other threads wrote what the next lines read

    mixed, top, total = _attend(query, key, value, plt.load(positions.at[token]), chunks)
    at = (token[:, None], head[:, None], column)
    if chunks == 1:
        plt.store(outputs[0].at[at], (mixed / total[:, None]).astype(outputs[0].dtype))
        return
    plt.store(outputs[0].at[at], mixed)
    plt.store(outputs[1].at[token, head], top)
    plt.store(outputs[2].at[token, head], total)


def _attend(
    query: tuple[jax.Array, jax.Array], key: Ref, value: Ref, position: jax.Array, chunks: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both halves of turned queries [rows, H/2] over this program's chunk, step by step (online softmax).

    Returns the weighted sum of values [rows, H], the highest score and the sum of weights [rows].
    """
    slots, size = key.shape
    rows, scale = query[0].shape[0], size**-0.5
    begin = pl.program_id(2) * CHUNK_SLOTS
    end = jnp.minimum(slots if chunks == 1 else jnp.minimum(begin + CHUNK_SLOTS, slots), jnp.max(position) + 1)
    column, half = jnp.arange(size)[None, :], jnp.arange(size // 2)[None, :]

    def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mixed, top, total = carry
        slot = begin + index * STEP_SLOTS + jnp.arange(STEP_SLOTS)
        inside = (slot < slots)[:, None]
        left = plt.load(key.at[slot[:, None], half], mask=inside, other=0.0)
        right = plt.load(key.at[slot[:, None], half + size // 2], mask=inside, other=0.0)
        scores = (plt.dot(query[0], left.T) + plt.dot(query[1], right.T)) * scale
        scores = jnp.where(slot[None, :] <= position[:, None], scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top[:, None])
        values = plt.load(value.at[slot[:, None], column], mask=inside, other=0.0)
        mixed = mixed * shrink[:, None] + plt.dot(weights.astype(values.dtype), values)
        return mixed, new_top, total * shrink + jnp.sum(weights, axis=1)

    start = (jnp.zeros((rows, size), jnp.float32), jnp.full((rows,), MASKED), jnp.zeros((rows,), jnp.float32))
    return jax.lax.fori_loop(0, pl.cdiv(end - begin, STEP_SLOTS), step, start)


def _rows(count: int, least: int) -> jax.Array:
    """0 .. count - 1, filled up with 0 to a power of two: the rows that fill up do the first one's work again."""
    row = jnp.arange(max(least, pl.next_power_of_2(count)))
    return jnp.where(row < count, row, 0)


def _total(qkv: Ref, bias: Ref | None, at: tuple[Any, ...], dtype: jnp.dtype) -> jax.Array:
    """Sum of the parts of a product and its bias at (token, head, column), rounded as the product itself would be."""
    total = plt.load(qkv.at[(0, *at)]).astype(jnp.float32)
    for part in range(1, qkv.shape[0]):
        total += plt.load(qkv.at[(part, *at)])
    if bias is not None:
        total += plt.load(bias.at[at[1:]]).astype(jnp.float32)
    return total.astype(dtype)


def _turned(
    qkv: Ref, bias: Ref | None, cos: Ref, sin: Ref, at: tuple[Any, Any], dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Both halves [rows, H/2] of the heads `at` (token, head), turned to the token's position."""
    half = jnp.arange(cos.shape[-1])[None, :]
    first = _total(qkv, bias, (*at, half), dtype).astype(jnp.float32)
    second = _total(qkv, bias, (*at, half + cos.shape[-1]), dtype).astype(jnp.float32)
    c, s = plt.load(cos.at[at[0], half]), plt.load(sin.at[at[0], half])
    return (first * c - second * s).astype(dtype), (second * c + first * s).astype(dtype)
