"""Parts shared by the Llama and the drafters: linear maps with optional LoRA, RMSNorm, and the decoder block.

Weights are stored [out, in] and contracted on their last axis, so that a matrix-vector product reads them as they lie
in memory. q/k/v and gate/up are fused: fewer kernels, larger reads. Letters as in `attention.py`, and D hidden,
F feed-forward, V vocabulary, R LoRA rank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dvi_jax.model import attention
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.variables import Base, DeepLoRA


class LoRA(nnx.Module):
    """A low-rank addition `scale * B A` to a weight [out, in]; `kind` is `ShallowLoRA` or `DeepLoRA`.

    B starts at zero, so a new adapter changes nothing (LoRA, arXiv 2106.09685). Kept in float32: it is trained.
    """

    def __init__(self, kind: type[nnx.Variable], a: jax.Array, b: jax.Array, scale: float):
        self.a = kind(a)  # [R, in]
        self.b = kind(b)  # [out, R]
        self.scale = scale

    @classmethod
    def create(cls, kind: type[nnx.Variable], shape: tuple[int, ...], rank: int, alpha: float, key: jax.Array) -> LoRA:
        """A fresh adapter for a weight of `shape` (out, in)."""
        out, width = shape
        a = jax.random.normal(key, (rank, width), jnp.float32) / jnp.sqrt(width)
        return cls(kind, a, jnp.zeros((out, rank), jnp.float32), alpha / rank)

    def __call__(self, x: jax.Array) -> jax.Array:
        down = linear(x, self.a[...].astype(x.dtype))
        return linear(down, self.b[...].astype(x.dtype)) * self.scale


def linear(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., in] times weight [out, in] -> [..., out]; accumulated in float32, given in `out_dtype` or x's dtype."""
    result = jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=attention.precision(x),
        preferred_element_type=jnp.float32,
    )
    return result.astype(out_dtype or x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm with float32 statistics; cast back to x's dtype *before* the weight, as Hugging Face does."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * normed.astype(x.dtype)


class Block(nnx.Module):
    """One Llama decoder layer: RMSNorm, attention, residual, RMSNorm, SwiGLU, residual."""

    def __init__(self, weights: dict, heads: tuple[int, int, int], eps: float, kind: type[nnx.Variable] = Base):
        """`weights`: attn_norm, qkv, out, mlp_norm, gate_up, down. `heads`: (N, K, H)."""
        for name, value in weights.items():
            setattr(self, name, kind(value))
        self.heads = heads
        self.eps = eps
        self.lora = nnx.Dict()  # weight name -> LoRA

    def __call__(
        self,
        x: jax.Array,
        rope: attention.Rope,
        cache: LayerCache | None,
        positions: jax.Array,
        *,
        adapted: bool,
        fresh: bool,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] at consecutive `positions` [B, T] -> (x, cache). `fresh`: nothing lies in the cache yet."""
        attend = attention.attend_fresh if fresh else attention.attend_cached
        normed = rms_norm(x, self.attn_norm[...], self.eps)
        qkv = self._project("qkv", normed, adapted)
        with jax.named_scope("attention"):
            mixed, cache = attend(qkv, self.heads, rope, cache, positions)
        x = x + self._project("out", mixed, adapted)
        with jax.named_scope("mlp"):
            normed = rms_norm(x, self.mlp_norm[...], self.eps)
            gate, up = jnp.split(self._project("gate_up", normed, adapted), 2, axis=-1)
            x = x + self._project("down", jax.nn.silu(gate) * up, adapted)
        return x, cache

    def _project(self, name: str, x: jax.Array, adapted: bool) -> jax.Array:
        y = linear(x, getattr(self, name)[...])
        adapter = self.lora.get(name)
        # lora_D is part of the verifier; lora_S acts only in the draft pass.
        if adapter is not None and (adapted or isinstance(adapter.a, DeepLoRA)):
            y = y + adapter(x)
        return y
