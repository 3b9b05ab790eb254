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


def kl_divergence(verifier: jax.Array, draft: jax.Array, mask: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Mean KL(p_verify || p_draft) over logits [M, V], in nats; both at `temperature`, times temperature squared.

    The gradient reaches the draft logits alone. The square keeps gradients of one size over temperatures
    (arXiv 1503.02531, section 2.1).
    """
    verifier = jax.lax.stop_gradient(verifier).astype(jnp.float32)
    rows = kl_rows(verifier / temperature, draft.astype(jnp.float32) / temperature)
    return masked_mean(rows, mask) * temperature**2


def total_variation(verifier: jax.Array, draft: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of sum |p_verify - p_draft| / 2 over logits [M, V]: how often rejection sampling rejects.

    The gradient reaches the draft logits alone.
    """
    verifier = jax.lax.stop_gradient(verifier).astype(jnp.float32)
    return masked_mean(tv_rows(verifier, draft.astype(jnp.float32)), mask)


def kl_from(logits: jax.Array, reference: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean KL(p || p_reference) over logits [M, V], in nats: what holds a moving model to a frozen one."""
    reference = jax.lax.stop_gradient(reference).astype(jnp.float32)
    return masked_mean(kl_rows(logits.astype(jnp.float32), reference), mask)


def policy_gradient(log_prob: jax.Array, rewards: jax.Array, baseline: jax.Array, mask: jax.Array) -> jax.Array:
    """REINFORCE: -mean[(r - b) log p_draft(proposed token)] over judged positions (DVI, L_pg).

    log_prob [M] of the proposals; rewards float [M] in {0, 1}. Only valid for proposals of the current drafter.
    """
    return -masked_mean((rewards - jax.lax.stop_gradient(baseline)) * log_prob, mask)


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean -log p(target) over the masked positions; logits [M, V], targets int [M]."""
    return -masked_mean(token_log_prob(logits.astype(jnp.float32), targets), mask)


# What follows gives [M] for float32 logits [M, V], by sums over V alone. With log sum exp taken apart, a gradient is
# one expression for each entry, which XLA makes in one pass: few arrays [M, V] are ever written.


def kl_rows(reference: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(p_reference || p) in nats: the cross-entropy of the two less the reference's entropy."""
    p = jax.nn.softmax(reference)
    return _cross_entropy_rows(p, logits) - _cross_entropy_rows(p, reference)


def tv_rows(reference: jax.Array, logits: jax.Array) -> jax.Array:
    """Total variation of softmax(reference) and softmax(logits)."""
    return 0.5 * jnp.sum(jnp.abs(jax.nn.softmax(reference) - jax.nn.softmax(logits)), axis=-1)


def entropy_rows(logits: jax.Array) -> jax.Array:
    """Entropy of softmax(logits) in nats."""
    return _cross_entropy_rows(jax.nn.softmax(logits), logits)


def token_log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax(logits)[token]; for negative tokens (no proposal) a number, to be masked."""
    is_token = jnp.arange(logits.shape[-1]) == tokens[:, None]  # a gather's gradient would be a scatter
    return jnp.sum(jnp.where(is_token, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def _cross_entropy_rows(p: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(p * logits, axis=-1)
