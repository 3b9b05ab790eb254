"""The interface of a drafter: all that the decode loop, the learner and the checkpoints know of one.

Letters as in `layers.py`; W rows of a round.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvi_jax.model.products import linear


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
        """State for `slots` positions: a pytree of arrays [B, ...], carried by the decode loop.

        One for fewer slots must be a corner of one for more: a prefix is taken in once and laid into many batches.
        """
        return ()

    def prefill(self, state: Any, hidden: jax.Array, before: jax.Array, positions: jax.Array) -> Any:
        """Take in the prompt, or its next chunk: exit hidden [B, T, D] at consecutive `positions` [B, T].

        before: [B, T, D], the verifier's final hidden state at the position before each, zeros before the first.
        """
        return state

    def first(self, state: Any, previous: Committed, hidden: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        """First draft of a round: exit hidden [B, 1, D] at `position` [B] -> (draft hidden [B, 1, D], state)."""
        raise NotImplementedError

    def next(self, state: Any, feature: jax.Array, hidden: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        """A later draft; `feature` is the draft hidden state the call before returned."""
        raise NotImplementedError

    def unroll(self, hidden: jax.Array, feature: jax.Array, positions: jax.Array, steps: int) -> list[jax.Array]:
        """For learning: the 1st, 2nd, .. draft of a round at every position, had the drafts before it been right.

        Exit and final hidden [B, T, D] at `positions` [B, T] -> `steps` draft hidden states [B, T, D], or one from a
        drafter whose later drafts work like its first.
        """
        raise NotImplementedError

    def logits(self, draft_hidden: jax.Array, head: jax.Array) -> jax.Array:
        """Draft hidden [..., D] through the frozen LM head [V, D] -> float32 logits [..., V]."""
        with jax.named_scope("draft_head"):
            return linear(draft_hidden, head, jnp.float32)

    def config(self) -> dict[str, Any]:
        """What a checkpoint's manifest must say to rebuild this drafter."""
        return {}
