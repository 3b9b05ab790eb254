"""Drafters: what turns exit hidden states into draft logits.

The decode loop, the learner and the checkpoints know only the interface of `Drafter`; a new one is a class here, an
entry in `DRAFTERS`, and a config. Letters as in `layers.py`; W rows of a round.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvi_jax.config import LlamaConfig
from dvi_jax.errors import UserError
from dvi_jax.model import attention
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.layers import LoRA, linear, rms_norm
from dvi_jax.model.variables import DrafterParam, ShallowLoRA


class Committed(NamedTuple):
    """The rows the previous round committed (after a prefill: the last prompt row)."""

    hidden: jax.Array  # [B, W, D] exit hidden state of each row
    feature: jax.Array  # [B, W, D] verifier's normed final hidden state of each row
    start: jax.Array  # int32 [B], position of row 0
    count: jax.Array  # int32 [B], committed rows; start + count is the position of the row now drafted from


class Drafter(nnx.Module):
    """Interface. A drafter without state of its own keeps `()` and ignores the calls that maintain it."""

    kind: ClassVar[str]

    def init_state(self, batch: int, slots: int, dtype: jnp.dtype) -> Any:
        """State for `slots` positions: a pytree, carried by the decode loop."""
        return ()

    def prefill(self, state: Any, hidden: jax.Array, feature: jax.Array, positions: jax.Array) -> Any:
        """Take in the prompt: exit hidden and final hidden [B, T, D] at `positions` [B, T]."""
        return state

    def first(self, state: Any, previous: Committed, hidden: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        """First draft of a round from the exit hidden [B, 1, D] at `position` [B] -> (draft hidden [B, 1, D], state)."""
        raise NotImplementedError

    def next(self, state: Any, feature: jax.Array, hidden: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        """A later draft; `feature` is the draft hidden state the call before returned."""
        raise NotImplementedError

    def parallel(self, hidden: jax.Array, feature: jax.Array, positions: jax.Array) -> jax.Array:
        """First drafts at every position at once, for learning: exit and final hidden [B, T, D] -> [B, T, D]."""
        raise NotImplementedError

    def logits(self, draft_hidden: jax.Array, head: jax.Array) -> jax.Array:
        """Draft hidden [..., D] through the frozen LM head [V, D] -> float32 logits [..., V]."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """What a checkpoint's manifest must say to rebuild this drafter."""
        return {}


