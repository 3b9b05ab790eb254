"""Attention of a few new rows over the KV cache as one GPU kernel, written in Pallas for Triton.

An einsum takes five kernels for what is microseconds of work, and reads every slot of the cache. This one reads the
slots that are filled and turns the queries on the way (RoPE). A long cache is cut into chunks that are worked on side
by side and put together at the end (Flash-Decoding, split-KV form of FlashAttention, arXiv 2307.08691). Writing the new
rows in here as well was tried: no faster on an H100.

Bit-exact losslessness: a row's result depends on its own query and on slots 0 .. position alone. Chunks are fixed
ranges of slots, a masked slot or chunk adds an exact zero, and rows never meet in a sum.

Letters: B batch, T rows in this call, N query heads, K KV heads, G = N/K, H head size, S cache slots, C chunks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

CHUNK = 512  # slots of a chunk
WHOLE = 1024  # caches up to here are one chunk: a short context is not worth a second kernel
BLOCK = 64  # slots of one step inside a chunk
SMALLEST = 16  # rows of the smallest matrix product in Triton
MOST_ROWS = 64  # T * G beyond which the accumulators no longer fit into registers
Ref = Any  # a pointer into an array; indexing gives another, `plt.load` and `plt.store` use it
MASKED = -1e30  # finite: the maximum of a chunk that a row cannot see must not give inf - inf


def is_supported(rows: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes `rows` = T * G rows of 16-bit heads of this size on the default backend."""
    half = head_dim // 2
    sizes_fit = rows <= MOST_ROWS and half >= SMALLEST and half & (half - 1) == 0
    return jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2 and sizes_fit


def cached_attention(
    qkv: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Queries of qkv [B, T, N+2K, H], not turned yet, over key, value [B, K, S, H] -> [B, T, N*H] in qkv's dtype.

    rope: cos and sin [B, T, 1, H/2]; the row at positions[b, t] sees slots 0 .. positions[b, t]. `interpret` runs the
    kernel on any device, for tests.
    """
    batch, tokens, heads, size = qkv.shape
    kv_heads, slots = key.shape[1:3]
    queries = heads - 2 * kv_heads
    chunks = 1 if slots <= WHOLE else pl.cdiv(slots, CHUNK)
    cos, sin = (table[:, :, 0] for table in rope)
    partial_shape = (batch, chunks, tokens, queries)
    whole = [(batch, tokens, queries, size)] if chunks == 1 else [(*partial_shape, size), partial_shape, partial_shape]
    dtype = qkv.dtype if chunks == 1 else jnp.float32
    outputs = pl.pallas_call(
        partial(_kernel, group=queries // kv_heads, scale=size**-0.5, chunks=chunks),
        grid=(batch, kv_heads, chunks),
        in_specs=[
            pl.BlockSpec((None, tokens, heads, size), lambda b, k, c: (b, 0, 0, 0)),
            pl.BlockSpec((None, tokens, size // 2), lambda b, k, c: (b, 0, 0)),
            pl.BlockSpec((None, tokens, size // 2), lambda b, k, c: (b, 0, 0)),
            pl.BlockSpec((None, None, slots, size), lambda b, k, c: (b, k, 0, 0)),
            pl.BlockSpec((None, None, slots, size), lambda b, k, c: (b, k, 0, 0)),
            pl.BlockSpec((None, tokens), lambda b, k, c: (b, 0)),
        ],
        out_specs=[_output_spec(shape, chunks) for shape in whole],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape in whole],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="cached_attention",
    )(qkv, cos, sin, key, value, positions)
    mixed = outputs[0] if chunks == 1 else _combine(*outputs).astype(qkv.dtype)
    return mixed.reshape(batch, tokens, queries * size)


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
    qkv: Ref,
    cos: Ref,
    sin: Ref,
    key: Ref,
    value: Ref,
    positions: Ref,
    *outputs: Ref,
    group: int,
    scale: float,
    chunks: int,
) -> None:
    """One KV head and one chunk: all rows of its G query heads, step by step over the slots (online softmax)."""
    kv_head, chunk = pl.program_id(1), pl.program_id(2)
    tokens, _, size = qkv.shape
    slots, half = key.shape[0], size // 2
    rows = max(SMALLEST, pl.next_power_of_2(tokens * group))
    row = jnp.arange(rows)
    row = jnp.where(row < tokens * group, row, 0)  # rows that fill up do the first one's work again
    token, head = row // group, kv_head * group + row % group
    position = plt.load(positions.at[token])

    lane = jnp.arange(half)[None, :]
    at = (token[:, None], head[:, None])
    first = plt.load(qkv.at[(*at, lane)]).astype(jnp.float32)
    second = plt.load(qkv.at[(*at, lane + half)]).astype(jnp.float32)
    turn = plt.load(cos.at[token[:, None], lane]), plt.load(sin.at[token[:, None], lane])
    low = (first * turn[0] - second * turn[1]).astype(qkv.dtype)
    high = (second * turn[0] + first * turn[1]).astype(qkv.dtype)

    begin = chunk * CHUNK
    end = jnp.minimum(slots if chunks == 1 else jnp.minimum(begin + CHUNK, slots), jnp.max(position) + 1)

    def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mixed, top, total = carry
        slot = begin + index * BLOCK + jnp.arange(BLOCK)
        inside = (slot < slots)[:, None]
        left = plt.load(key.at[slot[:, None], lane], mask=inside, other=0.0)
        right = plt.load(key.at[slot[:, None], lane + half], mask=inside, other=0.0)
        scores = (plt.dot(low, left.T) + plt.dot(high, right.T)) * scale
        scores = jnp.where(slot[None, :] <= position[:, None], scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top[:, None])
        values = plt.load(value.at[slot[:, None], jnp.arange(size)[None, :]], mask=inside, other=0.0)
        mixed = mixed * shrink[:, None] + plt.dot(weights.astype(values.dtype), values)
        return mixed, new_top, total * shrink + jnp.sum(weights, axis=1)

    start = (jnp.zeros((rows, size), jnp.float32), jnp.full((rows,), MASKED), jnp.zeros((rows,), jnp.float32))
    mixed, top, total = jax.lax.fori_loop(0, pl.cdiv(end - begin, BLOCK), step, start)
    column = jnp.arange(size)[None, :]
    if chunks == 1:
        result = (mixed / total[:, None]).astype(outputs[0].dtype)
        plt.store(outputs[0].at[(*at, column)], result)
        return
    plt.store(outputs[0].at[(*at, column)], mixed)
    plt.store(outputs[1].at[token, head], top)
    plt.store(outputs[2].at[token, head], total)
