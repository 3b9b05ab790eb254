"""The fast update: one gradient step of the drafter and lora_S on windows of rollouts.

    L = w_kl KL(p_verify || p_draft) + w_pg L_pg + w_ce CE(verifier's token, only where accepted) - w_ent H(p_draft)
        + w_tv TV(p_verify, p_draft)

(DVI, section "Improve"). The base model and lora_D are not arguments of the gradient: they cannot move. Letters: N
windows, T window length, M positions used, J drafts unrolled, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from dvi_jax.config import ObjectiveConfig, OptimizerConfig
from dvi_jax.decode.branches import NO_BRANCH
from dvi_jax.learn import objectives
from dvi_jax.learn.optimizer import guarded, maps_apart, muon
from dvi_jax.learn.replay import Replay, Windows, sample
from dvi_jax.learn.schedule import kl_to_rl
from dvi_jax.learn.shared_gradient import over_devices
from dvi_jax.learn.slow_update import SlowState
from dvi_jax.mesh import WHOLE
from dvi_jax.model.drafters import BranchRows
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import Definition, Params, SpeculativeLlama, Tree, join

Trainable = dict[str, Tree]


class LearnerState(struct.PyTreeNode):
    """All that the fast update carries; with the stream position, all that a resumed run needs."""

    trainable: Trainable  # {"drafter": ..., "lora_s": ...} as in `Params`: what updates move
    optimizer: optax.OptState
    replay: Replay
    baseline: jax.Array  # float32 scalar, moving average of the reward
    step: jax.Array  # int32 scalar, updates done
    key: jax.Array
    slow: SlowState | None = None  # of a verifier with a lora_D; the fast update passes it on
    average: Trainable | None = None  # moving average of `trainable`, where `OptimizerConfig.average` asks for one

    @property
    def served(self) -> Trainable:
        """What drafts: the average where there is one."""
        return self.trainable if self.average is None else self.average


@dataclass(frozen=True)
class Batch:
    """How much an update looks at: windows of the newest rollout (0: all), windows of the replay, positions in all."""

    fresh: int
    replayed: int
    positions: int


class Positions(NamedTuple):
    """M positions picked from a batch of windows, flat."""

    draft_logits: list[jax.Array]  # J times float32 [M, V], for each draft of a round the drafter can tell apart
    verifier_logits: jax.Array  # float32 [M, V]
    proposal: jax.Array  # int32 [M]
    reward: jax.Array  # int8 [M]
    step: jax.Array  # int8 [M], which draft of its round the proposal was
    valid: jax.Array  # float32 [M]
    on_policy: jax.Array  # float32 [M], judged in the rollout of the drafter as it now is
    in_text: jax.Array | float = 1.0  # float32 [M], of the text, not a draft that was not taken


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Own rates for lora_S and for the drafter's weights, warmed up linearly, and gradients clipped by global norm.

    Adam's first steps move every weight by the whole rate, whatever its gradient: without warm-up they cost a trained
    drafter more than many updates bring back. Update n has n / `warmup` of the rate; the count is part of the state, as
    are the moments, so a drafter that is rolled back to its start warms up again. Non-finite gradients skip the update
    and are counted (`optimizer.py`).
    """

    def warmed_up(rate: float) -> optax.Schedule:
        return lambda done: rate * jnp.minimum((done + 1) / max(config.warmup, 1), 1.0)

    def adamw(rate: float) -> optax.GradientTransformation:
        return optax.adamw(warmed_up(rate), b2=config.b2, weight_decay=config.weight_decay)

    by_part = {"drafter": adamw(config.head_lr), "lora_s": adamw(config.lora_lr)}
    if config.matrices == "muon":
        by_part["maps"] = muon(warmed_up(config.head_lr), weight_decay=config.weight_decay)
    labels = maps_apart if "maps" in by_part else _labels
    return guarded(optax.multi_transform(by_part, labels), config.clip_norm)


def _labels(parts: Trainable) -> dict[str, str]:
    return {name: name for name in parts}


