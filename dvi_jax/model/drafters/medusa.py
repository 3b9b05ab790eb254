"""Independent heads on the verifier's feature, one for each draft of a block (Medusa, arXiv 2401.10774).

Head j looks at the verifier's final hidden state of the last committed position, where the token now drafted from was
chosen, and guesses the token j + 2 positions after it: h + SiLU(W_j h), through the base model's frozen LM head.
Nothing is cached. The heads do not see each other's tokens; with a `markov_rank` each draft's logits also get a
low-rank bigram term of the token before it, which costs no pass through the model (DSpark, arXiv 2607.05147).

Letters: J heads, R Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dvi_jax.model.drafters.base import BlockDrafter, Committed, Origin
from dvi_jax.model.drafters.unrolled import later
from dvi_jax.model.features import Features
from dvi_jax.model.products import linear
from dvi_jax.model.variables import DrafterParam
from dvi_jax.settings import require


@dataclass(frozen=True)
class MedusaOptions:
    """How many heads, and whether drafts are corrected by the token before them."""

    heads: int = 4  # drafts of a block
    markov_rank: int = 0  # rank of the bigram term; 0 leaves it out

    def __post_init__(self) -> None:
        require(1 <= self.heads <= 16, "heads", self.heads, "between 1 and 16")
        require(0 <= self.markov_rank <= 4096, "markov_rank", self.markov_rank, "between 0 (none) and 4096")


class Medusa(BlockDrafter):
    """One residual block for each draft; they start as copies of the LM head."""

    kind = "medusa"
    Options = MedusaOptions

    def __init__(self, origin: Origin, options: MedusaOptions):
        self.options = options
        self.max_drafts = options.heads
        config, rank = origin.config, options.markov_rank
        self.blocks = DrafterParam(jnp.zeros((options.heads, config.hidden_size, config.hidden_size), jnp.float32))
        if rank:
            before = jax.random.normal(origin.key, (config.vocab_size, rank), jnp.float32) / jnp.sqrt(rank)
            self.markov_before = DrafterParam(before)  # [V, R]
            self.markov_after = DrafterParam(jnp.zeros((config.vocab_size, rank), jnp.float32))  # [V, R]

    def propose(self, state: Any, committed: Committed, anchor: jax.Array, drafts: int) -> tuple[jax.Array, Any]:
        return jnp.concatenate(self._heads(committed.last_final())[:drafts], axis=1), state

    def unroll(self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int) -> list[jax.Array]:
        # Draft j at row t was made j + 1 rows before, when row t - j was the anchor.
        heads = self._heads(features.final)
        return [later(x, j + 1) for j, x in enumerate(heads)]

    def corrected(
        self, logits: jax.Array, draft_hidden: jax.Array, previous: jax.Array, vocabulary: jax.Array | None
    ) -> jax.Array:
        if not self.options.markov_rank:
            return logits
        after = self.markov_after[...] if vocabulary is None else self.markov_after[...][vocabulary]
        return logits + linear(self.markov_before[...][jnp.maximum(previous, 0)], after, jnp.float32)

    def _heads(self, final: jax.Array) -> list[jax.Array]:
        """Final hidden [B, T, D] -> J draft hidden states [B, T, D]."""
        blocks = self.blocks[...].astype(final.dtype)
        return [final + jax.nn.silu(linear(final, blocks[j])) for j in range(self.options.heads)]
