"""Teacher forcing: the drafter imitates the verifier on given text, at full device speed.

The warm start of online learning (Kangaroo's adapter training, EAGLE-3's training-time test): one frozen forward pass
gives the verifier's final hidden state everywhere, the drafter is unrolled over all positions at once, and

    L = sum_j decay^j KL(p_verify || p_draft_j) / sum_j decay^j       over the masked positions.

With `targets: log` the text's own tokens take the verifier's place (cross-entropy). On an exit head with lora_S in the
shallow layers that is SGP, the shallow-gradient path: the deep layers get the base model's hidden state, detached, so
the shallow part learns from the exit loss alone.

Letters: B rows, T tokens of a row, J drafts unrolled, D hidden, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dvi_jax.config import DistillConfig
from dvi_jax.learn import objectives
from dvi_jax.learn.fast_update import Trainable, with_trainable
from dvi_jax.learn.optimizer import guarded
from dvi_jax.model.speculative_llama import Definition, Params, SpeculativeLlama, join

CHUNK = 2048  # positions whose logits over the vocabulary are in memory at a time


@struct.dataclass
class DistillState:
    """What one step hands to the next."""

    trainable: Trainable
    optimizer: optax.OptState
    step: jax.Array  # int32 scalar


def make_optimizer(config: DistillConfig) -> optax.GradientTransformation:
    """AdamW, linear warm-up and cosine decay to a tenth, clipped by global norm; non-finite updates are skipped."""
    steps = config.steps
    rate = optax.warmup_cosine_decay_schedule(0.0, config.lr, min(config.warmup, steps // 2), steps, config.lr / 10)
    return guarded(optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay), config.clip_norm)


def init_distill(params: Params, config: DistillConfig) -> DistillState:
    """State at step 0; arrays are copied, since the state is donated."""
    trainable = jax.tree.map(jnp.array, {"drafter": params.drafter, "lora_s": params.lora_s})
    return DistillState(trainable, make_optimizer(config).init(trainable), jnp.int32(0))


@partial(jax.jit, static_argnames=("definition", "config"), donate_argnames="state")
def distill_step(
    definition: Definition,
    params: Params,
    state: DistillState,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    config: DistillConfig,
) -> tuple[DistillState, dict[str, jax.Array]]:
    """One update on tokens int32 [B, T] where `mask` bool [B, T] marks tokens worth predicting."""

    def loss_of(trainable: Trainable) -> tuple[jax.Array, dict[str, Any]]:
        return distill_loss(join(definition, with_trainable(params, trainable)), tokens, mask, config)

    grads, metrics = jax.grad(loss_of, has_aux=True)(state.trainable)
    updates, optimizer = make_optimizer(config).update(grads, state.optimizer, state.trainable)
    metrics |= {"grad_norm": optax.global_norm(grads), "skipped_updates": optimizer.total_notfinite}
    return DistillState(optax.apply_updates(state.trainable, updates), optimizer, state.step + 1), metrics


@partial(jax.jit, static_argnames=("definition", "config"))
def distill_metrics(
    definition: Definition, params: Params, tokens: jax.Array, mask: jax.Array, *, config: DistillConfig
) -> dict[str, jax.Array]:
    """Loss and agreement without an update, for held-out rows."""
    return distill_loss(join(definition, params), tokens, mask, config)[1]


def distill_loss(
    model: SpeculativeLlama, tokens: jax.Array, mask: jax.Array, config: DistillConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, and the share of positions where draft j's top token is the verifier's (`agreement`, [J])."""
    llama = model.llama
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = llama.shallow(tokens, None, positions)
    hidden = jax.lax.stop_gradient(hidden)
    feature = jax.lax.stop_gradient(llama.deep(hidden, None, positions)[0])
    drafted_from = hidden
    if model.separate_trunk:
        drafted_from, _ = llama.shallow(tokens, None, positions, adapted=True)
    drafts = model.drafter.unroll(drafted_from, feature, positions, config.unroll_steps)
    # Row t predicts the token at t + 1; the last row's is not in the batch.
    weight = jnp.pad(mask[:, 1:], ((0, 0), (0, 1))).astype(jnp.float32)
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    count = jnp.maximum(jnp.sum(weight), 1.0)
    means = {name: total / count for name, total in _chunked_sums(model, feature, drafts, following, weight).items()}
    decay = config.unroll_decay ** jnp.arange(len(drafts))
    losses = means["kl"] if config.targets == "verifier" else means["ce"]
    loss = jnp.sum(decay * losses) / jnp.sum(decay)
    return loss, means | {"loss": loss, "positions": count}


def _chunked_sums(
    model: SpeculativeLlama, feature: jax.Array, drafts: list[jax.Array], following: jax.Array, weight: jax.Array
) -> dict[str, jax.Array]:
    """Sums over positions: `kl`, `ce` of the next token, `agreement`, [J] each, and the verifier's `verifier_ce`.

    Logits exist by chunks, and again going backward.
    """
    head, width = model.llama.head_weight(), feature.shape[-1]
    total = weight.size
    chunk = min(CHUNK, total)
    padding = -total % chunk

    def chunked(x: jax.Array) -> jax.Array:
        flat = x.reshape(total, -1)
        return jnp.pad(flat, ((0, padding), (0, 0))).reshape(-1, chunk, flat.shape[1])

    @jax.checkpoint
    def sums(feature: jax.Array, drafts: jax.Array, following: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
        teacher, scale = model.llama.logits(feature), jnp.maximum(jnp.sum(weight), 1.0)
        top = jnp.argmax(teacher, axis=-1)
        rows = []
        for draft in jnp.split(drafts, drafts.shape[-1] // width, axis=-1):
            logits = model.drafter.logits(draft, head)
            rows.append(
                {
                    "kl": objectives.kl_divergence(teacher, logits, weight) * scale,
                    "ce": objectives.cross_entropy(logits, following, weight) * scale,
                    "agreement": jnp.sum((jnp.argmax(logits, axis=-1) == top) * weight),
                }
            )
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
        return stacked | {"verifier_ce": objectives.cross_entropy(teacher, following, weight) * scale}

    def add(totals: dict[str, jax.Array], part: tuple[jax.Array, ...]) -> tuple[dict[str, jax.Array], None]:
        features, drafted, next_tokens, weights = part
        return jax.tree.map(jnp.add, totals, sums(features, drafted, next_tokens[:, 0], weights[:, 0])), None

    zeros = {name: jnp.zeros(len(drafts)) for name in ("kl", "ce", "agreement")} | {"verifier_ce": jnp.zeros(())}
    parts = (chunked(feature), chunked(jnp.concatenate(drafts, axis=-1)), chunked(following), chunked(weight))
    return jax.lax.scan(add, zeros, parts)[0]
