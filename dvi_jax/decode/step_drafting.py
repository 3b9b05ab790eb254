"""Proposals of a step drafter: each draft goes through the shallow layers before the next one is made.

Letters: B batch, W rows of a round, D hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dvi_jax.decode import drafting
from dvi_jax.decode.drafting import Draft, Rows
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.model.attention import Caches
from dvi_jax.model.drafters import StepDrafter
from dvi_jax.model.speculative_llama import SpeculativeLlama


class _Newest(NamedTuple):
    """What making a draft changes."""

    draft: Draft  # the drafts so far
    draft_hidden: jax.Array  # [B, 1, D], of the newest
    drafter: Any  # the drafter's state


class _Steps(NamedTuple):
    """A round on its way: the drafts so far, and what only drafting step by step needs."""

    row: jax.Array  # int32 scalar, the next row to go through the shallow layers
    waits: jax.Array  # bool scalar, there is such a row: its token is known
    rows: Rows
    caches: Caches  # of the draft pass: the shallow caches, or the separate trunk's
    newest: _Newest


def propose_by_steps(
    model: SpeculativeLlama, drafter: StepDrafter, state: DecodeState, knobs: Knobs
) -> tuple[Draft, Rows, DecodeState]:
    """Feed the pending token and then each draft through the shallow layers, one row at a time.

    Ends once no sequence drafts on (`drafting.add`). Every draft goes through the shallow layers, the last one too: it
    is verified. The state comes back with the draft pass's caches.
    """

    def through_shallow(steps: _Steps) -> _Steps:
        """The next row through the shallow layers."""
        token = jax.lax.dynamic_slice_in_dim(steps.newest.draft.tokens, steps.row, 1, axis=1)
        position = (state.length - 1 + steps.row)[:, None]
        hidden, tapped, caches = model.llama.shallow(token, steps.caches, position, adapted=model.separate_trunk)

        def placed(rows: jax.Array, row: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(rows, row, steps.row, axis=1)

        return steps._replace(rows=jax.tree.map(placed, steps.rows, Rows(hidden, tapped)), caches=caches)

    def draft_after(steps: _Steps, *, first: bool) -> _Newest:
        """The draft that follows the row which has just been through the shallow layers."""
        draft, draft_hidden, drafter_state = steps.newest
        hidden = jax.lax.dynamic_slice_in_dim(steps.rows.hidden, steps.row, 1, axis=1)
        position = state.length - 1 + steps.row
        with jax.named_scope("drafter"):
            if first:
                new, drafter_state = drafter.first(drafter_state, state.committed, hidden, position)
            else:
                new, drafter_state = drafter.next(drafter_state, draft_hidden, hidden, position)
            logits = drafter.logits(new, model.draft_head())[:, 0]
        draft = drafting.add(model, state, knobs, bounds, draft, steps.row, logits)
        return _Newest(draft, new.astype(draft_hidden.dtype), drafter_state)

    # One loop body serves the pending token and every draft: the shallow layers are compiled once, so that plain and
    # speculative rows run the very same code. Compiled twice, bfloat16 rows differ on a CPU.
    def advance(steps: _Steps) -> _Steps:
        steps = through_shallow(steps)
        goes_on = jnp.any(steps.newest.draft.active)
        newest = jax.lax.switch(
            jnp.where(goes_on, jnp.where(steps.row == 0, 1, 2), 0),
            [lambda s: s.newest, partial(draft_after, first=True), partial(draft_after, first=False)],
            steps,
        )
        return steps._replace(row=steps.row + 1, waits=goes_on, newest=newest)

    draft, bounds = drafting.begin(model, state, knobs)
    rows = jnp.zeros(state.committed.hidden.shape, model.llama.dtype)
    steps = _Steps(
        row=jnp.int32(0),
        waits=jnp.bool_(True),
        rows=Rows(rows, (rows,) * model.llama.shallow_taps),
        caches=state.trunk if model.separate_trunk else state.shallow,
        newest=_Newest(draft, rows[:, :1], state.drafter),
    )
    steps = jax.lax.while_loop(lambda s: s.waits, advance, steps)
    drafted, _, drafter_state = steps.newest
    state = state.replace(drafter=drafter_state)
    state = state.replace(trunk=steps.caches) if model.separate_trunk else state.replace(shallow=steps.caches)
    return drafted, steps.rows, state
