"""Sampling from the verifier, plainly or speculatively, with the same distribution (or the very same tokens).

The noise of a position depends on the sequence's seed and that position alone, never on rounds, drafts or neighbours.
Two ways to use it:

* coupled (default): the token at a position is argmax(log p + Gumbel noise of that position), whoever asks. The drafter
  uses the same noise on its own q, and its draft is accepted if it is that token. So speculative sampling gives the
  very tokens of plain sampling with that seed, whatever the drafter; drafts agree with probability at least
  (1 - TV) / (1 + TV) for the total variation TV of p and q (Daliri et al., arXiv 2408.07978).
* rejection: accept with probability min(1, p/q), else draw from the normalised positive part of p - q (Leviathan et
  al., arXiv 2211.17192). The distribution is p's, the tokens depend on the drafts, of which 1 - TV are accepted. The
  drafter's own noise also depends on how many drafts its round has already.

Letters: B batch, R rows of logits in this call, V vocabulary, W rows of a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dvi_jax.config import SamplingConfig


class Purpose(IntEnum):
    """What a position's noise is for: independent noise for each."""

    TOKEN = 0
    DRAFT = 1  # rejection only: the drafter's own draw
    ACCEPT = 2
    RESIDUAL = 3


class Sampling(struct.PyTreeNode):
    """How each sequence is sampled. They may differ in everything but `coupled`; temperature 0 is greedy."""

    key: jax.Array  # PRNG key [B]
    temperature: jax.Array  # float32 [B]
    top_k: jax.Array  # int32 [B], V for all
    top_p: jax.Array  # float32 [B]
    min_p: jax.Array  # float32 [B]
    penalty: jax.Array  # float32 [B], repetition penalty
    seen: jax.Array  # bool [B, V], tokens the sequence holds
    coupled: bool = struct.field(pytree_node=False)

    @classmethod
    def make(cls, settings: Sequence[SamplingConfig], prompts: Sequence[Sequence[int]], vocab_size: int) -> Sampling:
        """One setting and one prompt (token ids) for each sequence."""
        seen = np.zeros((len(settings), vocab_size), bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[np.asarray(prompt)] = True

        def column(name: str, dtype: type) -> jax.Array:
            return jnp.array([getattr(one, name) for one in settings], dtype)

        top_k = column("top_k", jnp.int32)
        return cls(
            key=jax.vmap(jax.random.key)(jnp.array([one.seed for one in settings], jnp.uint32)),
            temperature=column("temperature", jnp.float32),
            top_k=jnp.where(top_k == 0, vocab_size, jnp.minimum(top_k, vocab_size)),
            top_p=column("top_p", jnp.float32),
            min_p=column("min_p", jnp.float32),
            penalty=column("repetition_penalty", jnp.float32),
            seen=jnp.asarray(seen),
            coupled=settings[0].coupled,
        )

    def with_committed(self, tokens: jax.Array, count: jax.Array) -> Sampling:
        """The same once the first `count` [B] of tokens [B, R] belong to the sequence."""
        return self.replace(seen=_mark(self.seen, tokens, jnp.arange(tokens.shape[1]) < count[:, None]))


def log_probs(logits: jax.Array, sampling: Sampling, seen: jax.Array) -> jax.Array:
    """The distribution that is sampled: float32 logits [B, R, V], tokens seen before each row [B, R, V] -> log p.

    At temperature 0 all of it lies on the best token.
    """
    return jax.nn.log_softmax(kept_logits(logits, sampling, seen), axis=-1)


def kept_logits(logits: jax.Array, sampling: Sampling, seen: jax.Array) -> jax.Array:
    """`log_probs` but for a number that all of a row share: -inf for tokens that are never drawn.

    In the order of Hugging Face: repetition penalty, temperature, top-k, top-p, min-p. Tokens tied with the last one
    kept are kept. No sum has an order that a compiler would choose, perhaps by the number of rows: `cumsum` is a scan
    that jax writes out.
    """

    def by_row(x: jax.Array) -> jax.Array:
        return x[:, None, None]

    penalty = by_row(sampling.penalty)
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen & (penalty != 1), penalised, logits)
    best = jnp.max(logits, axis=-1, keepdims=True)
    greedy = by_row(sampling.temperature) == 0
    scaled = (logits - best) / jnp.where(greedy, 1.0, by_row(sampling.temperature))
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    last = jnp.take_along_axis(ordered, by_row(sampling.top_k - 1), axis=-1)
    mass = jnp.where(ordered >= last, jnp.exp(ordered), 0.0)
    upto = jnp.cumsum(mass, axis=-1)
    # A token stays while the tokens before it hold less than top_p; the best always does. At 1 all stay, also those so
    # improbable that the rounded sum before them is 1.
    top_p = by_row(sampling.top_p)
    stays = (upto - mass < top_p * upto[..., -1:]) | (top_p == 1) | (ordered == 0)
    last = jnp.maximum(last, jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True))
    last = jnp.maximum(last, jnp.log(by_row(sampling.min_p)))
    kept = jnp.where(scaled >= last, scaled, -jnp.inf)
    return jnp.where(greedy, jnp.where(_is_first_best(logits), 0.0, -jnp.inf), kept)


