"""Prefill: run prompts through the model and set up the decode state.

Prompts are padded on the right to a bucket so that a stream of prompts compiles a handful of shapes; padded rows lie
behind the prompt, where the causal mask hides them and decoding overwrites them. Long prompts go through in chunks,
each over the caches that the chunks before it filled: the workspace then grows with the prompt, not with its square.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dvi_jax.decode import vocabulary
from dvi_jax.decode.sampling import Sampling, draw, kept_logits
from dvi_jax.decode.state import STATE_SPECS, DecodeState, Signals
from dvi_jax.mesh import COPIED_CACHES, ROWS, WHOLE
from dvi_jax.model.attention import Caches
from dvi_jax.model.drafters import Committed
from dvi_jax.model.features import Features
from dvi_jax.model.products import has_gpu_kernels
from dvi_jax.model.speculative_llama import Definition, Params, SpeculativeLlama, join

# Tokens of a prompt that go through at once. Enough that products are bound by arithmetic, not by reading weights: on
# two CPU cores (SmolLM2's layers) 128 to 1024 take equal times; 1024 rows of a 7B model's smallest product are 128
# tiles, one wave of an H100. Where attention writes its scores to memory, they take heads * chunk * slots * 4 bytes,
# hence the lower number. A batch beyond 4 has shorter chunks.
LONGEST_CHUNK, LONGEST_CUDNN_CHUNK = 1024, 4096
SMALLEST_CHUNK = 128


class Filled(NamedTuple):
    """How far a prefill has come. All rows are filled up to the same position, the padding of short ones included."""

    position: jax.Array  # int32 scalar, slots filled
    tokens: jax.Array  # int32 [B, S]
    shallow: Caches
    deep: Caches
    trunk: Caches  # the draft pass's own, with a separate trunk, else ()
    drafter: Any  # the drafter's state
    frontier: Features  # [B, 1, ...], of the last filled slot; zeros at first
    hidden: jax.Array  # [B, 1, D], exit hidden state of the prompt's last token, as the drafter sees it
    features: Features  # [B, 1, ...], of that token
    kept: Features | None  # [B, S, ...], of every position, where they are kept

    @classmethod
    def empty(cls, model: SpeculativeLlama, batch: int, slots: int, *, keep: bool) -> Filled:
        """Nothing filled; `keep` the features of every position."""
        llama = model.llama
        shallow, deep = llama.init_caches(batch, slots)
        width, taps = llama.config.hidden_size, len(llama.taps)
        row = Features.zeros((batch, 1, width), taps, llama.dtype)
        return cls(
            position=jnp.int32(0),
            tokens=jnp.zeros((batch, slots), jnp.int32),
            shallow=shallow,
            deep=deep,
            trunk=llama.init_caches(batch, slots)[0] if model.separate_trunk else (),
            drafter=model.drafter.init_state(batch, slots, llama.dtype),
            frontier=row,
            hidden=row.final,
            features=row,
            kept=Features.zeros((batch, slots, width), taps, llama.dtype) if keep else None,
        )


# Where what was filled of a prefix lies on a mesh: at batch 1, on all devices along `data`.
_SPECS: dict[str, Any] = dict.fromkeys(Filled._fields, WHOLE)
PREFIX_SPECS = Filled(**_SPECS | dict.fromkeys(("shallow", "deep", "trunk"), COPIED_CACHES))


def bucket(size: int) -> int:
    """The padded size for `size`: on a CPU 16, 24, 32, 48, 64, 96, ..., so that padding wastes at most a third.

    On accelerators powers of two from 64 on: there a program takes seconds to compile and padding milliseconds.
    """
    accelerated = jax.default_backend() != "cpu"
    step = 64 if accelerated else 16
    while True:
        if size <= step:
            return step
        if size <= step * 3 // 2 and not accelerated:
            return step * 3 // 2
        step *= 2


def cache_slots(longest: int) -> int:
    """Slots of a cache for sequences of `longest` tokens: a power of two from 128 on, so few programs serve all."""
    return max(128, 1 << (longest - 1).bit_length())


def chunk_tokens(batch: int, dtype: jnp.dtype) -> int:
    """The most tokens of each prompt that go through the model at once."""
    longest = chunk = LONGEST_CUDNN_CHUNK if has_gpu_kernels(dtype) else LONGEST_CHUNK
    while chunk * batch > 4 * longest and chunk > SMALLEST_CHUNK:
        chunk //= 2
    return chunk


@partial(jax.jit, static_argnames=("definition", "slots", "width", "record", "branches"))
def prefill(
    definition: Definition,
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    limit: jax.Array,
    eos_ids: jax.Array,
    *,
    slots: int,
    width: int,
    record: bool = False,
    branches: int = 0,
    sampling: Sampling | None = None,
    prefix: Filled | None = None,
) -> DecodeState:
    """Prompts int32 [B, T], right-padded to a bucket, of `lengths` [B] -> state with the first new token committed.

    `limit` [B]: prompt plus new tokens; `slots` >= max(limit) + width. `record` keeps learning signals, of drafts
    not taken too where `branches`, the most of a position, is above 0. With a `prefix` of P tokens (`prefix.py`),
    `prompts` holds what follows it, `lengths` counts it, and `slots` >= P + T.
    """

    def whole(
        params: Params,
        prompts: jax.Array,
        lengths: jax.Array,
        limit: jax.Array,
        eos_ids: jax.Array,
        sampling: Sampling | None,
        prefix: Filled | None,
    ) -> DecodeState:
        model = join(definition, params)
        filled = Filled.empty(model, prompts.shape[0], slots, keep=record)
        if prefix is not None:
            filled = lay(filled, prefix)
        filled = fill(model, filled, prompts, lengths, fresh=prefix is None)
        first_token = choose_first(model, filled, sampling, lengths)
        return begin(filled, first_token, lengths, limit, eos_ids, width, sampling, branches)

    of_eos = ROWS if eos_ids.ndim == 2 else WHOLE
    specs = ROWS, ROWS, ROWS, of_eos, ROWS, None if prefix is None else PREFIX_SPECS
    run = definition.sharded(whole, params, specs, STATE_SPECS)
    return run(params, prompts, lengths, limit, eos_ids, sampling, prefix)


def choose_first(model: SpeculativeLlama, filled: Filled, sampling: Sampling | None, lengths: jax.Array) -> jax.Array:
    """The first new token int32 [B], after the prompts' last rows."""
    llama = model.llama
    logits = llama.logits(filled.features.final)
    if sampling is None:
        return vocabulary.best(logits, llama.shards)[:, 0]
    kept = kept_logits(llama.all_logits(logits), sampling, sampling.seen[:, None])
    return draw(kept, sampling, lengths[:, None])[:, 0]


