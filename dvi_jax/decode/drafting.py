"""Drafting, as far as all drafters share it: a round's drafts, how one is chosen, and when to stop.

Letters: B batch, W rows of a round, V vocabulary, Vd tokens that may be drafted.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from dvi_jax.decode import vocabulary
from dvi_jax.decode.sampling import draw_draft
from dvi_jax.decode.state import NO_TOKEN, DecodeState, Knobs
from dvi_jax.model.speculative_llama import SpeculativeLlama


class Draft(struct.PyTreeNode):
    """A round's proposals. Row 0 is the pending token, row i + 1 the draft made i-th (from 0)."""

    tokens: jax.Array  # int32 [B, W], NO_TOKEN where nothing is drafted
    count: jax.Array  # int32 [B], drafts made
    active: jax.Array  # bool [B], the sequence drafts on
    reach: jax.Array  # float32 [B], the drafter's probability of all its drafts
    log_q: jax.Array | None  # float32 [B, W, V], what row i + 1 was drawn from; for rejection sampling alone

    def widened(self, width: int) -> Draft:
        """The same with `width` rows, those behind without a draft."""
        more = width - self.tokens.shape[1]
        tokens = jnp.pad(self.tokens, ((0, 0), (0, more)), constant_values=NO_TOKEN)
        log_q = None if self.log_q is None else jnp.pad(self.log_q, ((0, 0), (0, more), (0, 0)))
        return self.replace(tokens=tokens, log_q=log_q)


class Bounds(NamedTuple):
    """When a sequence stops drafting."""

    most: jax.Array  # int32 [B], drafts of this round
    least_reach: jax.Array  # float32 [B], of the drafts so far: below it one more does not pay


def begin(model: SpeculativeLlama, state: DecodeState, knobs: Knobs, rows: int) -> tuple[Draft, Bounds]:
    """A round of so many rows with nothing drafted yet: the pending token in row 0."""
    (batch,) = state.length.shape
    bounds = bounds_of(state, knobs, rows)
    rejection = state.sampling is not None and not state.sampling.coupled
    draft = Draft(
        tokens=jnp.full((batch, rows), NO_TOKEN, jnp.int32).at[:, :1].set(pending_token(state)),
        count=jnp.zeros((batch,), jnp.int32),
        active=bounds.most > 0,
        reach=jnp.ones((batch,), jnp.float32),
        log_q=jnp.zeros((batch, rows, model.llama.config.vocab_size), jnp.float32) if rejection else None,
    )
    return draft, bounds


def pending_token(state: DecodeState) -> jax.Array:
    """int32 [B, 1]: committed last, not yet through the model."""
    return jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)


def bounds_of(state: DecodeState, knobs: Knobs, rows: int) -> Bounds:
    """When a round of paths of at most so many rows stops drafting."""
    # A round must not commit more than the sequence may still get; the verifier's own token is one of those.
    allowed = jnp.minimum(knobs.draft_steps, rows - 1)
    most = jnp.where(state.done, 0, jnp.minimum(allowed, state.limit - state.length - 1))
    return Bounds(most, least_reach(state, knobs.draft_cost))


def add(
    model: SpeculativeLlama,
    state: DecodeState,
    knobs: Knobs,
    bounds: Bounds,
    draft: Draft,
    index: jax.Array | int,
    logits: jax.Array,
) -> Draft:
    """Choose draft number `index` (from 0) from draft logits [B, Vd], and decide which sequences draft on.

    Kangaroo's rule: a draft less probable than the threshold is the last one; it is kept, and verified.
    """
    token, confidence, log_q = _choose(model, state, draft, index, logits)
    count, reach = draft.count + draft.active, draft.reach * confidence
    goes_on = (confidence >= knobs.threshold) & (count < bounds.most) & (reach >= bounds.least_reach)
    return Draft(
        tokens=jax.lax.dynamic_update_slice_in_dim(draft.tokens, token[:, None], index + 1, axis=1),
        count=count,
        active=draft.active & goes_on,
        reach=reach,
        log_q=log_q,
    )


def least_reach(state: DecodeState, draft_cost: jax.Array) -> jax.Array:
    """float32 [B]: drafting on pays while the drafts so far are all right with at least this probability.

    One more draft adds reach * accept_rate tokens to a round and costs `draft_cost` rounds; it pays where that is more
    than the sequence has been getting: tokens / (rounds + draft_cost * drafts). Estimates start from one round of one
    accepted and one rejected draft.
    """
    live = state.accept_lengths > 0
    rounds, tokens, drafts = (jnp.sum(x, axis=1) + 1.0 for x in (live, state.accept_lengths, state.drafted))
    accepted = tokens - rounds + 1
    accept_rate = accepted / (accepted + jnp.minimum(rounds, drafts - accepted + 1))
    return draft_cost * (tokens + 1) / (rounds + draft_cost * (drafts + 1)) / accept_rate


def _choose(
    model: SpeculativeLlama, state: DecodeState, draft: Draft, index: jax.Array | int, logits: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """From draft logits [B, Vd]: the token int32 [B], its probability, and `log_q` with its row filled."""
    if state.sampling is None:
        token, confidence = vocabulary.best_and_share(model.calibrated(logits, index), model.draft_shards)
        return model.draft_token(token), confidence, None
    token, log_q = draw_draft(model.over_vocabulary(logits), state.sampling, state.length + index, draft.tokens)
    confidence = jnp.exp(jnp.take_along_axis(log_q, token[:, None], axis=-1)[:, 0])
    if draft.log_q is None:
        return token, confidence, None
    return token, confidence, jax.lax.dynamic_update_slice_in_dim(draft.log_q, log_q[:, None], index, axis=1)
