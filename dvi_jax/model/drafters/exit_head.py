"""DVI's own drafter: the LM head on the exit hidden state, through lora_S."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dvi_jax.config import LlamaConfig
from dvi_jax.model.drafters.base import Committed, Drafter
from dvi_jax.model.layers import LoRA
from dvi_jax.model.residual import rms_norm
from dvi_jax.model.variables import DrafterParam, ShallowLoRA


class ExitHead(Drafter):
    """DVI's own drafter: norm, lora_S on the normed hidden state, frozen LM head, logit scale.

    lora_S [D, D] in front of the head, not [V, D] inside it: the same change of logits costs 85 times fewer weights and
    learns several times faster (SmolLM2, 20k tokens: first-draft agreement 0.16 against 0.08).
    """

    kind = "exit_head"

    def __init__(self, config: LlamaConfig, *, key: jax.Array, norm: jax.Array, rank: int = 64, alpha: float = 64.0):
        """`norm`: the base model's final norm [D], where the drafter's starts. Rank 0 leaves the LoRA out."""
        self.eps = config.rms_norm_eps
        self.rank, self.alpha = rank, alpha
        self.norm = DrafterParam(jnp.asarray(norm, jnp.float32))
        self.scale = DrafterParam(jnp.ones((), jnp.float32))
        self.lora = nnx.Dict()
        if rank:
            shape = (config.hidden_size, config.hidden_size)
            self.lora["hidden"] = LoRA.create(ShallowLoRA, shape, rank, alpha, key)

    def first(self, state: Any, previous: Committed, hidden: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        return self._translate(hidden), state

    def next(self, state: Any, feature: jax.Array, hidden: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        return self._translate(hidden), state

    def unroll(self, hidden: jax.Array, feature: jax.Array, positions: jax.Array, steps: int) -> list[jax.Array]:
        return [self._translate(hidden)]

    def logits(self, draft_hidden: jax.Array, head: jax.Array) -> jax.Array:
        return super().logits(draft_hidden, head) * self.scale[...]

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha}

    def _translate(self, hidden: jax.Array) -> jax.Array:
        normed = rms_norm(hidden, self.norm[...], self.eps)
        return normed + self.lora["hidden"](normed) if "hidden" in self.lora else normed