class ExitHead(Drafter):
    """DVI's own drafter: norm, frozen LM head with a LoRA (`lora_S`), and a logit scale."""

    kind = "exit_head"

    def __init__(self, config: LlamaConfig, *, key: jax.Array, norm: jax.Array, rank: int = 64, alpha: float = 64.0):
        """`norm`: the base model's final norm [D], where the drafter's starts. Rank 0 leaves the LoRA out."""
        self.eps = config.rms_norm_eps
        self.rank, self.alpha = rank, alpha
        self.norm = DrafterParam(jnp.asarray(norm, jnp.float32))
        self.scale = DrafterParam(jnp.ones((), jnp.float32))
        self.lora = nnx.Dict()
        if rank:
            shape = (config.vocab_size, config.hidden_size)
            self.lora["head"] = LoRA.create(ShallowLoRA, shape, rank, alpha, key)

    def first(self, state: Any, previous: Committed, hidden: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        return self._normed(hidden), state

    def next(self, state: Any, feature: jax.Array, hidden: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        return self._normed(hidden), state

    def parallel(self, hidden: jax.Array, feature: jax.Array, positions: jax.Array) -> jax.Array:
        return self._normed(hidden)

    def logits(self, draft_hidden: jax.Array, head: jax.Array) -> jax.Array:
        with jax.named_scope("draft_head"):
            logits = linear(draft_hidden, head, jnp.float32)
            if "head" in self.lora:
                logits = logits + self.lora["head"](draft_hidden).astype(jnp.float32)
            return logits * self.scale[...]

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha}

    def _normed(self, hidden: jax.Array) -> jax.Array:
        return rms_norm(hidden, self.norm[...].astype(hidden.dtype), self.eps)


class Kangaroo(Drafter):
    """Kangaroo's adapter: one attention-only layer (no MLP) with its own KV cache, a final norm, the base LM head.

    Rotary base 10000 always and head size D/N, as upstream has them (arXiv 2404.18911).
    """

    kind = "kangaroo"

    def __init__(
        self,
        config: LlamaConfig,
        *,
        key: jax.Array,
        norm: jax.Array,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        rms_norm_eps: float | None = None,
    ):
        """Heads and epsilon default to the base model's; `norm` starts the final norm."""
        self.num_heads = num_heads or config.num_heads
        self.num_kv_heads = num_kv_heads or num_heads or config.num_heads
        self.eps = rms_norm_eps or config.rms_norm_eps
        width = config.hidden_size
        self.head_dim = width // self.num_heads
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        qkv_key, out_key = jax.random.split(key)
        self.attn_norm = DrafterParam(jnp.ones(width, jnp.float32))
        self.qkv = DrafterParam(jax.random.normal(qkv_key, (query + 2 * kv, width), jnp.float32) * 0.02)
        self.out = DrafterParam(jax.random.normal(out_key, (width, query), jnp.float32) * 0.02)
        self.norm = DrafterParam(jnp.asarray(norm, jnp.float32))

    def init_state(self, batch: int, slots: int, dtype: jnp.dtype) -> LayerCache:
        shape = (batch, self.num_kv_heads, slots, self.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def prefill(self, state: LayerCache, hidden: jax.Array, feature: jax.Array, positions: jax.Array) -> LayerCache:
        _, key, value = self._heads(hidden, positions)
        return attention.write_rows(state, key, value, positions[:, 0])

    def first(
        self, state: LayerCache, previous: Committed, hidden: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        # The last committed row drafted nothing if it ended its round, so the cache may lack it; run again, it gives
        # the same keys.
        last = jnp.take_along_axis(previous.hidden, (previous.count - 1)[:, None, None], axis=1)
        rows = jnp.concatenate([last, hidden], axis=1)
        draft, state = self._run(state, rows, (position - 1)[:, None] + jnp.arange(2))
        return draft[:, 1:], state

    def next(
        self, state: LayerCache, feature: jax.Array, hidden: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        return self._run(state, hidden, position[:, None])

    def parallel(self, hidden: jax.Array, feature: jax.Array, positions: jax.Array) -> jax.Array:
        mask = positions[:, None, :] <= positions[:, :, None]
        return self._attend(hidden, *self._heads(hidden, positions), mask)

    def logits(self, draft_hidden: jax.Array, head: jax.Array) -> jax.Array:
        with jax.named_scope("draft_head"):
            return linear(draft_hidden, head, jnp.float32)

    def config(self) -> dict[str, Any]:
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "rms_norm_eps": self.eps}

    def _run(self, cache: LayerCache, hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, LayerCache]:
        query, key, value = self._heads(hidden, positions)
        cache = attention.write_rows(cache, key, value, positions[:, 0])
        mask = attention.cached_mask(positions, cache.key.shape[2])
        return self._attend(hidden, query, *cache, mask), cache

    def _heads(self, hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        normed = rms_norm(hidden, self.attn_norm[...].astype(hidden.dtype), self.eps)
        rope = attention.rope_tables(attention.rope_frequencies(self.head_dim, 10000.0, None), positions)
        qkv = linear(normed, self.qkv[...].astype(hidden.dtype))
        return attention.split_heads(qkv, (self.num_heads, self.num_kv_heads, self.head_dim), rope)

    def _attend(
        self, hidden: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
    ) -> jax.Array:
        mixed = linear(attention.attend(query, key, value, mask), self.out[...].astype(hidden.dtype))
        return rms_norm(hidden + mixed, self.norm[...].astype(hidden.dtype), self.eps)


DRAFTERS: dict[str, type[Drafter]] = {drafter.kind: drafter for drafter in (ExitHead, Kangaroo)}


def build_drafter(
    kind: str, config: LlamaConfig, options: dict[str, Any], *, key: jax.Array, norm: jax.Array
) -> Drafter:
    """A new drafter of `kind` with the manifest's `options`; unknown kinds and options raise `UserError`."""
    if kind not in DRAFTERS:
        raise UserError(f"unknown drafter {kind!r}; known: {', '.join(sorted(DRAFTERS))}")
    try:
        return DRAFTERS[kind](config, key=key, norm=norm, **options)
    except TypeError as error:
        raise UserError(f"drafter {kind}: {error}") from error
