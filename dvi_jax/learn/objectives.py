"""The terms of the fast update and of the slow update. Pure functions of float32 logits; masked means over positions.

Letters: M positions, V vocabulary. Every `mask` is float32 [M] (0 or 1, or weights); a mean divides by the mask's sum,
at least 1, so an empty mask gives 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """sum(values * mask) / max(sum(mask), 1)."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def kl_divergence(teacher: jax.Array, student: jax.Array, mask: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Mean KL(p_teacher || p_student) over logits [M, V], in nats; both at `temperature`, times temperature squared.

    The gradient reaches the student alone. The square keeps gradients of one size over temperatures
    (arXiv 1503.02531, section 2.1).
    """
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return masked_mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), mask) * temperature**2


def kl_from(logits: jax.Array, reference: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean KL(p || p_reference) over logits [M, V], in nats: what holds a moving model to a frozen one."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_q = jax.nn.log_softmax(jax.lax.stop_gradient(reference).astype(jnp.float32))
    return masked_mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), mask)


def policy_gradient(
    logits: jax.Array, proposals: jax.Array, rewards: jax.Array, baseline: jax.Array, mask: jax.Array
) -> jax.Array:
    """REINFORCE: -mean[(r - b) log p_draft(proposed token)] over judged positions (DVI, L_pg).

    logits [M, V]; proposals int [M]; rewards float [M] in {0, 1}. Only valid for proposals of the current drafter.
    """
    log_p = token_log_prob(logits, proposals)
    return -masked_mean((rewards - jax.lax.stop_gradient(baseline)) * log_p, mask)


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean -log p(target) over the masked positions; logits [M, V], targets int [M]."""
    return -masked_mean(token_log_prob(logits, targets), mask)


def entropy(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean entropy of softmax(logits) in nats."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return masked_mean(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1), mask)


def token_log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax(logits)[token], float32 [M]; negative tokens (no proposal) give the first entry, to be masked."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(log_p, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
