"""Teacher forcing: the drafter imitates the verifier on given text, at full device speed.

The warm start of online learning (Kangaroo's adapter training, EAGLE-3's training-time test): one frozen forward pass
gives the verifier's features everywhere, the drafter is unrolled over all positions at once, so that rounds begin at
every one of them, and

    L = sum_j decay^j loss(p_verify, p_draft_j) / sum_j decay^j       over the masked positions,

where loss is KL(p_verify || p_draft) or what `DistillLoss` mixes. Where only some tokens may be drafted both are over
those, and a position weighs the verifier's probability of all of them (EAGLE-3, arXiv 2503.01840, drafts 32,000).
With `targets: log` the text's own tokens take the verifier's place (cross-entropy). On an exit head with lora_S in the
shallow layers that is SGP, the shallow-gradient path: the deep layers get the base model's hidden state, detached, so
the shallow part learns from the exit loss alone.

Logits over the vocabulary exist for a chunk of positions at a time, and once: a chunk gives the gradient with respect
to its draft hidden states at once, and all of them together are then taken back through the drafter.

Letters: B rows, T tokens of a row, M = B * T positions, C positions of a chunk, J drafts unrolled, D hidden, V
vocabulary, Vd tokens that may be drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from dvi_jax.config import DistillConfig
from dvi_jax.errors import UserError
from dvi_jax.learn import objectives
from dvi_jax.learn.fast_update import Trainable, with_trainable
from dvi_jax.learn.optimizer import guarded, maps_apart, muon
from dvi_jax.learn.shared_gradient import over_devices, over_rows
from dvi_jax.mesh import ROWS, WHOLE
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import Definition, Params, SpeculativeLlama, join

POSITIONS_AT_ONCE = 2048  # whose logits over the vocabulary are in memory


class DistillState(struct.PyTreeNode):
    """What one step hands to the next."""

    trainable: Trainable
    optimizer: optax.OptState
    step: jax.Array  # int32 scalar


def make_optimizer(config: DistillConfig) -> optax.GradientTransformation:
    """At `learning_rate`, clipped by global norm; non-finite updates are skipped."""
    adamw = optax.adamw(learning_rate(config), b2=0.95, weight_decay=config.weight_decay)
    if config.matrices == "adamw":
        return guarded(adamw, config.clip_norm)
    maps = muon(learning_rate(config), weight_decay=config.weight_decay)
    by_part = {"drafter": adamw, "lora_s": adamw, "maps": maps}
    return guarded(optax.multi_transform(by_part, maps_apart), config.clip_norm)


def learning_rate(config: DistillConfig) -> optax.Schedule:
    """The rate once so many updates are done: linear warm-up from 0, then cosine decay to a tenth after the last."""
    steps = config.steps
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, min(config.warmup, steps // 2), steps, config.lr / 10)


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


def step_memory(
    definition: Definition,
    params: Params,
    state: DistillState,
    tokens: np.ndarray,
    mask: np.ndarray,
    *,
    config: DistillConfig,
) -> int:
    """Bytes on the device that an update with these arguments takes, the model's included, by its compiled program."""
    rest = state.replace(trainable={})
    lowered = _distill_step.lower(definition, params, state.trainable, rest, tokens, mask, config=config)
    analysis = lowered.compile().memory_analysis()
    if analysis is None:
        raise UserError("this device does not say how much memory a program takes")
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + new


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
    grads, metrics = distill_gradient(definition, params, trainable, tokens, mask, config)
    updates, optimizer = make_optimizer(config).update(grads, state.optimizer, trainable)
    metrics |= {"grad_norm": optax.global_norm(grads), "skipped_updates": optimizer.total_notfinite}
    return DistillState(optax.apply_updates(trainable, updates), optimizer, state.step + 1), metrics


