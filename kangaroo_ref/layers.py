"""The layers of a Llama in eager PyTorch, with the numerics of transformers 4.33.3.

Dimension letters: B batch, T rows in this call, S rows cached including this call, D hidden, N query heads,
K KV heads, H head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KVCache = tuple[Tensor, Tensor]  # keys and values, each [B, K, S, H]
MIN_ROPE_TABLE = 2048


@dataclass(frozen=True)
class ModelConfig:
    """What the layers need to know; `rope_scaling` is the dict of a Hugging Face config, or None."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False


def causal_mask(rows: int, past: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [1, 1, T, S] of T = `rows` after `past` cached ones: 0 or the least value."""
    new = torch.full((rows, rows), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)
    return torch.cat([torch.zeros(rows, past, dtype=dtype, device=device), new], dim=-1)[None, None]


class RMSNorm(nn.Module):
    """Normalises in float32, then casts back before the weight multiplies: the order matters in 16 bits."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """Angle per position of each pair of channels, float32 [H/2]."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    if not scaling or scaling.get("rope_type", scaling.get("type")) != "llama3":
        return frequency
    # Long waves are slowed by `factor`, short ones kept, those between the two bounds blended.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


class Rotary:
    """Table of cosines and sines for the half-rotation convention, kept in the dtype of the activations."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.table: tuple[Tensor, Tensor] | None = None

    def __call__(self, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [length, H] in the dtype and on the device of `like`."""
        if self.table is None or self.table[0].shape[0] < length:
            self.table = self._build(max(MIN_ROPE_TABLE, 1 << (length - 1).bit_length()), like)
        cos, sin = self.table
        return cos[:length], sin[:length]

    def _build(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        scaling = self.config.rope_scaling
        # In float32 on the CPU, whatever the model runs on: every device and dtype rounds the same table.
        position = torch.arange(length, device="cpu", dtype=torch.float32)
        if scaling and scaling.get("rope_type", scaling.get("type")) == "linear":
            position = position / scaling["factor"]
        frequency = rotary_frequencies(self.config.head_dim, self.config.rope_theta, scaling)
        angle = torch.outer(position, frequency)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(like), angle.sin().to(like)


def rotate_half(x: Tensor) -> Tensor:
    """The quarter turn of every channel pair (i, i + H/2): [..., H] -> [..., H]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """[B, K, S, H] -> [B, K * times, S, H], each head `times` in a row."""
    if times == 1:
        return x
    batch, heads, length, size = x.shape
    return x[:, :, None].expand(batch, heads, times, length, size).reshape(batch, heads * times, length, size)


class Attention(nn.Module):
    """Grouped-query self-attention that returns the grown cache."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        kv_size = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.rotary = Rotary(config)

    def forward(
        self, hidden: Tensor, mask: Tensor, position_ids: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, KVCache]:
        """hidden [B, T, D], mask [1, 1, T, S], position_ids [B, T] -> output [B, T, D] and S cached rows."""
        batch, rows, _ = hidden.shape
        q = self.q_proj(hidden).view(batch, rows, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(hidden).view(batch, rows, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(hidden).view(batch, rows, self.kv_heads, self.head_dim).transpose(1, 2)

        cos, sin = self.rotary(v, mask.shape[-1])
        cos, sin = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin

        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        groups = self.heads // self.kv_heads
        scores = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) / math.sqrt(self.head_dim)
        weights = nn.functional.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
        mixed = torch.matmul(weights, repeat_kv(v, groups))
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, rows, -1)), (k, v)


class AttentionLayer(nn.Module):
    """Pre-norm attention with a residual, no MLP: the adapter's layer, the first half of a Llama's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)

    def forward(
        self, hidden: Tensor, mask: Tensor, position_ids: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, KVCache]:
        """hidden [B, T, D] -> hidden [B, T, D] and the grown cache."""
        mixed, cache = self.self_attn(self.input_layernorm(hidden), mask, position_ids, cache)
        return hidden + mixed, cache


class MLP(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class DecoderLayer(AttentionLayer):
    """A whole Llama layer."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, hidden: Tensor, mask: Tensor, position_ids: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, KVCache]:
        """hidden [B, T, D] -> hidden [B, T, D] and the grown cache."""
        hidden, cache = super().forward(hidden, mask, position_ids, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), cache
