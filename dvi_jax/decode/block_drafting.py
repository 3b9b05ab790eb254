"""Proposals of a block drafter: one pass for all drafts of a round.

Letters: B batch, W rows of a round, D hidden, Vd tokens that may be drafted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dvi_jax.decode import drafting
from dvi_jax.decode.drafting import Draft, Rows
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.model.drafters import BlockDrafter
from dvi_jax.model.speculative_llama import SpeculativeLlama


def propose_block(
    model: SpeculativeLlama, drafter: BlockDrafter, state: DecodeState, knobs: Knobs
) -> tuple[Draft, Rows, DecodeState]:
    """Draft a block after the pending token, unless no sequence drafts; the rows are the tokens' embeddings."""
    draft, bounds = drafting.begin(model, state, knobs)
    width = draft.tokens.shape[1]

    def fill(draft: Draft) -> Draft:
        with jax.named_scope("drafter"):
            anchor, _, _ = model.llama.shallow(draft.tokens[:, :1], (), (state.length - 1)[:, None])
            draft_hidden = drafter.propose(drafter_state, state.committed, anchor)[:, : width - 1]
            logits = drafter.logits(draft_hidden, model.draft_head())  # [B, W - 1, Vd]
        for index in range(width - 1):
            corrected = drafter.corrected(logits[:, index], draft.tokens[:, index], model.draft_ids())
            draft = drafting.add(model, state, knobs, bounds, draft, index, corrected)
        return draft

    drafter_state = drafter.absorb(state.drafter, state.committed)
    if width > 1:
        draft = jax.lax.cond(jnp.any(draft.active), fill, lambda draft: draft, draft)
    positions = (state.length - 1)[:, None] + jnp.arange(width)
    hidden, tapped, _ = model.llama.shallow(jnp.maximum(draft.tokens, 0), (), positions)
    return draft, Rows(hidden, tapped), state.replace(drafter=drafter_state)
