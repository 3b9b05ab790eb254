"""The fast update: one gradient step of the drafter and lora_S on windows of rollouts.

    L = w_kl KL(p_verify || p_draft) + w_pg L_pg + w_ce CE(verifier's token, only where accepted) - w_ent H(p_draft)

(DVI, section "Improve"). The base model and lora_D are not arguments of the gradient: they cannot move. Letters: N
windows, T window length, M positions used, J drafts unrolled, D hidden, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from dvi_jax.config import ObjectiveConfig, OptimizerConfig
from dvi_jax.learn import objectives
from dvi_jax.learn.optimizer import guarded
from dvi_jax.learn.replay import Replay, Windows, sample
from dvi_jax.learn.schedule import kl_to_rl
from dvi_jax.learn.slow_update import SlowState
from dvi_jax.model.speculative_llama import Params, SpeculativeLlama, join

Trainable = dict[str, dict]


@struct.dataclass
class LearnerState:
    """All that the fast update carries; with the stream position, all that a resumed run needs."""

    trainable: Trainable  # {"drafter": ..., "lora_s": ...} as in `Params`
    optimizer: optax.OptState
    replay: Replay
    baseline: jax.Array  # float32 scalar, moving average of the reward
    step: jax.Array  # int32 scalar, updates done
    key: jax.Array
    slow: SlowState | None = None  # of a verifier with a lora_D; the fast update passes it on


class Positions(NamedTuple):
    """M positions picked from a batch of windows, flat."""

    draft_logits: jax.Array  # float32 [J, M, V], for each draft of a round the drafter can tell apart
    verifier_logits: jax.Array  # float32 [M, V]
    proposal: jax.Array  # int32 [M]
    reward: jax.Array  # int8 [M]
    step: jax.Array  # int8 [M], which draft of its round the proposal was
    valid: jax.Array  # float32 [M]
    on_policy: jax.Array  # float32 [M], judged in the rollout of the drafter as it now is


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with its own rate for lora_S and for the drafter's weights, clipped by global norm.

    Non-finite gradients skip the update and are counted (`optimizer.py`).
    """
    rates = {"drafter": config.head_lr, "lora_s": config.lora_lr}
    adamw = {name: optax.adamw(rate, weight_decay=config.weight_decay) for name, rate in rates.items()}
    return guarded(optax.multi_transform(adamw, _labels), config.clip_norm)


def _labels(tree: Trainable) -> dict[str, str]:
    return {name: name for name in tree}


def init_learner(params: Params, config: OptimizerConfig, replay: Replay, key: jax.Array) -> LearnerState:
    """A learner at update 0. The trainable arrays are copied: the state is donated, the model's own must survive."""
    trainable = jax.tree.map(jnp.array, {"drafter": params.drafter, "lora_s": params.lora_s})
    optimizer = make_optimizer(config).init(trainable)
    return LearnerState(trainable, optimizer, replay, jnp.float32(0.0), jnp.int32(0), key)


def with_trainable(params: Params, trainable: Trainable) -> Params:
    """`params` with the learner's current drafter and lora_S."""
    return params._replace(drafter=trainable["drafter"], lora_s=trainable["lora_s"])


@partial(
    jax.jit,
    static_argnames=("graphdef", "objective", "optimizer", "replayed", "positions"),
    donate_argnames="state",
)
def fast_update(
    graphdef: nnx.GraphDef,
    params: Params,
    state: LearnerState,
    fresh: Windows,
    is_current: jax.Array,
    *,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    replayed: int,
    positions: int,
) -> tuple[LearnerState, dict[str, jax.Array]]:
    """One update on the `fresh` rollout and `replayed` windows of the replay, at `positions` positions in all.

    The policy term uses the fresh windows alone, and only while the drafter is still the one that made them
    (`is_current`, bool): proposals of another drafter would bias it. Returns the new state and scalar metrics.
    """
    key, sample_key, pick_key = jax.random.split(state.key, 3)
    batch, on_policy = fresh, jnp.broadcast_to(is_current, fresh.length.shape)
    if replayed:
        old = sample(state.replay, sample_key, replayed)
        batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), fresh, old)
        on_policy = jnp.concatenate([on_policy, jnp.zeros(old.length.shape, bool)])
    weights = kl_to_rl(state.step, objective)

    def loss_of(trainable: Trainable) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = join(graphdef, with_trainable(params, trainable))
        picked = evaluate_positions(model, batch, on_policy, pick_key, objective, positions)
        return fast_loss(picked, state.baseline, weights, objective)

    grads, metrics = jax.grad(loss_of, has_aux=True)(state.trainable)
    updates, opt_state = make_optimizer(optimizer).update(grads, state.optimizer, state.trainable)
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
    new = LearnerState(
        optax.apply_updates(state.trainable, updates),
        opt_state,
        state.replay,
        baseline,
        state.step + 1,
        key,
        state.slow,
    )
    return new, metrics


