"""The jitted decode loop: draft, verify in one pass, commit, until every row is done.

Losslessness is by construction. Plain decoding is this same compiled program with nothing drafted: a committed row
always went through the shallow layers one row at a time and through the deep layers and the head W rows at a time, and
no row's arithmetic depends on the rows beside it. So speculative and plain logits are equal bit for bit, in any dtype.
Letters: B batch, W rows of a round, D hidden, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dvi_jax.decode.accept import Verdict, accept
from dvi_jax.decode.sampling import draw_draft, draw_verified
from dvi_jax.decode.state import NO_TOKEN, DecodeState, Knobs, Signals
from dvi_jax.model.attention import Caches
from dvi_jax.model.drafters import Committed
from dvi_jax.model.speculative_llama import Definition, Params, SpeculativeLlama, join


class Draft(NamedTuple):
    """A round's proposals. Row 0 is the pending token, rows 1.. the drafts."""

    step: jax.Array  # int32 scalar, rows so far
    tokens: jax.Array  # int32 [B, W]
    hidden: jax.Array  # [B, W, D], exit hidden state of each row
    feature: jax.Array  # [B, 1, D], draft hidden state of the newest draft
    count: jax.Array  # int32 [B], drafts made
    active: jax.Array  # bool [B], the row drafts on
    reach: jax.Array  # float32 [B], the drafter's probability of all its drafts
    log_q: jax.Array | None  # float32 [B, W, V], what row i + 1 was drawn from; for rejection sampling alone
    caches: Caches  # of the draft pass: the shallow caches, or the separate trunk's
    drafter: Any


# The state is donated: the caches are updated in place, round by round, instead of being copied.
@partial(jax.jit, static_argnames=("definition",), donate_argnames=("state",))
def decode(definition: Definition, params: Params, state: DecodeState, knobs: Knobs) -> DecodeState:
    """Run rounds until every row has met an eos id or its limit, or `until`. One program, no host in the loop."""
    model = join(definition, params)

    def goes_on(s: DecodeState) -> jax.Array:
        return ~jnp.all(s.done) & (s.rounds < knobs.until)

    return jax.lax.while_loop(goes_on, lambda s: speculative_round(model, s, knobs), state)


@partial(jax.jit, static_argnames=("definition",), donate_argnames=("state",))
def decode_round(definition: Definition, params: Params, state: DecodeState, knobs: Knobs) -> DecodeState:
    """One round alone, for callers that look at every round."""
    return speculative_round(join(definition, params), state, knobs)


def speculative_round(model: SpeculativeLlama, state: DecodeState, knobs: Knobs) -> DecodeState:
    """Draft up to `draft_steps` tokens, verify all rows in one deep pass, commit the accepted ones plus one."""
    draft = propose(model, state, knobs)
    verified, feature, state = verify(model, state, draft)
    # Row i's verified token stands against the draft in row i + 1.
    following = jnp.pad(draft.tokens[:, 1:], ((0, 0), (0, 1)), constant_values=NO_TOKEN)
    verdict = accept(verified, following, draft.count, knobs.eos_ids)
    return commit(state, draft, verified, following, feature, verdict)


