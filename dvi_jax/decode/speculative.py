"""The jitted decode loop: propose, verify in one pass, accept, commit, until every sequence is done.

Losslessness is by construction. Whatever a round proposes, all its rows go through the whole verifier in one pass, and
no row's arithmetic depends on the rows beside it. So programs that draft, and one that drafts nothing, give equal bits,
in any dtype. `plan.rows_alike` says where their passes may even differ in width.
Letters: B batch, W rows of a round, D hidden, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from dvi_jax.decode import drafting, vocabulary
from dvi_jax.decode.block_drafting import propose_block
from dvi_jax.decode.branches import of_chain
from dvi_jax.decode.commit import accept, commit, record
from dvi_jax.decode.drafting import Draft
from dvi_jax.decode.plan import Plan, plan_for, rows_alike
from dvi_jax.decode.sampling import draw_verified
from dvi_jax.decode.state import NO_TOKEN, STATE_SPECS, DecodeState, Knobs, knob_specs
from dvi_jax.decode.step_drafting import propose_by_steps
from dvi_jax.decode.tree_round import tree_round
from dvi_jax.mesh import DATA, replicas
from dvi_jax.model.drafters import BlockDrafter, StepDrafter
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import Definition, Params, SpeculativeLlama, join


# The state is donated: the caches are updated in place, round by round, instead of being copied.
@partial(jax.jit, static_argnames=("definition", "plan"), donate_argnames=("state",))
def decode_rounds(
    definition: Definition, params: Params, state: DecodeState, knobs: Knobs, plan: Plan | None = None
) -> DecodeState:
    """Rounds until every sequence has met an eos id or its limit, or `until`. One program, no host in the loop.

    `plan`: how it drafts, with at most as many rows as the state has; None for all of them (`plan.plan_for`).
    """

    def decode(params: Params, state: DecodeState, knobs: Knobs) -> DecodeState:
        model = join(definition, params)

        def goes_on(s: DecodeState) -> jax.Array:
            return ~jnp.all(s.done) & (s.rounds < knobs.until)

        return counted_alike(
            definition, jax.lax.while_loop(goes_on, lambda s: speculative_round(model, s, knobs, plan), state)
        )

    return definition.sharded(decode, params, (STATE_SPECS, knob_specs(knobs)), STATE_SPECS)(params, state, knobs)


@partial(jax.jit, static_argnames=("definition", "plan"), donate_argnames=("state",))
def decode_round(
    definition: Definition, params: Params, state: DecodeState, knobs: Knobs, plan: Plan | None = None
) -> DecodeState:
    """One round alone, for callers that look at every round."""
    return sharded_round(definition, params, state, knobs, plan)


def sharded_round(
    definition: Definition, params: Params, state: DecodeState, knobs: Knobs, plan: Plan | None
) -> DecodeState:
    """`speculative_round` on the devices that the model lies on."""

    def decode(params: Params, state: DecodeState, knobs: Knobs) -> DecodeState:
        return speculative_round(join(definition, params), state, knobs, plan)

    return definition.sharded(decode, params, (STATE_SPECS, knob_specs(knobs)), STATE_SPECS)(params, state, knobs)


def counted_alike(definition: Definition, state: DecodeState) -> DecodeState:
    """The state with one number of rounds, where sequences on several devices took different ones.

    Devices along `data` end their loops each for itself; those that end earlier have done sequences alone.
    """
    if replicas(definition.mesh) == 1:
        return state
    return state.replace(rounds=jax.lax.pmax(state.rounds, DATA))


def speculative_round(
    model: SpeculativeLlama, state: DecodeState, knobs: Knobs, plan: Plan | None = None
) -> DecodeState:
    """One round: proposed tokens, all verified in one pass, the accepted ones committed."""
    if plan is not None and plan.kind == "tree":
        return tree_round(model, state, knobs, plan)
    # Propose. Row 0 is the pending token, which is committed but has not been through the model; then come the drafts.
    draft, state = propose(model, state, knobs, plan)
    # Verify. All rows at once: which token would the model itself put after each of them?
    verified, hidden, features, state = verify(model, state, draft)
    # Accept. Row i's verified token stands against the draft in row i + 1.
    following = jnp.pad(draft.tokens[:, 1:], ((0, 0), (0, 1)), constant_values=NO_TOKEN)
    verdict = accept(verified, following, draft.count, knobs.eos_ids)
    # Commit. The accepted drafts and one token of the verifier's own; its last token is pending in the next round.
    signals = state.signals
    if signals is not None:
        most = signals.most_branches
        branches = of_chain(verdict, following, hidden, features.final, most) if most else None
        signals = record(signals, state, following, features, verdict, branches)
    return commit(state, draft.count, verified, hidden, features, verdict, signals)


def propose(model: SpeculativeLlama, state: DecodeState, knobs: Knobs, plan: Plan | None) -> tuple[Draft, DecodeState]:
    """The round's drafts, and the state with the draft pass's caches."""
    drafter = model.drafter
    batch, width = state.committed.hidden.shape[:2]
    plan = plan or plan_for(width - 1, drafts_blocks=isinstance(drafter, BlockDrafter))
    if plan.kind == "plain":
        draft, _ = drafting.begin(model, state, knobs, 1)
    elif plan.kind == "block":
        assert isinstance(drafter, BlockDrafter)  # `check_plan`
        draft, state = propose_block(model, drafter, state, knobs, plan.drafts)
    else:
        assert isinstance(drafter, StepDrafter)
        early_exit = plan.kind == "early-exit"
        draft, state = propose_by_steps(model, drafter, state, knobs, plan.drafts, early_exit=early_exit)
    return (draft if rows_alike(batch * width, model.llama.config, model.llama.dtype) else draft.widened(width)), state


def verify(
    model: SpeculativeLlama, state: DecodeState, draft: Draft
) -> tuple[jax.Array, jax.Array, Features, DecodeState]:
    """All W rows through the verifier: tokens int32 [B, W], exit hidden states [B, W, D], features [B, W, ...].

    And the state with its caches filled: what the draft pass wrote into the shallow ones is overwritten. Rows beyond
    the drafts are computed and ignored.
    """
    llama, width = model.llama, draft.tokens.shape[1]
    positions = (state.length - 1)[:, None] + jnp.arange(width)
    tokens = jnp.maximum(draft.tokens, 0)  # rows without a draft hold NO_TOKEN
    rows = llama.verify(tokens, state.shallow, state.deep, positions)
    if state.sampling is None:
        verified = vocabulary.best_of_round(rows.logits, llama.shards)
    else:
        real = jnp.arange(width) <= draft.count[:, None]
        tokens = jnp.where(real, draft.tokens, NO_TOKEN)
        verified = draw_verified(llama.all_logits(rows.logits), state.sampling, state.length, tokens, draft.log_q)
    state = state.replace(shallow=rows.shallow, deep=rows.deep)
    return verified, rows.hidden, Features.of(rows.final, rows.tapped), state
