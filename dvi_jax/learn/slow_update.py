"""The slow update: one gradient step of lora_D, the verifier's own adapter, on text of the log.

    L = CE(verifier, observed token) + beta KL(verifier || frozen verifier)

(DVI, section "Improve"; beta 0.1.) It changes what "lossless" is relative to: from then on, the verifier as it now is.
Off unless the checkpoint has a lora_D. Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dvi_jax.config import SlowConfig
from dvi_jax.learn import objectives
from dvi_jax.learn.optimizer import guarded
from dvi_jax.model.speculative_llama import Definition, Params, SpeculativeLlama, Tree, join


class SlowState(struct.PyTreeNode):
    """What one slow update hands to the next."""

    lora_d: Tree
    optimizer: optax.OptState
    step: jax.Array  # int32 scalar, slow updates done


def make_optimizer(config: SlowConfig) -> optax.GradientTransformation:
    """AdamW clipped by global norm; non-finite updates are skipped."""
    return guarded(optax.adamw(config.lr, weight_decay=0.0), config.clip_norm)


def init_slow(params: Params, config: SlowConfig) -> SlowState:
    """State at slow update 0."""
    return SlowState(params.lora_d, make_optimizer(config).init(params.lora_d), jnp.int32(0))


def is_due(fast_step: int, config: SlowConfig) -> bool:
    """Whether a slow update follows fast update number `fast_step` (counted from 1): every `every`-th, never for 0."""
    return config.every > 0 and fast_step > 0 and fast_step % config.every == 0


@partial(jax.jit, static_argnames=("definition", "config"))
def slow_update(
    definition: Definition, params: Params, state: SlowState, tokens: jax.Array, mask: jax.Array, *, config: SlowConfig
) -> tuple[SlowState, dict[str, jax.Array]]:
    """One update on tokens int32 [B, T]; `mask` bool [B, T] marks the tokens to learn. Returns state and metrics.

    Nothing is donated: a lora_D is small, and a model that decodes with the earlier one keeps it.
    """
    # The frozen verifier is the same model with a lora_D that adds nothing.
    frozen = join(definition, params._replace(lora_d=jax.tree.map(jnp.zeros_like, params.lora_d)))
    reference = jax.lax.stop_gradient(verifier_logits(frozen, tokens))

    def loss_of(lora_d: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = verifier_logits(join(definition, params._replace(lora_d=lora_d)), tokens)
        return slow_loss(logits, reference, tokens, mask, config.beta)

    grads, metrics = jax.grad(loss_of, has_aux=True)(state.lora_d)
    updates, optimizer = make_optimizer(config).update(grads, state.optimizer, state.lora_d)
    return SlowState(optax.apply_updates(state.lora_d, updates), optimizer, state.step + 1), metrics


def verifier_logits(model: SpeculativeLlama, tokens: jax.Array) -> jax.Array:
    """The verifier over whole rows: int32 [B, T] -> float32 [B, T, V]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, _ = model.llama.shallow(tokens, None, positions)
    return model.llama.logits(model.llama.deep(hidden, None, positions)[0])


def slow_loss(
    logits: jax.Array, reference: jax.Array, tokens: jax.Array, mask: jax.Array, beta: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss from verifier and frozen logits [B, T, V]; row t predicts token t + 1."""
    vocab = logits.shape[-1]
    weight = mask[:, 1:].astype(jnp.float32).ravel()
    rows, frozen = logits[:, :-1].reshape(-1, vocab), reference[:, :-1].reshape(-1, vocab)
    ce = objectives.cross_entropy(rows, tokens[:, 1:].ravel(), weight)
    kl = objectives.kl_from(rows, frozen, weight)
    return ce + beta * kl, {"slow_loss": ce + beta * kl, "slow_ce": ce, "slow_kl": kl}
