"""The end of a round: which rows are accepted, and what a generation is once they are committed.

Letters: B batch, W rows of a round (of a tree: of its accepted path), D hidden.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from dvi_jax.decode.branches import NO_BRANCH, Branches
from dvi_jax.decode.state import NO_TOKEN, DecodeState, Signals
from dvi_jax.model.drafters import Committed
from dvi_jax.model.features import Features

Tree = TypeVar("Tree")


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
    verified token ends the sequence, or differs from the draft. `eos_ids`: int32 [E], or [B, E] where each sequence has
    its own.
    """
    row = jnp.arange(verified.shape[1])
    is_draft = row < count[:, None]
    correct = (verified == drafts) & is_draft
    # One after the other: of a reduction XLA would make a kernel by itself.
    ends = reduce(jnp.logical_or, (verified == eos_ids[..., i, None] for i in range(eos_ids.shape[-1])))
    last = jnp.argmax(~correct | ends, axis=1)  # row `count` is never correct, so one is always found
    stopped = jnp.take_along_axis(ends, last[:, None], axis=1)[:, 0]
    return Verdict(last + 1, stopped, is_draft & (row <= last[:, None]), correct)


def commit(
    state: DecodeState,
    drafted: jax.Array,
    verified: jax.Array,
    hidden: jax.Array,
    features: Features,
    verdict: Verdict,
    signals: Signals | None,
) -> DecodeState:
    """Append the accepted tokens and move the lengths; finished sequences stay as they are. `drafted`: int32 [B]."""
    width = state.committed.hidden.shape[1]
    accepted = jnp.where(state.done, 0, verdict.accept_length)
    length = state.length + accepted

    def counted(counts: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(counts, new[:, None], state.rounds, axis=1)

    def widened(rows: jax.Array) -> jax.Array:
        return jnp.pad(rows, ((0, 0), (0, width - rows.shape[1]), *[(0, 0)] * (rows.ndim - 2)))

    return state.replace(
        tokens=_write(state.tokens, verified, state.length),
        length=length,
        done=state.done | verdict.stopped | (length >= state.limit),
        committed=Committed(widened(hidden), jax.tree.map(widened, features), state.length - 1, accepted),
        rounds=state.rounds + 1,
        accept_lengths=counted(state.accept_lengths, accepted),
        drafted=counted(state.drafted, drafted),
        signals=signals,
        sampling=None if state.sampling is None else state.sampling.with_committed(verified, accepted),
    )


def record(
    signals: Signals,
    state: DecodeState,
    proposals: jax.Array,
    features: Features,
    verdict: Verdict,
    branches: Branches | None,
) -> Signals:
    """Write the round's signals at the positions its rows predict; later rounds overwrite what was not committed.

    `branches` [B, W, K]: of those behind row i, which predict the position after the one that row i predicts.
    """
    if proposals.shape[1] == 1 and branches is None:  # no draft, and beyond what is committed nothing was ever judged
        step = _write(signals.step, jnp.zeros_like(signals.step[:, :1]), state.length)
        return signals.replace(features=_write_each(signals.features, features, state.length), step=step)
    judged = verdict.judged & ~state.done[:, None]
    reward = jnp.where(judged, verdict.correct, -1).astype(jnp.int8)
    step = jnp.broadcast_to(jnp.arange(reward.shape[1], dtype=jnp.int8), reward.shape)
    new = Signals(jnp.where(judged, proposals, NO_TOKEN), reward, step, features)
    kept, signals = signals.branches, signals.replace(branches=None)
    signals = _write_each(signals, new, state.length)
    if kept is None or branches is None:
        return signals
    tokens = jnp.where(state.done[:, None, None], NO_BRANCH, branches.tokens)
    branches = branches.replace(tokens=tokens)
    # The next round writes from the first position on that this one said nothing certain of.
    return signals.replace(branches=_write_each(kept, branches, state.length + 1))


def _write_each(buffers: Tree, rows: Tree, start: jax.Array) -> Tree:
    """`_write` of every array of a tree."""
    return jax.tree.map(lambda buffer, new: _write(buffer, new, start), buffers, rows)


def _write(buffer: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """buffer [B, S, ...] with rows [B, W, ...] written at start[b]."""

    def one(b: jax.Array, r: jax.Array, s: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(b, r, s, axis=0)

    return jax.vmap(one)(buffer, rows, start)
