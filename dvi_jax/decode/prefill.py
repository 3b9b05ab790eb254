"""Prefill: run whole prompts through the model once and set up the decode state.

Prompts are padded on the right to a bucket so that a stream of prompts compiles a handful of shapes; padded rows lie
behind the prompt, where the causal mask hides them and decoding overwrites them.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from dvi_jax.decode.state import DecodeState, Signals
from dvi_jax.model.drafters import Committed
from dvi_jax.model.speculative_llama import Params, SpeculativeLlama, join


def bucket(size: int) -> int:
    """The padded size for `size`: 16, 24, 32, 48, 64, 96, ... so that padding wastes at most a third."""
    step = 16
    while True:
        if size <= step:
            return step
        if size <= step * 3 // 2:
            return step * 3 // 2
        step *= 2


@partial(jax.jit, static_argnames=("graphdef", "slots", "width", "record"))
def prefill(
    graphdef: nnx.GraphDef,
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    limit: jax.Array,
    eos_ids: jax.Array,
    *,
    slots: int,
    width: int,
    record: bool = False,
) -> DecodeState:
    """Prompts int32 [B, T], right-padded, of `lengths` [B] -> state with the first new token committed.

    `limit` [B]: prompt plus new tokens; `slots` >= max(limit) + width. `record` keeps learning signals.
    """
    model = join(graphdef, params)
    llama, (batch, tokens) = model.llama, prompts.shape
    positions = jnp.broadcast_to(jnp.arange(tokens), prompts.shape)
    shallow, deep = llama.init_caches(batch, slots)
    hidden, shallow = llama.shallow(prompts, shallow, positions, fresh=True)
    normed, deep = llama.deep(hidden, deep, positions, fresh=True)
    last = (lengths - 1)[:, None, None]
    first_token = jnp.argmax(llama.logits(jnp.take_along_axis(normed, last, axis=1)), axis=-1)[:, 0].astype(jnp.int32)

    draft_hidden, trunk = _draft_trunk(model, prompts, positions, hidden, slots)
    drafter = model.drafter.init_state(batch, slots, llama.dtype)
    drafter = model.drafter.prefill(drafter, draft_hidden, normed, positions)
    previous = Committed(
        _pad_rows(jnp.take_along_axis(draft_hidden, last, axis=1), width),
        _pad_rows(jnp.take_along_axis(normed, last, axis=1), width),
        lengths - 1,
        jnp.ones_like(lengths),
    )
    sequence = jnp.zeros((batch, slots), jnp.int32).at[:, :tokens].set(prompts)
    sequence = sequence.at[jnp.arange(batch), lengths].set(first_token)
    counts = jnp.zeros((batch, slots), jnp.int32)
    return DecodeState(
        tokens=sequence,
        length=lengths + 1,
        limit=limit,
        done=(lengths + 1 >= limit) | jnp.isin(first_token, eos_ids),
        shallow=shallow,
        deep=deep,
        trunk=trunk,
        drafter=drafter,
        previous=previous,
        rounds=jnp.int32(0),
        accept_lengths=counts,
        drafted=counts,
        signals=_prompt_signals(normed, slots) if record else None,
    )


def _draft_trunk(
    model: SpeculativeLlama, prompts: jax.Array, positions: jax.Array, hidden: jax.Array, slots: int
) -> tuple[jax.Array, tuple]:
    """Exit hidden state as the drafter sees it, and the separate trunk's caches (`()` when the trunk is shared)."""
    if not model.separate_trunk:
        return hidden, ()
    caches, _ = model.llama.init_caches(prompts.shape[0], slots)
    return model.llama.shallow(prompts, caches, positions, fresh=True, adapted=True)


def _pad_rows(row: jax.Array, width: int) -> jax.Array:
    return jnp.pad(row, ((0, 0), (0, width - 1), (0, 0)))


def _prompt_signals(normed: jax.Array, slots: int) -> Signals:
    """The verifier's hidden state over the prompt; the row at p - 1 predicts position p."""
    signals = Signals.empty(normed.shape[0], slots, normed.shape[2], normed.dtype)
    room = min(normed.shape[1], slots - 1)
    return signals.replace(verifier_hidden=signals.verifier_hidden.at[:, 1 : room + 1].set(normed[:, :room]))
