"""Proposals of a block drafter: one pass for all drafts of a round.

Letters: B batch, Vd tokens that may be drafted.
"""

from __future__ import annotations

import jax

from dvi_jax.decode import drafting
from dvi_jax.decode.drafting import Draft
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.decode.step_drafting import first_row
from dvi_jax.model.drafters import BlockDrafter
from dvi_jax.model.speculative_llama import SpeculativeLlama


def propose_block(
    model: SpeculativeLlama, drafter: BlockDrafter, state: DecodeState, knobs: Knobs, drafts: int
) -> tuple[Draft, DecodeState]:
    """The first `drafts` drafts of a block after the pending token; those that are not wanted are masked."""
    draft, bounds = drafting.begin(model, state, knobs, drafts + 1)
    anchor, shallow = first_row(model, state)
    with jax.named_scope("drafter"):
        draft_hidden, drafter_state = drafter.propose(state.drafter, state.committed, anchor, drafts)
        logits = drafter.logits(draft_hidden, model.draft_head())  # [B, drafts, Vd]
    for index in range(drafts):
        corrected = drafter.corrected(
            logits[:, index], draft_hidden[:, index], draft.tokens[:, index], model.draft_ids()
        )
        draft = drafting.add(model, state, knobs, bounds, draft, index, corrected)
    return draft, state.replace(drafter=drafter_state, shallow=shallow)