def init_learner(params: Params, config: OptimizerConfig, replay: Replay, key: jax.Array) -> LearnerState:
    """A learner at update 0."""
    trainable = jax.tree.map(jnp.asarray, {"drafter": params.drafter, "lora_s": params.lora_s})
    optimizer = make_optimizer(config).init(trainable)
    average = trainable if config.average else None
    return LearnerState(trainable, optimizer, replay, jnp.float32(0.0), jnp.int32(0), key, average=average)


def with_trainable(params: Params, trainable: Trainable) -> Params:
    """`params` with the learner's current drafter and lora_S."""
    return params._replace(drafter=trainable["drafter"], lora_s=trainable["lora_s"])


def fast_update(
    definition: Definition,
    params: Params,
    state: LearnerState,
    fresh: Windows,
    is_current: jax.Array | np.ndarray,
    *,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    size: Batch,
    rate: float | jax.Array = 1.0,
) -> tuple[LearnerState, dict[str, jax.Array]]:
    """One update on windows of the `fresh` rollout and of the replay, at `rate` times the optimiser's rates.

    The policy term uses the fresh windows alone, and only while the drafter is still the one that made them
    (`is_current`, bool): proposals of another drafter would bias it. Returns the new state and scalar metrics, which
    are of `trainable`. `state` is used up, all but its `trainable` and `average`: a model that decodes with those
    arrays keeps them.
    """
    rest = state.replace(trainable={}, average=None)
    return _fast_update(
        definition,
        params,
        (state.trainable, state.average),
        rest,
        fresh,
        is_current,
        rate if isinstance(rate, jax.Array) else np.float32(rate),
        objective=objective,
        optimizer=optimizer,
        size=size,
    )


@partial(jax.jit, static_argnames=("definition", "objective", "optimizer", "size"), donate_argnames="state")
def _fast_update(
    definition: Definition,
    params: Params,
    kept: tuple[Trainable, Trainable | None],
    state: LearnerState,
    fresh: Windows,
    is_current: jax.Array,
    rate: jax.Array,
    *,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    size: Batch,
) -> tuple[LearnerState, dict[str, jax.Array]]:
    trainable, average = kept
    key, sample_key, pick_key = jax.random.split(state.key, 3)
    batch, on_policy = choose_windows(state.replay, fresh, is_current, sample_key, size)
    weights = kl_to_rl(state.step, objective)

    def gradient(params: Params, trainable: Trainable, batch: Windows, *others: Any) -> tuple[Trainable, Any]:
        on_policy, pick_key, baseline, weights = others

        def loss_of(trainable: Trainable) -> tuple[jax.Array, dict[str, jax.Array]]:
            model = join(definition, with_trainable(params, trainable))
            picked = evaluate_positions(model, batch, on_policy, pick_key, objective, size.positions)
            return fast_loss(picked, baseline, weights, objective)

        grads, metrics = jax.grad(loss_of, has_aux=True)(trainable)
        return over_devices(definition, grads), metrics

    # Devices along `data` work out the same: an update is small beside the rollout that they shared.
    run = definition.sharded(gradient, params, (WHOLE,) * 6, WHOLE)
    grads, metrics = run(params, trainable, batch, on_policy, pick_key, state.baseline, weights)
    updates, opt_state = make_optimizer(optimizer).update(grads, state.optimizer, trainable)
    trainable = optax.apply_updates(trainable, jax.tree.map(lambda update: rate * update, updates))
    if average is not None:
        average = optax.incremental_update(trainable, average, 1 - optimizer.average)
    judged = fresh.reward >= 0
    mean_reward = jnp.sum(fresh.reward * judged) / jnp.maximum(jnp.sum(judged), 1)
    momentum = objective.baseline_momentum
    moved = momentum * state.baseline + (1 - momentum) * mean_reward
    baseline = jnp.where(is_current & jnp.any(judged), moved, state.baseline)
    metrics |= {
        "kl_weight": weights[0],
        "pg_weight": weights[1],
        "baseline": baseline,
        "grad_norm": optax.global_norm(grads),
        "skipped_updates": opt_state.total_notfinite,
    }
    new = LearnerState(trainable, opt_state, state.replay, baseline, state.step + 1, key, state.slow, average)
    return new, metrics