@partial(jax.jit, static_argnames=("definition", "config"))
def distill_metrics(
    definition: Definition, params: Params, tokens: jax.Array, mask: jax.Array, *, config: DistillConfig
) -> dict[str, jax.Array]:
    """What `distill_gradient` gives beside the gradient, for held-out rows."""

    def metrics(params: Params, tokens: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        model = join(definition, params)
        verified = verify_text(model, tokens, mask)
        drafts = unrolled_drafts(model, verified, config.unroll_steps)

        def add(sums: Sums, rows: Rows, drafts: jax.Array, _: jax.Array) -> Sums:
            return jax.tree.map(jnp.add, sums, draft_sums(model, rows, drafts, config))

        sums = fold_chunks(verified, drafts, add, _no_sums(drafts))
        sums, learned = over_rows(definition, (sums, verified.learned))
        return _means(sums, learned, config)

    return definition.sharded(metrics, params, (ROWS, ROWS), WHOLE)(params, tokens, mask)


def distill_gradient(
    definition: Definition,
    params: Params,
    trainable: Trainable,
    tokens: jax.Array,
    mask: jax.Array,
    config: DistillConfig,
) -> tuple[Trainable, dict[str, jax.Array]]:
    """The gradient of the loss with respect to `trainable`, and the metrics.

    These are means over the `positions` learned from: `loss`; of each draft, [J], `kl`, `ce` of the text's next token
    and `agreement`, how often its top token is the verifier's; and the verifier's own `verifier_ce`.
    """
    arguments = (WHOLE, ROWS, ROWS)
    run = definition.sharded(partial(_gradient, definition, config), params, arguments, WHOLE)
    return run(params, trainable, tokens, mask)


def _gradient(
    definition: Definition,
    config: DistillConfig,
    params: Params,
    trainable: Trainable,
    tokens: jax.Array,
    mask: jax.Array,
) -> tuple[Trainable, dict[str, jax.Array]]:
    """`distill_gradient` on each device, from its rows."""
    verified = verify_text(join(definition, params), tokens, mask)
    learned = over_rows(definition, verified.learned)

    def drafts_of(trainable: Trainable) -> jax.Array:
        return unrolled_drafts(join(definition, with_trainable(params, trainable)), verified, config.unroll_steps)

    drafts, pull_back = jax.vjp(drafts_of, trainable)
    weights = _draft_weights(config, drafts.shape[1]) / jnp.maximum(learned, 1)

    def add(carry: Carry, rows: Rows, drafts: jax.Array, index: jax.Array) -> Carry:
        def loss_of(trainable: Trainable, drafts: jax.Array) -> tuple[jax.Array, Sums]:
            sums = draft_sums(join(definition, with_trainable(params, trainable)), rows, drafts, config)
            return jnp.sum(weights * sums["loss"]), sums

        sums, of_weights, of_drafts = carry
        (by_weights, by_drafts), own = jax.grad(loss_of, argnums=(0, 1), has_aux=True)(trainable, drafts)
        added = jax.tree.map(jnp.add, (sums, of_weights), (own, by_weights))
        return *added, of_drafts.at[index].add(by_drafts)

    nothing = _no_sums(drafts), jax.tree.map(jnp.zeros_like, trainable), jnp.zeros_like(drafts)
    sums, of_weights, of_drafts = fold_chunks(verified, drafts, add, nothing)
    (through_drafter,) = pull_back(of_drafts)
    gradient = over_devices(definition, jax.tree.map(jnp.add, of_weights, through_drafter))
    gradient, sums = over_rows(definition, (gradient, sums))
    return gradient, _means(sums, learned, config)


class Verified(NamedTuple):
    """Rows of text and what the verifier makes of them."""

    tokens: jax.Array  # int32 [B, T]
    hidden: jax.Array  # [B, T, D], exit hidden state with base weights
    features: Features  # [B, T, ...]
    order: jax.Array  # int32 [M], positions of the flat batch: first those that are learned from
    learned: jax.Array  # int32 scalar, how many those are


class Rows(NamedTuple):
    """A chunk of positions, apart from their drafts."""

    final: jax.Array  # [C, D], the verifier's
    own: jax.Array  # int32 [C], the token of the position
    following: jax.Array  # int32 [C], the one after it in the text
    weight: jax.Array  # float32 [C], 1 or, where the chunk is only filled up, 0


Sums = dict[str, jax.Array]  # over positions: `loss`, `kl`, `ce`, `agreement` [J], `verifier_ce`
Carry = tuple[Sums, Trainable, jax.Array]  # and gradients: of the weights, of all draft hidden states


def verify_text(model: SpeculativeLlama, tokens: jax.Array, mask: jax.Array) -> Verified:
    """One frozen pass over tokens int32 [B, T].

    Row t predicts the token at t + 1, so a token that `mask` bool [B, T] marks is learned in the row before.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, tapped, _ = model.llama.shallow(tokens, None, positions)
    final, tapped_deep, _ = model.llama.deep(hidden, None, positions)
    learned = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))  # the last row's token is not in the batch
    features = Features.of(final, tapped + tapped_deep)
    return jax.lax.stop_gradient(Verified(tokens, hidden, features, *learned_first(learned.ravel())))


def learned_first(learned: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers int32 [M] of the positions marked in bool [M], in order, then of the others; how many are marked.

    Not by sorting: XLA's partitioner for GPUs (GSPMD) dies on the sort of a device's own rows.
    """
    count = jnp.sum(learned, dtype=jnp.int32)
    place = jnp.where(learned, jnp.cumsum(learned) - 1, count + jnp.cumsum(~learned) - 1)
    return jnp.zeros(learned.shape, jnp.int32).at[place].set(jnp.arange(len(learned), dtype=jnp.int32)), count


def unrolled_drafts(model: SpeculativeLlama, verified: Verified, steps: int) -> jax.Array:
    """Draft hidden states [M, J, D] everywhere, from the exit hidden states that the drafter would see in decoding."""
    positions = jnp.broadcast_to(jnp.arange(verified.tokens.shape[1]), verified.tokens.shape)
    hidden = verified.hidden
    if model.separate_trunk:
        hidden, _, _ = model.llama.shallow(verified.tokens, None, positions, adapted=True)
    drafts = model.drafter.unroll(hidden, verified.features, positions, steps)
    return jnp.stack(drafts, axis=2).reshape(-1, len(drafts), hidden.shape[-1])


class Targets(NamedTuple):
    """What the drafts of a chunk are compared with, over the Vd tokens that may be drafted (all, unless restricted)."""

    logits: jax.Array  # float32 [C, Vd], the verifier's
    share: jax.Array  # float32 [C], the weight times the verifier's probability of all these tokens together
    top: jax.Array  # int32 [C], column of the verifier's token, -1 where it may not be drafted
    following: jax.Array  # int32 [C], of the text's next token likewise

    @classmethod
    def of(cls, model: SpeculativeLlama, verifier: jax.Array, rows: Rows) -> Targets:
        """Those of the verifier's logits [C, V]."""
        top, ids = jnp.argmax(verifier, axis=-1), model.draft_ids()
        if ids is None or model.draft_shards > 1:  # of all devices together they are all tokens
            return cls(verifier, rows.weight, top, rows.following)
        logits = verifier[:, ids]
        share = jnp.exp(jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(verifier, axis=-1))
        column = jnp.full(verifier.shape[1], -1, jnp.int32).at[ids].set(jnp.arange(len(ids), dtype=jnp.int32))
        return cls(logits, rows.weight * share, column[top], column[rows.following])


def draft_sums(model: SpeculativeLlama, rows: Rows, drafts: jax.Array, config: DistillConfig) -> Sums:
    """What the drafts [C, J, D] of a chunk come to, summed over its positions."""
    llama, drafter, head = model.llama, model.drafter, model.draft_head()
    verifier = llama.all_logits(llama.logits(rows.final))
    targets = Targets.of(model, verifier, rows)
    of_drafts = []
    for j in range(drafts.shape[1]):
        logits = drafter.logits(drafts[:, j], head)
        logits = model.all_draft_logits(drafter.corrected(logits, drafts[:, j], rows.own, model.draft_ids()))
        terms = {
            "kl": _total(objectives.kl_divergence, targets.logits, logits, targets.share),
            "ce": _total(objectives.cross_entropy, logits, targets.following, _known(targets.following, rows)),
            "agreement": jnp.sum((jnp.argmax(logits, axis=-1) == targets.top) * rows.weight),
        }
        of_drafts.append(terms | {"loss": _loss(terms, targets, logits, rows, config)})
    sums = {name: jnp.stack([terms[name] for terms in of_drafts]) for name in of_drafts[0]}
    return sums | {"verifier_ce": _total(objectives.cross_entropy, verifier, rows.following, rows.weight)}


def _loss(
    terms: dict[str, jax.Array], targets: Targets, logits: jax.Array, rows: Rows, config: DistillConfig
) -> jax.Array:
    """What is made smaller, summed over the positions, for a draft's logits [C, Vd]."""
    if config.targets == "log":
        return terms["ce"]
    mix = config.loss
    loss = mix.kl * terms["kl"]
    if mix.tv:
        loss += mix.tv * _total(objectives.total_variation, targets.logits, logits, targets.share)
    if mix.ce:
        loss += mix.ce * _total(objectives.cross_entropy, logits, targets.top, _known(targets.top, rows))
    return loss


def _known(columns: jax.Array, rows: Rows) -> jax.Array:
    """The weights [C], 0 where the token of `columns` may not be drafted."""
    return rows.weight * (columns >= 0)


def _total(mean: Callable[..., jax.Array], *arguments: jax.Array) -> jax.Array:
    """The sum that `mean` divides by its mask, the last of its arguments."""
    return mean(*arguments) * jnp.maximum(jnp.sum(arguments[-1]), 1.0)


def fold_chunks(
    verified: Verified, drafts: jax.Array, add: Callable[[Any, Rows, jax.Array, jax.Array], Any], start: Any
) -> Any:
    """`add(carry, rows, drafts [C, J, D], index int32 [C])` over the positions learned from, chunk after chunk."""
    total, width = len(verified.order), verified.hidden.shape[-1]
    size = min(POSITIONS_AT_ONCE, total)
    order = jnp.pad(verified.order, (0, -total % size))
    final = verified.features.final.reshape(total, width)
    own = verified.tokens.ravel()
    following = jnp.pad(verified.tokens[:, 1:], ((0, 0), (0, 1))).ravel()

    def step(number: jax.Array, carry: Any) -> Any:
        index = jax.lax.dynamic_slice_in_dim(order, number * size, size)
        weight = (number * size + jnp.arange(size) < verified.learned).astype(jnp.float32)
        return add(carry, Rows(final[index], own[index], following[index], weight), drafts[index], index)

    return jax.lax.fori_loop(0, (verified.learned + size - 1) // size, step, start)


def _no_sums(drafts: jax.Array) -> Sums:
    by_draft = {name: jnp.zeros(drafts.shape[1]) for name in ("kl", "ce", "agreement", "loss")}
    return by_draft | {"verifier_ce": jnp.zeros(())}


def _draft_weights(config: DistillConfig, drafts: int) -> jax.Array:
    """What draft j counts for: float32 [J], 1 in all."""
    decay = config.unroll_decay ** jnp.arange(drafts)
    return decay / jnp.sum(decay)


def _means(sums: Sums, count: jax.Array, config: DistillConfig) -> dict[str, jax.Array]:
    """The metrics of sums over `count` positions."""
    means = {name: total / jnp.maximum(count, 1) for name, total in sums.items()}
    loss = jnp.sum(_draft_weights(config, len(means["loss"])) * means["loss"])
    return means | {"loss": loss, "positions": jnp.maximum(count, 1).astype(jnp.float32)}
