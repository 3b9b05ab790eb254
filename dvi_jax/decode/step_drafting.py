"""Proposals of a step drafter: each draft goes through the shallow layers before the next one is made.

Letters: B batch, W rows of a round, D hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dvi_jax.decode import drafting
from dvi_jax.decode.drafting import Draft, Rows
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.model.attention import Caches
from dvi_jax.model.drafters import StepDrafter
from dvi_jax.model.speculative_llama import SpeculativeLlama


class _Steps(NamedTuple):
    """The drafts so far, and what only drafting step by step needs."""

    made: jax.Array  # int32 scalar, drafts so far: rows 0 .. made are through the shallow layers
    draft: Draft
    rows: Rows
    draft_hidden: jax.Array  # [B, 1, D], of the newest draft
    caches: Caches  # of the draft pass: the shallow caches, or the separate trunk's
    drafter: Any  # the drafter's state


def propose_by_steps(
    model: SpeculativeLlama, drafter: StepDrafter, state: DecodeState, knobs: Knobs
) -> tuple[Draft, Rows, DecodeState]:
    """Feed the pending token and then each draft through the shallow layers, one row at a time.

    Stops where no sequence drafts on (`drafting.add`). Every draft goes through the shallow layers, the last one too:
    it is verified. The state comes back with the draft pass's caches.
    """

    def through_shallow(steps: _Steps, index: jax.Array | int) -> _Steps:
        """Row `index` of the round through the shallow layers."""
        token = jax.lax.dynamic_slice_in_dim(steps.draft.tokens, index, 1, axis=1)
        position = (state.length - 1 + index)[:, None]
        hidden, tapped, caches = model.llama.shallow(token, steps.caches, position, adapted=model.separate_trunk)

        def placed(rows: jax.Array, row: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(rows, row, index, axis=1)

        return steps._replace(rows=jax.tree.map(placed, steps.rows, Rows(hidden, tapped)), caches=caches)

    def draft_one(steps: _Steps) -> _Steps:
        """Draft the token after row `made`, and put it through the shallow layers."""
        index = steps.made
        hidden = jax.lax.dynamic_slice_in_dim(steps.rows.hidden, index, 1, axis=1)
        position = state.length - 1 + index
        with jax.named_scope("drafter"):
            draft_hidden, drafter_state = jax.lax.cond(
                index == 0,
                lambda: drafter.first(steps.drafter, state.committed, hidden, position),
                lambda: drafter.next(steps.drafter, steps.draft_hidden, hidden, position),
            )
            logits = drafter.logits(draft_hidden, model.draft_head())[:, 0]
        steps = steps._replace(
            made=index + 1,
            draft=drafting.add(model, state, knobs, bounds, steps.draft, index, logits),
            draft_hidden=draft_hidden.astype(steps.draft_hidden.dtype),
            drafter=drafter_state,
        )
        return through_shallow(steps, index + 1)

    draft, bounds = drafting.begin(model, state, knobs)
    rows = jnp.zeros(state.committed.hidden.shape, model.llama.dtype)
    steps = _Steps(
        made=jnp.int32(0),
        draft=draft,
        rows=Rows(rows, (rows,) * model.llama.shallow_taps),
        draft_hidden=rows[:, :1],
        caches=state.trunk if model.separate_trunk else state.shallow,
        drafter=state.drafter,
    )
    steps = jax.lax.while_loop(lambda s: jnp.any(s.draft.active), draft_one, through_shallow(steps, 0))
    state = state.replace(drafter=steps.drafter)
    state = state.replace(trunk=steps.caches) if model.separate_trunk else state.replace(shallow=steps.caches)
    return steps.draft, steps.rows, state