def fast_loss(
    picked: Positions, baseline: jax.Array, weights: tuple[jax.Array, jax.Array], config: ObjectiveConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of the four terms, and each term by name.

    KL is a mean over the unrolled drafts, draft j weighted `unroll_decay`^j; the other terms take the draft that acted.
    """
    teacher, unrolled = picked.verifier_logits, len(picked.draft_logits)
    top = jnp.argmax(teacher, axis=-1)
    accepted = picked.valid * (picked.reward == 1)
    acted = jnp.clip(picked.step, 0, unrolled - 1).astype(jnp.int32)
    logits = jnp.take_along_axis(picked.draft_logits, acted[None, :, None], axis=0)[0]
    decay = config.unroll_decay ** jnp.arange(unrolled)
    kl = [objectives.kl_divergence(teacher, x, picked.valid, config.kl_temperature) for x in picked.draft_logits]
    terms = {
        "kl": jnp.sum(decay * jnp.stack(kl)) / jnp.sum(decay),
        "pg": objectives.policy_gradient(
            logits, picked.proposal, picked.reward.astype(jnp.float32), baseline, picked.on_policy
        ),
        "ce": objectives.cross_entropy(logits, top, accepted),
        "entropy": objectives.entropy(logits, picked.valid),
    }
    loss = (
        weights[0] * terms["kl"]
        + weights[1] * terms["pg"]
        + config.ce_weight * terms["ce"]
        - config.entropy_weight * terms["entropy"]
    )
    first = jnp.argmax(picked.draft_logits[0], axis=-1)
    agreement = objectives.masked_mean((first == top).astype(jnp.float32), picked.valid)
    return loss, terms | {"loss": loss, "agreement": agreement, "positions": jnp.sum(picked.valid)}


def evaluate_positions(
    model: SpeculativeLlama,
    windows: Windows,
    on_policy: jax.Array,
    key: jax.Array,
    objective: ObjectiveConfig,
    count: int,
) -> Positions:
    """Re-run the shallow layers and the drafter over whole windows, then the head at `count` random valid positions.

    Only those positions pay for logits over the vocabulary; if fewer are valid, the rest is masked.
    """
    llama, tokens = model.llama, windows.tokens
    rows = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = llama.shallow(tokens, None, rows, adapted=model.separate_trunk)
    # What predicts position p was computed at row p - 1.
    teacher = windows.verifier_hidden[:, 1:].astype(llama.dtype)
    drafts = model.drafter.unroll(hidden[:, :-1], teacher, rows[:, :-1], objective.unroll_steps)

    target = rows[:, 1:]
    valid = target < windows.length[:, None]
    if not objective.learn_from_prompt:
        valid &= target > windows.prompt_length[:, None]
    proposal, reward = windows.proposal[:, 1:], windows.reward[:, 1:]
    judged = valid & (reward >= 0) & on_policy[:, None]
    priority = jax.random.uniform(key, valid.shape) + valid
    chosen = jax.lax.top_k(priority.ravel(), count)[1]

    def pick(values: jax.Array) -> jax.Array:
        return values.reshape(-1, *values.shape[2:])[chosen]

    return Positions(
        draft_logits=jnp.stack([model.drafter.logits(pick(draft), llama.head_weight()) for draft in drafts]),
        verifier_logits=llama.logits(pick(teacher)),
        proposal=pick(proposal),
        reward=pick(jnp.where(valid, reward, -1)),
        step=pick(windows.step[:, 1:]),
        valid=pick(valid).astype(jnp.float32),
        on_policy=pick(judged).astype(jnp.float32),
    )
