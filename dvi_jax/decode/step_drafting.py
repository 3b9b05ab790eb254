"""Proposals of a step drafter: each draft goes through the shallow layers before the next one is made.

What is computed here decides what is proposed and nothing else: the verifying pass computes every row again. So the
draft pass may be compiled in any way. Letters: B batch, D hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dvi_jax.decode import drafting
from dvi_jax.decode.drafting import Draft
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.model.attention import Caches
from dvi_jax.model.drafters import StepDrafter
from dvi_jax.model.speculative_llama import SpeculativeLlama


class _Steps(NamedTuple):
    """A round on its way."""

    number: jax.Array | int  # the next draft's number, from 0
    draft: Draft  # the drafts so far
    draft_hidden: jax.Array  # [B, 1, D], of the newest
    drafter: Any  # the drafter's state
    caches: Caches  # of the draft pass: the shallow caches, or the separate trunk's


def propose_by_steps(
    model: SpeculativeLlama, drafter: StepDrafter, state: DecodeState, knobs: Knobs, drafts: int, *, early_exit: bool
) -> tuple[Draft, DecodeState]:
    """Up to `drafts` drafts, the pending token first through the shallow layers, then each draft but the last.

    With `early_exit` no more are made once no sequence drafts on (`drafting.add`); else all are, and those that are not
    wanted are masked. The state comes back with the draft pass's caches.
    """

    def step(steps: _Steps, *, first: bool) -> _Steps:
        position = state.length - 1 + steps.number
        if first:
            hidden, caches = first_row(model, state)
        else:
            token = jax.lax.dynamic_slice_in_dim(steps.draft.tokens, steps.number, 1, axis=1)
            hidden, _, caches = llama.shallow(token, steps.caches, position[:, None], adapted=model.separate_trunk)
        with jax.named_scope("drafter"):
            if first:
                new, drafter_state = drafter.first(steps.drafter, state.committed, hidden, position)
            else:
                new, drafter_state = drafter.next(steps.drafter, steps.draft_hidden, hidden, position[:, None])
            logits = drafter.logits(new, model.draft_head())[:, 0]
        draft = drafting.add(model, state, knobs, bounds, steps.draft, steps.number, logits)
        return _Steps(steps.number + 1, draft, new.astype(steps.draft_hidden.dtype), drafter_state, caches)

    def later(steps: _Steps) -> _Steps:
        return step(steps, first=False)

    llama = model.llama
    draft, bounds = drafting.begin(model, state, knobs, drafts + 1)
    nothing = jnp.zeros_like(state.committed.hidden[:, :1])
    caches = state.trunk if model.separate_trunk else state.shallow
    steps = _Steps(jnp.int32(0) if early_exit else 0, draft, nothing, state.drafter, caches)
    if early_exit:
        steps = jax.lax.cond(jnp.any(draft.active), lambda s: step(s, first=True), lambda s: s, steps)
        steps = jax.lax.while_loop(lambda s: jnp.any(s.draft.active), later, steps)
    else:
        steps = step(steps, first=True)
        for _ in range(1, drafts):
            steps = later(steps)
    state = state.replace(drafter=steps.drafter)
    state = state.replace(trunk=steps.caches) if model.separate_trunk else state.replace(shallow=steps.caches)
    return steps.draft, state


def first_row(model: SpeculativeLlama, state: DecodeState) -> tuple[jax.Array, Caches]:
    """The exit hidden state [B, 1, D] of the pending token in the draft pass, and that pass's caches with it."""
    token, position = drafting.pending_token(state), (state.length - 1)[:, None]
    if not model.separate_trunk:
        hidden, _, caches = model.llama.shallow(token, state.shallow, position)
        return hidden, caches
    # The token before it may have been the last draft of its round, and has then not been through this trunk.
    before = jnp.take_along_axis(state.tokens, position - 1, axis=1)
    tokens, positions = (jnp.concatenate(pair, axis=1) for pair in ((before, token), (position - 1, position)))
    hidden, _, caches = model.llama.shallow(tokens, state.trunk, positions, adapted=True)
    return hidden[:, 1:], caches