def lay(filled: Filled, prefix: Filled) -> Filled:
    """`filled`, still empty, with a prefix of batch 1 in the front of every row."""

    def front(empty: jax.Array, rows: jax.Array) -> jax.Array:
        if not rows.ndim:
            return rows
        rows = jnp.broadcast_to(rows, (empty.shape[0], *rows.shape[1:]))
        return jax.lax.dynamic_update_slice(empty, rows, (0,) * rows.ndim)

    return jax.tree.map(front, filled, prefix._replace(kept=None) if filled.kept is None else prefix)


def fill(model: SpeculativeLlama, filled: Filled, prompts: jax.Array, lengths: jax.Array, *, fresh: bool) -> Filled:
    """Take in `prompts` int32 [B, T] behind what is filled. `lengths` [B] of the whole prompts; `fresh`: nothing is."""
    batch, tokens = prompts.shape
    pieces = -(-tokens // chunk_tokens(batch, model.llama.dtype))
    if pieces == 1:
        return fill_chunk(model, filled, prompts, lengths, fresh=fresh)
    if tokens % pieces:
        raise ValueError(f"prompts of {tokens} tokens do not divide into {pieces} chunks: pad them to a bucket")
    size = tokens // pieces
    needed = (jnp.max(lengths) - filled.position + size - 1) // size  # chunks of padding alone are left out

    def step(index: jax.Array, filled: Filled) -> Filled:
        chunk = jax.lax.dynamic_slice_in_dim(prompts, index * size, size, axis=1)
        return fill_chunk(model, filled, chunk, lengths, fresh=False)

    return jax.lax.fori_loop(0, jnp.minimum(needed, pieces), step, filled)


def fill_chunk(
    model: SpeculativeLlama, filled: Filled, tokens: jax.Array, lengths: jax.Array, *, fresh: bool
) -> Filled:
    """Tokens int32 [B, T] through the whole model. `fresh`: they are the first, and see each other alone."""
    llama, count = model.llama, tokens.shape[1]
    positions = jnp.broadcast_to(filled.position + jnp.arange(count), tokens.shape)
    hidden, tapped, shallow = llama.shallow(tokens, filled.shallow, positions, fresh=fresh)
    final, tapped_deep, deep = llama.deep(hidden, filled.deep, positions, fresh=fresh)
    features = Features.of(final, tapped + tapped_deep)
    trunk = filled.trunk
    if model.separate_trunk:
        hidden, _, trunk = llama.shallow(tokens, trunk, positions, fresh=fresh, adapted=True)
    before = jax.tree.map(lambda x, y: jnp.concatenate([x, y[:, :-1]], axis=1), filled.frontier, features)
    kept = filled.kept
    if kept is not None:
        kept = jax.tree.map(lambda x, y: _write(x, y, filled.position), kept, features)
    last = lengths - 1 - filled.position
    return Filled(
        position=filled.position + count,
        tokens=_write(filled.tokens, tokens, filled.position),
        shallow=shallow,
        deep=deep,
        trunk=trunk,
        drafter=model.drafter.prefill(filled.drafter, hidden, before, positions),
        frontier=jax.tree.map(lambda x: x[:, -1:], features),
        hidden=_pick(hidden, last, filled.hidden),
        features=jax.tree.map(lambda x, y: _pick(x, last, y), features, filled.features),
        kept=kept,
    )


def _write(buffer: jax.Array, rows: jax.Array, position: jax.Array) -> jax.Array:
    """buffer [B, S, ...] with rows [B, T, ...] from `position` on."""
    return jax.lax.dynamic_update_slice_in_dim(buffer, rows, position, axis=1)


def _pick(rows: jax.Array, index: jax.Array, otherwise: jax.Array) -> jax.Array:
    """rows [B, T, ...] at index [B] -> [B, 1, ...]; `otherwise` where it lies outside."""
    inside = (index >= 0) & (index < rows.shape[1])

    def by_sequence(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *[1] * (rows.ndim - 1))

    picked = jnp.take_along_axis(rows, by_sequence(jnp.clip(index, 0, rows.shape[1] - 1)), axis=1)
    return jnp.where(by_sequence(inside), picked, otherwise)


def begin(
    filled: Filled,
    first_token: jax.Array,
    lengths: jax.Array,
    limit: jax.Array,
    eos_ids: jax.Array,
    width: int,
    sampling: Sampling | None,
    branches: int = 0,
) -> DecodeState:
    """The state before the first round, the prompts' last rows standing for the round before it.

    `eos_ids`: int32 [E], or [B, E] where each sequence has its own. `branches`: of a position, to be kept.
    """
    batch, slots = filled.tokens.shape

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, width - 1), *[(0, 0)] * (x.ndim - 2)))

    counts = jnp.zeros((batch, slots), jnp.int32)
    one = jnp.ones_like(lengths)
    return DecodeState(
        tokens=filled.tokens.at[jnp.arange(batch), lengths].set(first_token),
        length=lengths + 1,
        limit=limit,
        done=(lengths + 1 >= limit) | jnp.any(first_token[:, None] == eos_ids, axis=-1),
        shallow=filled.shallow,
        deep=filled.deep,
        trunk=filled.trunk,
        drafter=filled.drafter,
        committed=Committed(padded(filled.hidden), jax.tree.map(padded, filled.features), lengths - 1, one),
        rounds=jnp.int32(0),
        accept_lengths=counts,
        drafted=counts,
        signals=None if filled.kept is None else _prompt_signals(filled.kept, branches),
        sampling=sampling and sampling.with_committed(first_token[:, None], one),
    )


def _prompt_signals(features: Features, branches: int) -> Signals:
    """The verifier's features over the prompt, [B, S, ...]: the row at p - 1 predicts position p."""

    def later(x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x).at[:, 1:].set(x[:, :-1])

    return Signals.without_judgement(jax.tree.map(later, features), branches)
