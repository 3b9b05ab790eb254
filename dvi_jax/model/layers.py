"""The decoder block, and the LoRA that its products may have.

q, k, v and gate, up are joined to one matrix each: fewer kernels, larger reads. Letters as in `attention.py`, and P
parts of a product, D hidden, F feed-forward, V vocabulary, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dvi_jax.model import attention, decode_attention, exchange
from dvi_jax.model.attention import AnyCache, LayerCache
from dvi_jax.model.decode_products import gated_product, product
from dvi_jax.model.product_blocks import sum_parts
from dvi_jax.model.products import linear, total
from dvi_jax.model.quantised import Matrix, frozen, multiply_rows
from dvi_jax.model.residual import Residual
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

    def __call__(self, x: jax.Array, *, kernels: bool = False) -> jax.Array:
        """x [..., in] -> what is added, [..., out]; `kernels` as in `Residual`."""
        multiply = (lambda x, weight: product(x, weight)[0]) if kernels else linear
        down = multiply(x, self.a[...].astype(x.dtype))
        return multiply(down, self.b[...].astype(x.dtype)) * self.scale


class Block(nnx.Module):
    """One Llama decoder layer: RMSNorm, attention, residual, RMSNorm, SwiGLU, residual."""

    def __init__(self, weights: dict[str, Any], heads: attention.Heads, eps: float, shards: int = 1):
        """`weights`: one for each name below, as a base tree has them, arrays or quantised; `heads`: (N, K, H).

        `shards`: devices that have a part of the layer each; `weights` and `heads` are then those of a part.
        """
        self.attn_norm = Base(weights["attn_norm"])
        self.qkv = frozen(weights["qkv"])
        self.out = frozen(weights["out"])
        self.mlp_norm = Base(weights["mlp_norm"])
        self.gate_up = frozen(weights["gate_up"])
        self.down = frozen(weights["down"])
        self.is_biased = "qkv_bias" in weights
        if self.is_biased:
            self.qkv_bias = Base(weights["qkv_bias"])
        self.is_equalised = False  # True: rows of `qkv` have been multiplied, by `qkv_factors` (`equalised.py`)
        self.heads = heads
        self.eps = eps
        self.shards = shards
        self.lora: nnx.Dict[LoRA] = nnx.Dict()  # by weight name

    def __call__(
        self,
        residual: Residual,
        rope: attention.Rope,
        cache: AnyCache | None,
        positions: jax.Array,
        *,
        adapted: bool,
        fresh: bool,
    ) -> tuple[jax.Array, Residual, Any]:
        """Rows at consecutive `positions` [B, T]; `fresh`: nothing lies in the cache yet.

        Returns the stream as it enters the layer [B, T, D], which costs nothing, the stream behind it, and the cache.
        """

        project = partial(self._project, adapted=adapted, kernels=residual.kernels)
        few = positions.shape[1] <= decode_attention.MOST_ROUND_ROWS
        plus = partial(self._plus, rows=positions.size, few=few)
        residual, normed = residual.normed(self.attn_norm[...], self.eps)
        entered = residual.x
        qkv = project("qkv", normed, wide=self.is_biased)
        bias = self.qkv_bias[...] if self.is_biased else None
        with jax.named_scope("attention"):
            if fresh or cache is None:
                assert cache is None or isinstance(cache, LayerCache)  # a tree has a prompt before it
                mixed, cache = attention.attend_fresh(qkv, self.heads, rope, cache, positions, bias)
            else:
                mixed, cache = attention.attend_cached(qkv, self.heads, rope, cache, positions, bias)
        residual = plus(residual, project("out", mixed, wide=self.shards > 1))
        with jax.named_scope("mlp"):
            residual, normed = residual.normed(self.mlp_norm[...], self.eps)
            if residual.kernels and "gate_up" not in self.lora:
                gated = gated_product(normed, self.gate_up[...])
            else:
                gate, up = jnp.split(total(project("gate_up", normed), normed.dtype), 2, axis=-1)
                gated = jax.nn.silu(gate) * up
            return entered, plus(residual, project("down", gated, wide=self.shards > 1)), cache

    def multiply_qkv(self, factors: jax.Array) -> None:
        """Rows of `qkv`, and of its bias, times factors float32 [(N+2K)H] from here on; what adapters add is, too."""
        multiply_rows(self.qkv, factors)
        if self.is_biased:
            multiply_rows(self.qkv_bias, factors)
        self.is_equalised, self.qkv_factors = True, Base(factors)

    def exchanged_parts(self) -> int:
        """P: into how many parts, at most, a sum of this device goes to the others in a round."""
        return max(self._sum_parts(name, getattr(self, name)[...]) for name in ("out", "down"))

    def _plus(self, residual: Residual, parts: jax.Array, *, rows: int, few: bool) -> Residual:
        """The stream with a product to be added, of which `parts` [P, ..., D] are this device's share.

        `few`: rows of a round, whose bits must not depend on where they lie. `rows`: how many there are; with kernels
        more may fill up a tile, and those go to nobody.
        """
        if self.shards == 1:
            return residual.plus(parts)
        if not few:
            return residual.plus(exchange.summed(parts))
        whole, inbox = exchange.joined_parts(parts, rows if residual.kernels else None, residual.inbox)
        return replace(residual.plus(whole), inbox=inbox)

    def _project(self, name: str, x: jax.Array, *, adapted: bool, kernels: bool, wide: bool = False) -> jax.Array:
        """x [..., in] times the weight `name`, in parts where kernels add them up: [P, ..., out].

        `wide`: in float32 also where it is one part, since something is still to be added before it is rounded.
        """
        weight = getattr(self, name)[...]
        dtype = jnp.float32 if wide else x.dtype
        if kernels:
            parts = product(x, weight, parts=self._sum_parts(name, weight), out_dtype=dtype)
        else:
            parts = linear(x, weight, dtype)[None]
        adapter = self.lora.get(name)
        # lora_D is part of the verifier; lora_S acts only in the draft pass.
        if adapter is not None and (adapted or isinstance(adapter.a, DeepLoRA)):
            added = adapter(x, kernels=kernels)
            if name == "qkv" and self.is_equalised:
                added = added * self.qkv_factors[...].astype(added.dtype)
            return (total(parts, dtype) + added)[None]
        return parts

    def _sum_parts(self, name: str, weight: Matrix) -> int:
        """`sum_parts` of the whole weight, so that equal parts are cut where one device cuts them; or as it suits."""
        out, width = weight.shape
        if name in ("qkv", "gate_up"):
            return sum_parts(weight, (self.shards * out, width))
        whole = sum_parts(weight, (out, self.shards * width))
        return sum_parts(weight) if whole % self.shards else whole // self.shards
