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
import numpy as np
import optax
from flax import struct

from dvi_jax.config import DistillConfig
from dvi_jax.learn import objectives
from dvi_jax.learn.fast_update import Trainable, with_trainable
from dvi_jax.learn.optimizer import guarded
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import Definition, Params, SpeculativeLlama, join

POSITIONS_AT_ONCE = 2048  # whose logits over the vocabulary are in memory


class DistillState(struct.PyTreeNode):
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
    """State at step 0."""
    trainable = jax.tree.map(jnp.asarray, {"drafter": params.drafter, "lora_s": params.lora_s})
    return DistillState(trainable, make_optimizer(config).init(trainable), jnp.int32(0))


def distill_step(
    definition: Definition,
    params: Params,
    state: DistillState,
    tokens: jax.Array | np.ndarray,
    mask: jax.Array | np.ndarray,
    *,
    config: DistillConfig,
) -> tuple[DistillState, dict[str, jax.Array]]:
    """One update on tokens int32 [B, T] where `mask` bool [B, T] marks tokens worth predicting.

    `state` is used up, all but its `trainable`: a model that decodes with those arrays keeps them.
    """
    rest = state.replace(trainable={})
    return _distill_step(definition, params, state.trainable, rest, tokens, mask, config=config)


@partial(jax.jit, static_argnames=("definition", "config"), donate_argnames="state")
def _distill_step(
    definition: Definition,
    params: Params,
    trainable: Trainable,
    state: DistillState,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    config: DistillConfig,
) -> tuple[DistillState, dict[str, jax.Array]]:

    def loss_of(trainable: Trainable) -> tuple[jax.Array, dict[str, Any]]:
        return distill_loss(join(definition, with_trainable(params, trainable)), tokens, mask, config)

    grads, metrics = jax.grad(loss_of, has_aux=True)(trainable)
    updates, optimizer = make_optimizer(config).update(grads, state.optimizer, trainable)
    metrics |= {"grad_norm": optax.global_norm(grads), "skipped_updates": optimizer.total_notfinite}
    return DistillState(optax.apply_updates(trainable, updates), optimizer, state.step + 1), metrics


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
    # The verifier, frozen: one pass gives its features at every position.
    hidden, tapped, _ = llama.shallow(tokens, None, positions)
    hidden = jax.lax.stop_gradient(hidden)
    final, tapped_deep, _ = llama.deep(hidden, None, positions)
    features = jax.lax.stop_gradient(Features.of(final, tapped + tapped_deep))
    # The drafter, from the hidden states that it would see in decoding.
    drafted_from = hidden
    if model.separate_trunk:
        drafted_from, _, _ = llama.shallow(tokens, None, positions, adapted=True)
    drafts = model.drafter.unroll(drafted_from, features, positions, config.unroll_steps)
    # Row t predicts the token at t + 1; the last row's is not in the batch.
    weight = jnp.pad(mask[:, 1:], ((0, 0), (0, 1))).astype(jnp.float32)
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    count = jnp.maximum(jnp.sum(weight), 1.0)
    sums = _chunked_sums(model, features.final, drafts, jnp.stack([tokens, following], axis=-1), weight)
    means = {name: total / count for name, total in sums.items()}
    decay = config.unroll_decay ** jnp.arange(len(drafts))
    losses = means["kl"] if config.targets == "verifier" else means["ce"]
    loss = jnp.sum(decay * losses) / jnp.sum(decay)
    return loss, means | {"loss": loss, "positions": count}


def _chunked_sums(
    model: SpeculativeLlama, final: jax.Array, drafts: list[jax.Array], tokens: jax.Array, weight: jax.Array
) -> dict[str, jax.Array]:
    """Sums over positions: `kl`, `ce` of the next token, `agreement`, [J] each, and the verifier's `verifier_ce`.

    final and drafts [B, T, D]; tokens [B, T, 2], a position's own and the one that follows. Logits exist by chunks, and
    again going backward.
    """
    head, width = model.llama.head_weight(), final.shape[-1]
    total = weight.size
    chunk = min(POSITIONS_AT_ONCE, total)
    padding = -total % chunk

    def chunked(x: jax.Array) -> jax.Array:
        flat = x.reshape(total, -1)
        return jnp.pad(flat, ((0, padding), (0, 0))).reshape(-1, chunk, flat.shape[1])

    @jax.checkpoint
    def sums(final: jax.Array, drafts: jax.Array, tokens: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
        verifier, scale = model.llama.logits(final), jnp.maximum(jnp.sum(weight), 1.0)
        top, own, following = jnp.argmax(verifier, axis=-1), tokens[:, 0], tokens[:, 1]
        rows = []
        for draft in jnp.split(drafts, drafts.shape[-1] // width, axis=-1):
            logits = model.drafter.corrected(model.drafter.logits(draft, head), own, None)
            rows.append(
                {
                    "kl": objectives.kl_divergence(verifier, logits, weight) * scale,
                    "ce": objectives.cross_entropy(logits, following, weight) * scale,
                    "agreement": jnp.sum((jnp.argmax(logits, axis=-1) == top) * weight),
                }
            )
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
        return stacked | {"verifier_ce": objectives.cross_entropy(verifier, following, weight) * scale}

    def add(totals: dict[str, jax.Array], part: tuple[jax.Array, ...]) -> tuple[dict[str, jax.Array], None]:
        final, drafted, tokens, weight = part
        return jax.tree.map(jnp.add, totals, sums(final, drafted, tokens, weight[:, 0])), None

    zeros = {name: jnp.zeros(len(drafts)) for name in ("kl", "ce", "agreement")} | {"verifier_ce": jnp.zeros(())}
    parts = (chunked(final), chunked(jnp.concatenate(drafts, axis=-1)), chunked(tokens), chunked(weight))
    return jax.lax.scan(add, zeros, parts)[0]