def draw(
    log_p: jax.Array, sampling: Sampling, position: jax.Array, purpose: Purpose | jax.Array = Purpose.TOKEN
) -> jax.Array:
    """Tokens int32 [B, R] from log p [B, R, V] or `kept_logits`, each with the noise of its `position` [B, R]."""
    return jnp.argmax(log_p + gumbel(sampling, position, log_p.shape[2], purpose), axis=-1).astype(jnp.int32)


def gumbel(
    sampling: Sampling, position: jax.Array, vocab_size: int, purpose: Purpose | jax.Array = Purpose.TOKEN
) -> jax.Array:
    """Noise float32 [B, R, V] of positions [B, R]; `purpose` is one for all or [B, R]."""
    keys = noise_keys(sampling, position, purpose)
    return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,))))(keys)


def draw_draft(
    logits: jax.Array, sampling: Sampling, position: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A draft for `position` [B] from draft logits [B, V], after the round's rows so far -> token [B], log q [B, V].

    tokens: int32 [B, W], negative where there is none yet.
    """
    seen = _mark(sampling.seen, tokens, tokens >= 0)
    log_q = log_probs(logits[:, None], sampling, seen[:, None])
    if sampling.coupled:
        return draw(log_q, sampling, position[:, None])[:, 0], log_q[:, 0]
    # Noise of its own for each draft of a round: where a position is drafted again, how far that round drafts may have
    # come (through `draft_cost`) from the draft that was dropped, and a draft must not know why it is made.
    purpose = Purpose.DRAFT + len(Purpose) * jnp.sum(tokens[0] >= 0)
    return draw(log_q, sampling, position[:, None], purpose)[:, 0], log_q[:, 0]


def verifier_log_probs(logits: jax.Array, sampling: Sampling, before: jax.Array) -> jax.Array:
    """log p [B, R, V] of rows with logits [B, R, V]; before: int32 [B, R, A], a round's tokens up to and with each row.

    Negative where there is none.
    """
    return log_probs(logits, sampling, _seen(sampling, before))


def draw_coupled(logits: jax.Array, sampling: Sampling, before: jax.Array, position: jax.Array) -> jax.Array:
    """Tokens int32 [B, R] after such rows, each with the noise of its `position` [B, R]."""
    return draw(kept_logits(logits, sampling, _seen(sampling, before)), sampling, position)


def _seen(sampling: Sampling, before: jax.Array) -> jax.Array:
    """bool [B, R, V]: tokens that the sequence holds, or the round before each row."""
    return jax.vmap(lambda row: _mark(sampling.seen, row, row >= 0), in_axes=1, out_axes=1)(before)


def draw_verified(
    logits: jax.Array, sampling: Sampling, position: jax.Array, rows: jax.Array, log_q: jax.Array | None
) -> jax.Array:
    """The verifier's token after each row: logits [B, W, V] of `rows` int32 [B, W] (pending token, then drafts).

    Row r predicts position[b] + r. With rejection, log_q [B, W, V] is what row r + 1 was drawn from, and the verifier's
    token is the draft where it is accepted.
    """
    positions = position[:, None] + jnp.arange(rows.shape[1])
    if sampling.coupled:
        return draw_coupled(logits, sampling, _prefixes(rows), positions)
    log_p = verifier_log_probs(logits, sampling, _prefixes(rows))
    assert log_q is not None  # rejection keeps it
    draft = jnp.pad(rows[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return reject(log_p, log_q, draft[..., None], sampling, positions)


def reject(log_p: jax.Array, log_q: jax.Array, drafts: jax.Array, sampling: Sampling, position: jax.Array) -> jax.Array:
    """The verifier's token int32 [B, R] after rows with log p [B, R, V]: one of `drafts` int32 [B, R, C], or its own.

    The drafts after a row were drawn one after the other from q, none twice; negative where there is none. Each is
    accepted with probability min(1, p/q); a reject leaves the positive part of p - q to the next, whose q is without
    those before it (recursive rejection sampling, arXiv 2402.14160). In all it is p's distribution.
    """
    batch, rows, count = drafts.shape
    each = jnp.repeat(position, count, axis=1)
    purpose = Purpose.ACCEPT + len(Purpose) * jnp.tile(jnp.arange(count), rows)
    keys = noise_keys(sampling, each, jnp.broadcast_to(purpose, each.shape))
    luck = jax.vmap(jax.vmap(jax.random.uniform))(keys).reshape(batch, rows, count)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    chosen = jnp.full(drafts.shape[:2], -1, jnp.int32)
    rejected = jnp.zeros(drafts.shape[:2], bool)
    for index in range(count):
        draft = drafts[..., index]
        at = jnp.maximum(draft, 0)[..., None]
        ratio = (jnp.take_along_axis(p, at, -1) / jnp.take_along_axis(q, at, -1))[..., 0]
        accepted = luck[..., index] < ratio
        tried = (draft >= 0) & (chosen < 0)
        chosen = jnp.where(tried & accepted, draft, chosen)
        fails = (tried & ~accepted)[..., None]
        rest = jnp.maximum(p - q, 0.0)
        rest = jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, p)  # p and q are equal but for rounding
        without = jnp.where(jnp.arange(q.shape[-1]) == at, 0.0, q)
        p = jnp.where(fails, rest / jnp.sum(rest, axis=-1, keepdims=True), p)
        q = jnp.where(fails, without / jnp.sum(without, axis=-1, keepdims=True), q)
        rejected |= fails[..., 0]
    purpose = jnp.where(rejected, Purpose.RESIDUAL, Purpose.TOKEN)
    return jnp.where(chosen < 0, draw(jnp.log(p), sampling, position, purpose), chosen)


def noise_keys(sampling: Sampling, position: jax.Array, purpose: Purpose | jax.Array | int) -> jax.Array:
    """Keys [B, R] for positions [B, R]; `purpose` is one for all or [B, R]."""

    def one(key: jax.Array, at: jax.Array, purpose: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, at), purpose)

    each = jnp.broadcast_to(jnp.asarray(purpose, jnp.int32), position.shape)
    return jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)))(sampling.key, position, each)


def _prefixes(rows: jax.Array) -> jax.Array:
    """Rows [B, W] -> [B, W, W]: entry r holds rows 0 .. r, negative behind."""
    index = jnp.arange(rows.shape[1])
    return jnp.where(index[None, :] <= index[:, None], rows[:, None], -1)


def _mark(seen: jax.Array, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """seen [B, V] with tokens [B, R] set where `valid`."""
    batch = jnp.arange(seen.shape[0])[:, None]
    return seen.at[batch, jnp.where(valid, tokens, seen.shape[1])].set(True, mode="drop")


def _is_first_best(logits: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1)[..., None]
