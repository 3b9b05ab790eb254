"""A Llama decoder layer of a drafter's own: through a round's caches by the GPU's kernels, or whole for learning.

What it computes in a round decides what is proposed and nothing else. Letters as in `layers.py`; R rows with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvi_jax.config import LlamaConfig
from dvi_jax.model import attention, decode_attention
from dvi_jax.model.attention import AnyCache
from dvi_jax.model.decode_products import by_sequence, gated_product, laid_flat, product
from dvi_jax.model.product_blocks import sum_parts
from dvi_jax.model.products import linear
from dvi_jax.model.residual import Residual, rms_norm
from dvi_jax.model.variables import DrafterParam

Product = Callable[[jax.Array, jax.Array], jax.Array]  # `linear`, or in a round `round_linear`, which has no derivative


class LayerWeights(NamedTuple):
    """The weights of one layer, shaped as `llama.base_shapes` has them."""

    attn_norm: jax.Array
    qkv: jax.Array
    out: jax.Array
    mlp_norm: jax.Array
    gate_up: jax.Array
    down: jax.Array

    @classmethod
    def of(cls, module: nnx.Module, dtype: jnp.dtype) -> LayerWeights:
        """Those that `module` has under these names, in the dtype of what goes through."""
        return cls(*(getattr(module, name)[...].astype(dtype) for name in cls._fields))


class DraftLayer(nnx.Module):
    """Weights of a layer that is to be trained."""

    def __init__(self, config: LlamaConfig, keys: Iterable[jax.Array]):
        """`keys`: four PRNG keys."""
        d, f = config.hidden_size, config.intermediate_size
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        keys = iter(keys)
        self.attn_norm, self.mlp_norm = (DrafterParam(jnp.ones(d, jnp.float32)) for _ in range(2))
        self.qkv = DrafterParam(random_matrix(next(keys), query + 2 * kv, d))
        self.out = DrafterParam(random_matrix(next(keys), d, query))
        self.gate_up = DrafterParam(random_matrix(next(keys), 2 * f, d))
        self.down = DrafterParam(random_matrix(next(keys), d, f))


def random_matrix(key: jax.Array, out: int, width: int) -> jax.Array:
    """float32 [out, in], normal, such that a product keeps the size of what goes in."""
    return width**-0.5 * jax.random.normal(key, (out, width), jnp.float32)


class Geometry(NamedTuple):
    """What the layers of one drafter share: the base model's heads, norm and positions."""

    heads: attention.Heads
    eps: float
    frequencies: jax.Array  # float32 [H/2]

    @classmethod
    def of(cls, config: LlamaConfig) -> Geometry:
        """That of the base model."""
        frequencies = attention.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return cls((config.num_heads, config.num_kv_heads, config.head_dim), config.rms_norm_eps, frequencies)

    def rope(self, positions: jax.Array) -> attention.Rope:
        """How to turn rows at int `positions` [B, T]."""
        return attention.rope_tables(self.frequencies, positions)


def begin_round(x: jax.Array, head_dim: int, weight: jax.Array | None = None) -> Residual:
    """A round's rows x [B, T, D] as the stream that `run_round` takes; x [B, T, in] times a `weight` [D, in] if given.

    The first norm then adds up the parts of that product on its way.
    """
    few = x.shape[1] <= decode_attention.MOST_ROUND_ROWS
    kernels = few and attention.has_round_kernels(x.shape[0] * x.shape[1], head_dim, x.dtype)
    if not kernels:
        return Residual(x if weight is None else linear(x, weight))
    flat = laid_flat(x)
    if weight is None:
        return Residual(flat, kernels=True)
    parts = product(flat, weight, parts=sum_parts(weight))
    return Residual(jnp.zeros(parts.shape[1:], x.dtype), parts, kernels=True)


def run_round(
    residual: Residual,
    weights: LayerWeights,
    geometry: Geometry,
    rope: attention.Rope,
    cache: AnyCache,
    positions: jax.Array,
) -> tuple[Residual, Any]:
    """A round's rows at `positions` [B, T] through the layer and its cache."""

    def project(x: jax.Array, weight: jax.Array) -> jax.Array:
        return product(x, weight, parts=sum_parts(weight)) if residual.kernels else linear(x, weight)[None]

    residual, normed = residual.normed(weights.attn_norm, geometry.eps)
    mixed, cache = attention.attend_cached(project(normed, weights.qkv), geometry.heads, rope, cache, positions)
    residual, normed = residual.plus(project(mixed, weights.out)).normed(weights.mlp_norm, geometry.eps)
    gated = gated_product(normed, weights.gate_up) if residual.kernels else swiglu(normed, weights.gate_up)
    return residual.plus(project(gated, weights.down)), cache


def finish_round(residual: Residual, norm: jax.Array, geometry: Geometry, positions: jax.Array) -> jax.Array:
    """The normed end of the stream, of the rows at `positions` [B, T]: [B, T, D]."""
    return by_sequence(residual.normed(norm, geometry.eps)[1], positions)


def queries_keys_values(
    x: jax.Array, weights: LayerWeights, geometry: Geometry, rope: attention.Rope
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of rows x [B, T, D], turned: [B, T, N, H], and [B, K, T, H] twice."""
    qkv = linear(rms_norm(x, weights.attn_norm, geometry.eps), weights.qkv)
    return attention.split_heads(qkv, geometry.heads, rope)


def after_attention(x: jax.Array, mixed: jax.Array, weights: LayerWeights, eps: float) -> jax.Array:
    """The rest of the layer: stream [..., D] and attention [..., N*H] -> stream."""
    x = x + linear(mixed, weights.out)
    return x + linear(swiglu(rms_norm(x, weights.mlp_norm, eps), weights.gate_up), weights.down)


def swiglu(x: jax.Array, gate_up: jax.Array) -> jax.Array:
    """silu(x gate) * (x up), for joined weights [2F, D]: [..., F]."""
    gate, up = jnp.split(linear(x, gate_up), 2, axis=-1)
    return jax.nn.silu(gate) * up
