"""Acceptance: which of a round's rows are committed. Letters: B batch, W rows of a round."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Verdict(NamedTuple):
    """What the verifier made of a round's drafts."""

    accept_length: jax.Array  # int32 [B], tokens to commit: accepted drafts and the verifier's own
    stopped: jax.Array  # bool [B], the last committed token ends the sequence
    judged: jax.Array  # bool [B, W], row i's draft was compared: all up to and with the first reject
    correct: jax.Array  # bool [B, W], row i's draft equals the verifier's token


def accept(verified: jax.Array, drafts: jax.Array, count: jax.Array, eos_ids: jax.Array) -> Verdict:
    """Kangaroo's rule: a draft is accepted where it is the verifier's token, however that was chosen.

    verified: int32 [B, W], the verifier's token after each row. drafts: int32 [B, W], the token drafted after each
    row, of which the first `count` [B] are real. Commit up to and with the first row that is the last one, or whose
    verified token ends the sequence, or differs from the draft.
    """
    row = jnp.arange(verified.shape[1])
    is_draft = row < count[:, None]
    correct = (verified == drafts) & is_draft
    ends = jnp.isin(verified, eos_ids)
    last = jnp.argmax(~correct | ends, axis=1)  # row `count` is never correct, so one is always found
    stopped = jnp.take_along_axis(ends, last[:, None], axis=1)[:, 0]
    return Verdict(last + 1, stopped, is_draft & (row <= last[:, None]), correct)