def choose_windows(
    replay: Replay, fresh: Windows, is_current: jax.Array, key: jax.Array, size: Batch
) -> tuple[Windows, jax.Array]:
    """The windows of an update, and for each whether its drafter is the present one, bool [N].

    The shallow layers and the drafter run over every position of a window, so fewer windows make a cheaper update.
    """
    total = fresh.length.shape[0]
    if 0 < size.fresh < total:
        rows = jax.random.permutation(jax.random.fold_in(key, 1), total)[: size.fresh]
        fresh = jax.tree.map(lambda x: x[rows], fresh)
    on_policy = jnp.broadcast_to(is_current, fresh.length.shape)
    if not size.replayed:
        return fresh, on_policy
    old = sample(replay, key, size.replayed)
    on_policy = jnp.concatenate([on_policy, jnp.zeros(old.length.shape, bool)])
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), fresh, old), on_policy


def fast_loss(
    picked: Positions, baseline: jax.Array, weights: tuple[jax.Array, jax.Array], config: ObjectiveConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of the terms, and each by name (no entropy or total variation where it has no weight).

    KL and total variation are means over the unrolled drafts, draft j weighted `unroll_decay`^j; the other terms take
    the draft that acted.
    """
    verifier = jax.lax.stop_gradient(picked.verifier_logits)
    top = jnp.argmax(verifier, axis=-1)
    drafts = [_draft_rows(logits, verifier, top, picked.proposal, config) for logits in picked.draft_logits]
    rows = jax.tree.map(lambda *of_drafts: jnp.stack(of_drafts), *drafts)  # [J, M] each
    decay = config.unroll_decay ** jnp.arange(len(drafts))
    over_drafts = {
        name: jnp.sum(decay[:, None] * rows.pop(name), axis=0) / jnp.sum(decay) for name in ("kl", "tv") if name in rows
    }
    step = jnp.clip(picked.step, 0, len(drafts) - 1).astype(jnp.int32)
    acted = {name: jnp.take_along_axis(values, step[None], axis=0)[0] for name, values in rows.items()}
    reward = picked.reward.astype(jnp.float32)
    terms = {
        "kl": objectives.masked_mean(over_drafts["kl"], picked.valid) * config.kl_temperature**2,
        "pg": objectives.policy_gradient(acted["proposal"], reward, baseline, picked.on_policy),
        "ce": -objectives.masked_mean(acted["top"], picked.valid * (picked.reward == 1)),
    }
    loss = weights[0] * terms["kl"] + weights[1] * terms["pg"] + config.ce_weight * terms["ce"]
    if config.tv_weight:
        terms["tv"] = objectives.masked_mean(over_drafts["tv"], picked.valid)
        loss += config.tv_weight * terms["tv"]
    if config.entropy_weight:
        terms["entropy"] = objectives.masked_mean(acted["entropy"], picked.valid)
        loss -= config.entropy_weight * terms["entropy"]
    first = jnp.argmax(picked.draft_logits[0], axis=-1)
    agreement = objectives.masked_mean((first == top).astype(jnp.float32), picked.valid * picked.in_text)
    return loss, terms | {"loss": loss, "agreement": agreement, "positions": jnp.sum(picked.valid)}


def _draft_rows(
    logits: jax.Array, verifier: jax.Array, top: jax.Array, proposal: jax.Array, config: ObjectiveConfig
) -> dict[str, jax.Array]:
    """What the terms need of one draft's logits [M, V], each [M], whether or not that draft was the one that acted.

    To choose among sums is free; to choose among the logits would copy them, and going backward scatter.
    """
    rows = {
        "kl": objectives.kl_rows(verifier / config.kl_temperature, logits / config.kl_temperature),
        "top": objectives.token_log_prob(logits, top),
        "proposal": objectives.token_log_prob(logits, proposal),
    }
    if config.tv_weight:
        rows["tv"] = objectives.tv_rows(verifier, logits)
    return rows | {"entropy": objectives.entropy_rows(logits)} if config.entropy_weight else rows


def evaluate_positions(
    model: SpeculativeLlama,
    windows: Windows,
    on_policy: jax.Array,
    key: jax.Array,
    objective: ObjectiveConfig,
    count: int,
) -> Positions:
    """Re-run the shallow layers and the drafter over whole windows, then the head at `count` random valid rows.

    Those are positions of the text and, where windows have any, drafts that were not taken: what the verifier made of
    them is a target like any other. Only these rows pay for logits; if fewer are valid, the rest is masked.
    """
    llama, tokens = model.llama, windows.tokens
    rows = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, _ = llama.shallow(tokens, None, rows, adapted=model.separate_trunk)
    # What predicts position p was computed at row p - 1.
    features = jax.tree.map(lambda x: x[:, 1:].astype(llama.dtype), windows.features)
    text = hidden[:, :-1], features, rows[:, :-1], objective.unroll_steps
    if windows.branches is None:
        drafts, aside = model.drafter.unroll(*text), None
    else:
        drafts, aside = _with_branches(model, text, windows)

    target = rows[:, 1:]
    valid = target < windows.length[:, None]
    if not objective.learn_from_prompt:
        valid &= target > windows.prompt_length[:, None]
    proposal, reward = windows.proposal[:, 1:], windows.reward[:, 1:]
    judged = valid & (reward >= 0) & on_policy[:, None]
    every = Candidates(drafts, tokens[:, :-1], features.final, valid)
    candidates = jax.tree.map(_flat, every) if aside is None else jax.tree.map(_joined, every, aside)
    # Positions of the text come first. The others have neither proposal nor reward.
    beside = len(candidates.valid) - valid.size
    priority = jax.random.uniform(key, candidates.valid.shape) + candidates.valid
    chosen = jax.lax.top_k(priority, count)[1]

    def pick(values: jax.Array, otherwise: int) -> jax.Array:
        return jnp.pad(values.ravel(), (0, beside), constant_values=otherwise)[chosen]

    previous = candidates.previous[chosen]

    def draft_logits(draft: jax.Array) -> jax.Array:
        draft_hidden = draft[chosen]
        logits = model.drafter.logits(draft_hidden, llama.head_weight())
        return llama.all_logits(model.drafter.corrected(logits, draft_hidden, previous, llama.own_ids()))

    return Positions(
        draft_logits=[draft_logits(draft) for draft in candidates.drafts],
        verifier_logits=llama.all_logits(llama.logits(candidates.final[chosen])),
        proposal=pick(proposal, -1),
        reward=pick(jnp.where(valid, reward, -1), -1),
        step=pick(windows.step[:, 1:], 0),
        valid=candidates.valid[chosen].astype(jnp.float32),
        on_policy=pick(judged, 0).astype(jnp.float32),
        in_text=(chosen < valid.size).astype(jnp.float32),
    )


class Candidates(NamedTuple):
    """Rows that may be learned from, [N, Q, ...] or flat."""

    drafts: list[jax.Array]  # J draft hidden states [N, Q, D]
    previous: jax.Array  # int32 [N, Q], the token that the drafts follow
    final: jax.Array  # [N, Q, D], the verifier's final hidden state behind it
    valid: jax.Array  # bool [N, Q]


def _with_branches(
    model: SpeculativeLlama, text: tuple[jax.Array, Features, jax.Array, int], windows: Windows
) -> tuple[list[jax.Array], Candidates | None]:
    """The drafts in the text, and the rows of the drafts that were not taken; None if nothing is drafted behind such.

    A branch is nobody's first draft: what would be draft 1 behind it stands for draft 0 too.
    """
    branches, dtype = windows.branches, model.llama.dtype
    assert branches is not None
    last = windows.tokens.shape[1] - 2
    rows = BranchRows(branches.hidden.astype(dtype), jnp.clip(branches.position, 0, last))
    drafts, behind = model.drafter.unroll_branches(*text, rows)
    if not behind:
        return drafts, None
    aligned = [behind[min(max(j - 1, 0), len(behind) - 1)] for j in range(len(drafts))]
    # A branch needs the text before it, of which a window that was cut may have lost the beginning.
    known = (branches.token != NO_BRANCH) & (branches.position >= len(drafts))
    valid = known & (branches.position < windows.length[:, None]) & (branches.position <= last)
    return drafts, Candidates(aligned, branches.token, branches.final.astype(dtype), valid)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


def _joined(text: jax.Array, aside: jax.Array) -> jax.Array:
    """Both flat, the text's rows first."""
    return jnp.concatenate([_flat(text), _flat(aside)])