def propose(model: SpeculativeLlama, state: DecodeState, knobs: Knobs) -> Draft:
    """Feed the pending token and then each draft through the shallow layers, one row at a time.

    Stops after `draft_steps` drafts, after a draft less probable than `threshold` (which is kept, and verified), when
    the round could commit more than the row's limit, or when one more draft is not worth `draft_cost`.
    """
    width = state.previous.hidden.shape[1]
    pending = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)
    most = jnp.where(state.done, 0, jnp.minimum(knobs.draft_steps, state.limit - state.length - 1))
    batch, hidden_size = pending.shape[0], state.previous.hidden.shape[2]
    empty = Draft(
        step=jnp.int32(0),
        tokens=jnp.full((batch, width), NO_TOKEN, jnp.int32).at[:, :1].set(pending),
        hidden=jnp.zeros((batch, width, hidden_size), model.llama.dtype),
        feature=jnp.zeros((batch, 1, hidden_size), model.llama.dtype),
        count=jnp.zeros((batch,), jnp.int32),
        active=most > 0,
        reach=jnp.ones((batch,), jnp.float32),
        log_q=_no_log_q(model, state, (batch, width)),
        caches=state.trunk if model.separate_trunk else state.shallow,
        drafter=state.drafter,
    )

    worth = least_reach(state, knobs.draft_cost)

    def row(draft: Draft) -> Draft:
        # One loop body serves the pending token and every draft, so the shallow layers are compiled once and plain and
        # speculative rows run the very same code.
        draft = jax.lax.switch(
            jnp.minimum(draft.step, 2),
            [
                lambda d: d,
                lambda d: _draft_token(model, state, knobs, (most, worth), d, first=True),
                lambda d: _draft_token(model, state, knobs, (most, worth), d, first=False),
            ],
            draft,
        )
        token = jax.lax.dynamic_slice_in_dim(draft.tokens, draft.step, 1, axis=1)
        position = (state.length - 1 + draft.step)[:, None]
        hidden, caches = model.llama.shallow(token, draft.caches, position, adapted=model.separate_trunk)
        rows = jax.lax.dynamic_update_slice_in_dim(draft.hidden, hidden, draft.step, axis=1)
        return draft._replace(step=draft.step + 1, hidden=rows, caches=caches)

    return jax.lax.while_loop(lambda d: (d.step == 0) | jnp.any(d.active), row, empty)


def least_reach(state: DecodeState, draft_cost: jax.Array) -> jax.Array:
    """float32 [B]: drafting on pays while the drafts so far are all right with at least this probability.

    One more draft adds reach * accept_rate tokens to a round and costs `draft_cost` rounds; it pays where that is more
    than the row has been getting: tokens / (rounds + draft_cost * drafts). Estimates start from one round of one
    accepted and one rejected draft.
    """
    live = state.accept_lengths > 0
    rounds, tokens, drafts = (jnp.sum(x, axis=1) + 1.0 for x in (live, state.accept_lengths, state.drafted))
    accepted = tokens - rounds + 1
    accept_rate = accepted / (accepted + jnp.minimum(rounds, drafts - accepted + 1))
    return draft_cost * (tokens + 1) / (rounds + draft_cost * (drafts + 1)) / accept_rate


def _no_log_q(model: SpeculativeLlama, state: DecodeState, shape: tuple[int, int]) -> jax.Array | None:
    if state.sampling is None or state.sampling.coupled:
        return None
    return jnp.zeros((*shape, model.llama.config.vocab_size), jnp.float32)


def _draft_token(
    model: SpeculativeLlama,
    state: DecodeState,
    knobs: Knobs,
    bounds: tuple[jax.Array, jax.Array],
    draft: Draft,
    *,
    first: bool,
) -> Draft:
    """Put the draft that follows row `step - 1` into row `step`. `bounds` [B]: most drafts, least reach."""
    hidden = jax.lax.dynamic_slice_in_dim(draft.hidden, draft.step - 1, 1, axis=1)
    position = state.length - 1 + draft.step - 1
    with jax.named_scope("drafter"):
        if first:
            feature, drafter = model.drafter.first(draft.drafter, state.previous, hidden, position)
        else:
            feature, drafter = model.drafter.next(draft.drafter, draft.feature, hidden, position)
        logits = model.drafter.logits(feature, model.draft_head())[:, 0]
    token, confidence, log_q = _choose_draft(model, state, logits, draft)
    most, least = bounds
    count, reach = draft.count + draft.active, draft.reach * confidence
    return draft._replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(draft.tokens, token[:, None], draft.step, axis=1),
        feature=feature.astype(draft.feature.dtype),
        count=count,
        active=draft.active & (confidence >= knobs.threshold) & (count < most) & (reach >= least),
        reach=reach,
        log_q=log_q,
        drafter=drafter,
    )


