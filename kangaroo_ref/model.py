"""The early-exit Llama, the Kangaroo adapter, and the pair of them."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from kangaroo_ref.layers import AttentionLayer, DecoderLayer, KVCache, ModelConfig, RMSNorm, causal_mask

__all__ = ["Adapter", "EarlyExitLlamaForCausalLM", "KangarooModel", "ModelConfig", "crop"]


def crop(cache: KVCache, length: int) -> KVCache:
    """The first `length` positions of a layer's cache, as views."""
    return cache[0][:, :, :length], cache[1][:, :, :length]


def _positions(past: int, rows: int, device: torch.device) -> Tensor:
    return torch.arange(past, past + rows, device=device)[None]


class _Body(nn.Module):
    # Exists so that parameters carry their Hugging Face names (`model.layers.0...`).
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class EarlyExitLlamaForCausalLM(nn.Module):
    """A Llama run in two parts, layers below and from `exit_layer`, with its KV cache as a list on the model.

    `past_key_values` holds one (keys, values) pair per layer, None before the first row.
    """

    def __init__(self, config: ModelConfig, exit_layer: int):
        super().__init__()
        self.config = config
        self.exit_layer = exit_layer
        self.model = _Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset()

    def reset(self) -> None:
        """Forget every cached row."""
        self.past_key_values: list[KVCache | None] = [None] * self.config.num_layers

    def crop(self, length: int) -> None:
        """Forget the rows from position `length`."""
        self.past_key_values = [
            cache if cache is None or cache[0].shape[2] <= length else crop(cache, length)
            for cache in self.past_key_values
        ]

    @overload
    def forward_draft_or_large_model(
        self, in_tokens_small: Tensor, in_features_large: None = None, position_ids: Tensor | None = None
    ) -> Tensor: ...

    @overload
    def forward_draft_or_large_model(
        self, in_tokens_small: None = None, *, in_features_large: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @torch.no_grad()
    def forward_draft_or_large_model(
        self,
        in_tokens_small: Tensor | None = None,
        in_features_large: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run one of the two parts and append to its caches.

        `in_tokens_small` int64 [B, T] runs the shallow layers and returns their hidden state [B, T, D], not
        normed. `in_features_large` [B, T, D] runs the deep layers and returns (hidden, normed hidden).
        Positions follow the part's cached rows unless `position_ids` [B, T] is given. ValueError unless
        exactly one input is given.
        """
        if in_tokens_small is not None and in_features_large is None:
            hidden, first, last = self.model.embed_tokens(in_tokens_small), 0, self.exit_layer
        elif in_tokens_small is None and in_features_large is not None:
            hidden, first, last = in_features_large, self.exit_layer, self.config.num_layers
        else:
            raise ValueError("give either in_tokens_small or in_features_large")

        rows, cache = hidden.shape[1], self.past_key_values[first]
        past = 0 if cache is None else cache[0].shape[2]
        if position_ids is None:
            position_ids = _positions(past, rows, hidden.device)
        mask = causal_mask(rows, past, hidden.dtype, hidden.device)
        for index in range(first, last):
            cache = self.past_key_values[index]
            hidden, self.past_key_values[index] = self.model.layers[index](hidden, mask, position_ids, cache)
        return hidden if in_features_large is None else (hidden, self.model.norm(hidden))


class Adapter(nn.Module):
    """Kangaroo's drafter: one attention-only layer and a final norm over exit-layer hidden states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList([AttentionLayer(config)])

    @torch.no_grad()
    def forward_early_stop(
        self, hidden: Tensor, position_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, KVCache]:
        """hidden [B, T, D] at the exit layer -> normed output [B, T, D] and the grown cache."""
        past = 0 if cache is None else cache[0].shape[2]
        if position_ids is None:
            position_ids = _positions(past, hidden.shape[1], hidden.device)
        # The original keeps this mask in float32 whatever the weights are, which widens 16-bit scores.
        mask = causal_mask(hidden.shape[1], past, torch.float32, hidden.device)
        hidden, cache = self.layers[0](hidden, mask, position_ids, cache)
        return self.norm(hidden), cache


class KangarooModel(nn.Module):
    """The base model with its adapter; the base's LM head serves both."""

    def __init__(self, base: EarlyExitLlamaForCausalLM, adapter: Adapter):
        super().__init__()
        self.base = base
        self.adapter = adapter

    @property
    def device(self) -> torch.device:
        return self.base.lm_head.weight.device

    def logits(self, normed: Tensor) -> Tensor:
        """float32 logits [B, T, V] of normed hidden states [B, T, D], of the verifier or of the adapter."""
        return self.base.lm_head(normed).float()
