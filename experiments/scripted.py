"""A drafter that proposes a given sequence, right or wrong: for tests and measurements of chosen accept lengths."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dvi_jax.config import LlamaConfig
from dvi_jax.model.drafters import Committed, StepDrafter
from dvi_jax.model.quantised import Matrix

_BASE = 128  # bfloat16 holds integers up to 256 exactly


class Scripted(StepDrafter):
    """Proposes `state[b, p]` for position p. Set the state (int32 [B, S]) after the prefill, with `with_script`."""

    kind = "scripted"

    def __init__(self, config: LlamaConfig):
        self.vocab_size = config.vocab_size

    def init_state(self, batch: int, slots: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch, slots), jnp.int32)

    def first(self, state: Any, committed: Committed, hidden: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        return self._propose(state, hidden, position[:, None]), state

    def next(
        self, state: Any, draft_hidden: jax.Array, hidden: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Any]:
        return self._propose(state, hidden, positions), state

    def logits(self, draft_hidden: jax.Array, head: Matrix) -> jax.Array:
        digits = draft_hidden[..., :3].astype(jnp.int32)
        token = digits[..., 0] + _BASE * digits[..., 1] + _BASE**2 * digits[..., 2]
        return 20.0 * jax.nn.one_hot(token, self.vocab_size)

    def _propose(self, script: jax.Array, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """The token's digits in the first entries of an otherwise empty draft hidden state."""
        token = jnp.take_along_axis(script, positions + 1, axis=1)
        digits = jnp.stack([token % _BASE, token // _BASE % _BASE, token // _BASE**2], axis=-1)
        return jnp.zeros_like(hidden).at[..., :3].set(digits.astype(hidden.dtype))
