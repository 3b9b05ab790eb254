"""Rotary position embedding, the static KV cache, and attention over it.

Letters: P parts of a product, B batch, T tokens in this call, S cache slots, N query heads, K KV heads, G = N/K,
H head size.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dvi_jax.config import WHOLE_KV, LlamaConfig, RopeScaling
from dvi_jax.model import decode_attention, decode_products, prefill_attention
from dvi_jax.model.kept_kv import Kept, Rows, empty, keep, stored, times_scales
from dvi_jax.model.products import has_gpu_kernels, precision, total


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [B, K, S, H]. Slot s holds position s; later slots are masked, not cleared."""

    key: Rows
    value: Rows


Caches = tuple[LayerCache, ...]
Heads = tuple[int, int, int]  # (N, K, H)
Rope = tuple[jax.Array, jax.Array]  # of `rope_tables`


class BranchingCache(Protocol):
    """A cache whose rows are not one sequence (`tree_cache.py`)."""

    def attend(
        self, qkv: jax.Array, heads: Heads, rope: Rope, positions: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """`attend_cached` over this cache."""


AnyCache = LayerCache | BranchingCache
CUDNN: Literal["cudnn", "xla"] = "cudnn"  # the implementation of `jax.nn.dot_product_attention`


def init_caches(
    config: LlamaConfig, num_layers: int, batch: int, slots: int, dtype: jnp.dtype, kv: str = WHOLE_KV
) -> Caches:
    """Zeroed caches of `num_layers` layers, rows of `dtype` kept as `kv` says (`kept_kv.py`).

    Zeros, since a NaN in a masked slot would poison a row (0 * NaN).
    """
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    return tuple(LayerCache(empty(shape, dtype, kv), empty(shape, dtype, kv)) for _ in range(num_layers))


def write_rows(cache: LayerCache, key: jax.Array, value: jax.Array, start: jax.Array) -> LayerCache:
    """Write `key`, `value` [B, K, T, H] into slots start[b] .. start[b] + T - 1 of each row b. start: int32 [B]."""
    return put_rows(cache, LayerCache(keep(key, cache.key), keep(value, cache.value)), start)


def put_rows(cache: LayerCache, rows: LayerCache, start: jax.Array) -> LayerCache:
    """`write_rows` of rows that are as `cache` keeps them already."""

    def write(buffer: jax.Array, rows: jax.Array) -> jax.Array:
        if buffer.shape[0] == 1:  # one slice update is cheaper than the scatter that vmap makes of it
            return jax.lax.dynamic_update_slice(buffer, rows, (0, 0, start[0], 0))
        return jax.vmap(lambda b, r, s: jax.lax.dynamic_update_slice(b, r, (0, s, 0)))(buffer, rows, start)

    return jax.tree.map(write, cache, rows)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angular frequency of each rotary pair, float32 [H/2] (RoFormer; `llama3` scaling from the Llama 3.1 report)."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 0 below the low-frequency cut (fully scaled), 1 above the high-frequency cut (untouched), linear between.
    share = jnp.clip((scaling.original_max_position_embeddings / wavelength - low) / (high - low), 0, 1)
    return share * frequencies + (1 - share) * frequencies / scaling.factor


def rope_tables(frequencies: jax.Array, positions: jax.Array) -> Rope:
    """cos and sin, float32 [B, T, 1, H/2], for integer `positions` [B, T]."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, tables: Rope) -> jax.Array:
    """Rotate x [B, T, heads, H] by position; pairs are (i, i + H/2), as in Hugging Face's Llama."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def has_round_kernels(rows: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether all of a round of `rows` rows (batch times rows of a sequence) goes through the GPU kernels.

    Then no row's bits depend on how many there are. Without attention's kernel they do.
    """
    return decode_products.is_supported(rows, dtype) and decode_attention.is_supported(1, head_dim, dtype)


def attend_cached(
    qkv: jax.Array,
    heads: Heads,
    rope: Rope,
    cache: AnyCache,
    positions: jax.Array,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Rows qkv [P, B, T, (N+2K)H] at consecutive `positions` [B, T] into the cache, and their attention over it.

    `bias` [(N+2K)H] is added to the sum of the parts, which are then in float32, before that is rounded. Where a round
    has kernels, its rows may also lie flat, with more behind them that mean nothing: [P, R, (N+2K)H] -> [R, N*H].
    Another kind of cache attends in its own way, its rows at any positions. -> [B, T, N*H], the cache with the rows.
    """
    if not isinstance(cache, LayerCache):
        return cache.attend(qkv, heads, rope, positions, bias)
    dtype = cache.key.dtype
    if decode_attention.is_supported(positions.shape[1], heads[2], dtype):
        biases = () if bias is None else (by_head(bias, heads),)
        flat = flat_by_head(qkv, heads)
        mixed, key, value = decode_attention.cached_attention(flat, rope, *cache, positions, *biases)
        return mixed.reshape(*qkv.shape[1:-1], -1), LayerCache(key, value)
    query, key, value = split_heads(total(qkv, dtype, bias), heads, rope)
    cache = write_rows(cache, key, value, positions[:, 0])
    return attend_over(query, cache, positions), cache


def attend_over(query: jax.Array, cache: LayerCache, positions: jax.Array) -> jax.Array:
    """Attention of turned queries [B, T, N, H] at `positions` [B, T], whose rows are in the cache: [B, T, N*H]."""
    mask = cached_mask(positions, cache.key.shape[2])
    # Rounds stay with the einsum, in which no row depends on the rows beside it.
    if query.shape[1] > decode_attention.MOST_ROUND_ROWS and has_gpu_kernels(query.dtype):
        return attend_many(query, *cache, positions, mask)
    return attend(query, *cache, mask)


def attend_many(query: jax.Array, key: Rows, value: Rows, positions: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` of a prefill's rows on a GPU, by a kernel that reads what the cache holds as it is.

    For heads that this does not take, cuDNN reads all slots, those in 8 bits as a copy in the model's dtype.
    """
    if decode_attention.fits(query.shape[-1]):
        return prefill_attention.prefill_attention(query, key, value, positions)
    whole = (rows.dequantised() if isinstance(rows, Kept) else rows for rows in (key, value))
    return cudnn_attention(query, *whole, mask=mask[:, None])


def attend_fresh(
    qkv: jax.Array,
    heads: Heads,
    rope: Rope,
    cache: LayerCache | None,
    positions: jax.Array,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache | None]:
    """The same where nothing lies in the cache yet, or there is none: rows see the rows of this call alone. P is 1."""
    rows = qkv[0] if bias is None else total(qkv, bias.dtype, bias)
    query, *fresh = split_heads(rows, heads, rope)
    key, value = fresh if cache is None else (keep(x, like) for x, like in zip(fresh, cache, strict=True))
    if cache is not None:
        cache = put_rows(cache, LayerCache(key, value), positions[:, 0])  # rows see what is kept of them
    mask = positions[:, None, :] <= positions[:, :, None]
    if not has_gpu_kernels(query.dtype):
        return attend(query, key, value, mask), cache
    if isinstance(key, Kept) or isinstance(value, Kept):
        return attend_many(query, key, value, positions, mask), cache
    return cudnn_attention(query, key, value, is_causal=True), cache


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: jax.Array | None = None, is_causal: bool = False
) -> jax.Array:
    """`attend` by cuDNN, which never writes the scores to memory. Either `mask`, bool [B, 1, T, S], or `is_causal`."""
    mixed = jax.nn.dot_product_attention(
        query,
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        mask=mask,
        is_causal=is_causal,
        implementation=CUDNN,
    )
    return mixed.reshape(*query.shape[:2], -1)


def by_head(qkv: jax.Array, heads: Heads) -> jax.Array:
    """Joined [..., (N+2K)H] -> [..., N+2K, H]: queries, then keys, then values."""
    n, k, h = heads
    return qkv.reshape(*qkv.shape[:-1], n + 2 * k, h)


def flat_by_head(qkv: jax.Array, heads: Heads) -> jax.Array:
    """The same of parts [P, ..., (N+2K)H] as the kernels take them, all rows of a part in one: [P, R, N+2K, H]."""
    split = by_head(qkv, heads)
    return split.reshape(qkv.shape[0], -1, *split.shape[-2:])


def split_heads(qkv: jax.Array, heads: Heads, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Joined [B, T, (N+2K)H] -> query [B, T, N, H], key, value [B, K, T, H]; query and key turned."""
    n, k, _ = heads
    split = by_head(qkv, heads)
    query, key, value = split[..., :n, :], split[..., n : n + k, :], split[..., n + k :, :]
    query, key = apply_rope(query, rope), apply_rope(key, rope)
    return query, key.swapaxes(1, 2), value.swapaxes(1, 2)


def attend(query: jax.Array, key: Rows, value: Rows, mask: jax.Array) -> jax.Array:
    """Softmax attention in float32. query [B, T, N, H]; key, value [B, K, S, H]; mask bool [B, T, S] -> [B, T, N*H].

    A plain einsum on purpose: each query row's sum runs over the slots in a fixed order and masked slots add an exact
    zero, so a row's result does not depend on the rows beside it (what bit-exact losslessness rests on).
    """
    batch, tokens, heads, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, tokens, kv_heads, heads // kv_heads, size)
    scores = times_scales(wide_einsum("btkgh,bksh->bkgts", grouped, stored(key)), key)
    scores = jnp.where(mask[:, None, None], scores / math.sqrt(size), -jnp.inf)
    weights = times_scales(jax.nn.softmax(scores, axis=-1), value).astype(value.dtype)
    mixed = wide_einsum("bkgts,bksh->btkgh", weights, stored(value))
    return mixed.astype(query.dtype).reshape(batch, tokens, heads * size)


def wide_einsum(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum accumulated and returned in float32; what has 8 bits on the right is taken as the left's dtype."""
    right = right.astype(left.dtype)
    if jax.default_backend() == "cpu":  # XLA's CPU backend has no batched bfloat16 product with a float32 result
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32, precision=precision(left))


def cached_mask(positions: jax.Array, slots: int) -> jax.Array:
    """bool [B, T, S]: the row at position p sees slots 0..p."""
    return jnp.arange(slots) <= positions[..., None]