def _choose_draft(
    model: SpeculativeLlama, state: DecodeState, logits: jax.Array, draft: Draft
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """From draft logits [B, Vd]: the token int32 [B], its probability, and `log_q` with its row filled."""
    if state.sampling is None:
        token = model.draft_token(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        # The top token's softmax probability; exp(max - logsumexp) would lose an ulp of the largest logit.
        return token, 1.0 / jnp.sum(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), axis=-1), None
    logits = model.over_vocabulary(logits)
    position = state.length + draft.step - 1
    token, log_q = draw_draft(logits, state.sampling, position, draft.tokens)
    confidence = jnp.exp(jnp.take_along_axis(log_q, token[:, None], axis=-1)[:, 0])
    if draft.log_q is None:
        return token, confidence, None
    return token, confidence, jax.lax.dynamic_update_slice_in_dim(draft.log_q, log_q[:, None], draft.step - 1, axis=1)


def verify(model: SpeculativeLlama, state: DecodeState, draft: Draft) -> tuple[jax.Array, jax.Array, DecodeState]:
    """All W rows through the verifier: tokens int32 [B, W], normed final hidden [B, W, D], state with caches filled.

    Rows beyond the drafts are computed and ignored: the width is what keeps plain and speculative rows equal.
    """
    llama, width = model.llama, draft.tokens.shape[1]
    positions = (state.length - 1)[:, None] + jnp.arange(width)
    if model.separate_trunk:
        tokens = jnp.maximum(draft.tokens, 0)  # rows without a draft hold NO_TOKEN
        hidden, shallow = llama.shallow(tokens, state.shallow, positions)
        state = state.replace(shallow=shallow, trunk=draft.caches)
    else:
        hidden = draft.hidden
        state = state.replace(shallow=draft.caches)
    feature, deep = llama.deep(hidden, state.deep, positions)
    logits = llama.logits(feature)
    if state.sampling is None:
        verified = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        real = jnp.arange(width) <= draft.count[:, None]
        rows = jnp.where(real, draft.tokens, NO_TOKEN)
        verified = draw_verified(logits, state.sampling, state.length, rows, draft.log_q)
    return verified, feature, state.replace(deep=deep, drafter=draft.drafter)


def commit(
    state: DecodeState,
    draft: Draft,
    verified: jax.Array,
    following: jax.Array,
    feature: jax.Array,
    verdict: Verdict,
) -> DecodeState:
    """Append the accepted tokens and move the lengths; finished rows stay as they are."""
    accepted = jnp.where(state.done, 0, verdict.accept_length)
    signals = state.signals
    if signals is not None:
        signals = _record(signals, state.length, ~state.done, following, feature, verdict)
    length = state.length + accepted
    return state.replace(
        tokens=_write(state.tokens, verified, state.length),
        length=length,
        done=state.done | verdict.stopped | (length >= state.limit),
        previous=Committed(draft.hidden, feature, state.length - 1, accepted),
        rounds=state.rounds + 1,
        accept_lengths=jax.lax.dynamic_update_slice_in_dim(
            state.accept_lengths, accepted[:, None], state.rounds, axis=1
        ),
        drafted=jax.lax.dynamic_update_slice_in_dim(state.drafted, draft.count[:, None], state.rounds, axis=1),
        signals=signals,
        sampling=None if state.sampling is None else state.sampling.with_committed(verified, accepted),
    )


def _record(
    signals: Signals,
    length: jax.Array,
    live: jax.Array,
    proposals: jax.Array,
    feature: jax.Array,
    verdict: Verdict,
) -> Signals:
    """Write this round's signals at the positions its rows predict; later rounds overwrite what was not committed."""
    judged = verdict.judged & live[:, None]
    reward = jnp.where(judged, verdict.correct, -1).astype(jnp.int8)
    return Signals(
        proposal=_write(signals.proposal, jnp.where(judged, proposals, NO_TOKEN), length),
        reward=_write(signals.reward, reward, length),
        step=_write(signals.step, jnp.broadcast_to(jnp.arange(reward.shape[1], dtype=jnp.int8), reward.shape), length),
        verifier_hidden=_write(signals.verifier_hidden, feature, length),
    )


def _write(buffer: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """buffer [B, S, ...] with rows [B, W, ...] written at start[b]."""

    def one(b: jax.Array, r: jax.Array, s: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(b, r, s, axis=0)

    return jax.vmap(one)(buffer, rows, start)
