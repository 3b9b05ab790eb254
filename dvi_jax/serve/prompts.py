"""The device's side of prompts on their way in: programs that take them in by chunks and lay them into slots.

Most are one chunk, and starting a program costs the host about what the device needs for a chunk. So that is one
program, which takes the prompt in where it is to lie (`take_whole`). If its first token is to be drawn, a small one
does it afterwards (`draw_first`). Longer prompts, and several that go in side by side, are taken in apart
(`take_chunk`), and each is laid when a slot is free (`lay`). Letters as in `slots.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.decode.prefill import PREFIX_SPECS, Filled, fill_chunk
from dvi_jax.decode.state import COPIED_SPECS, DecodeState
from dvi_jax.mesh import WHOLE
from dvi_jax.model import placed_cache
from dvi_jax.model.speculative_llama import Definition, Params, join
from dvi_jax.serve.places import written_into
from dvi_jax.serve.slots import TERM_COLUMNS, Slots, Terms, begin_slots

CACHES = ("shallow", "deep", "trunk")  # of a `DecodeState` and of a `Filled`


@partial(jax.jit, static_argnames=("definition", "rows", "room", "record"))
def empty_prompts(definition: Definition, params: Params, *, rows: int, room: int, record: bool) -> Filled:
    """Where so many prompts together are taken in."""

    def make(params: Params) -> Filled:
        return Filled.empty(join(definition, params), rows, room, keep=record)

    return definition.sharded(make, params, (), PREFIX_SPECS)(params)


@partial(jax.jit, static_argnames="definition", donate_argnames="filled")
def take_chunk(definition: Definition, params: Params, filled: Filled, chunk: jax.Array) -> Filled:
    """The next tokens of prompts, as `packed_chunk` has them.

    Where none were taken in before, other prompts begin. What the last ones left lies behind them, masked.
    """

    def take(params: Params, filled: Filled, chunk: jax.Array) -> Filled:
        length, position, tokens = chunk[:, 0], chunk[0, 1], chunk[:, 2:]
        frontier = jax.tree.map(lambda x: jnp.where(position > 0, x, jnp.zeros_like(x)), filled.frontier)
        before, filled = filled, filled._replace(position=position, frontier=frontier)
        filled = fill_chunk(join(definition, params), filled, tokens, length, fresh=False)
        new, old = ((each.position, each.frontier, each.hidden, each.features) for each in (filled, before))
        position, frontier, hidden, features = jax.tree.map(written_into, old, new)
        return filled._replace(position=position, frontier=frontier, hidden=hidden, features=features)

    run = definition.sharded(take, params, (PREFIX_SPECS, WHOLE), PREFIX_SPECS)
    return run(params, filled, chunk)


def packed_chunk(tokens: np.ndarray, lengths: np.ndarray, position: int) -> np.ndarray:
    """All in one array int32 [P, 2 + C], which costs one copy to the device.

    `tokens` int32 [P, C], zeros behind a prompt's end; `lengths` int32 [P] of the whole prompts; `position`: tokens of
    each that were taken in before.
    """
    return np.column_stack([lengths, np.full_like(lengths, position), tokens])


def packed_places(places: np.ndarray, terms: np.ndarray, count: int) -> tuple[np.ndarray, bool]:
    """`placed` and `alone` of `lay`, for prompts with `terms` into `places` int32 [P] of so many slots."""
    return np.column_stack([places, terms]), int(np.sum(places < count)) == 1


@partial(jax.jit, static_argnames=("definition", "sampled", "alone"), donate_argnames="slots")
def lay(
    definition: Definition,
    params: Params,
    slots: Slots,
    filled: Filled,
    placed: jax.Array,
    *,
    sampled: bool,
    alone: bool,
) -> Slots:
    """Prompts that are all taken in, with their first new tokens, into slots.

    `placed` int32 [P, 1 + TERM_COLUMNS]: the slot of each, B or above for none and no number twice, and its
    `Terms.packed`. `sampled`: as of `run_stretch`. `alone`: one of them has a slot, and that one alone is copied.
    """
    places, terms = placed[:, 0], placed[:, 1:]
    width = slots.decode.committed.hidden.shape[1]
    signals = slots.decode.signals
    branches = 0 if signals is None else signals.most_branches

    (state, eos_ids), first_token = _begun(definition, params, filled, terms, width, branches, sampled=sampled)

    def put(buffer: jax.Array, new: jax.Array) -> jax.Array:
        if not buffer.ndim:
            return buffer
        if alone:  # a slice is cheaper than a scatter
            row = jnp.argmin(places)
            return _put_row(buffer, jax.lax.dynamic_slice_in_dim(new, row, 1), places[row])
        return buffer.at[places].set(new, mode="drop", unique_indices=True)

    decode, ids = jax.tree.map(put, (slots.decode, slots.eos_ids), (state, eos_ids))
    first = written_into(slots.first, definition.on_all(_told(first_token, state)))
    return slots._replace(decode=decode, eos_ids=ids, first=first)


def _begun(
    definition: Definition,
    params: Params,
    filled: Filled,
    terms: jax.Array,
    width: int,
    branches: int,
    *,
    sampled: bool,
) -> tuple[tuple[DecodeState, jax.Array], jax.Array]:
    """What `begin_slots` makes of prompts on terms int32 [P, TERM_COLUMNS], on all devices."""

    def begin_rows(params: Params, filled: Filled, terms: jax.Array) -> tuple[tuple[DecodeState, jax.Array], jax.Array]:
        model = join(definition, params)
        return begin_slots(model, filled, Terms.unpacked(terms), width, branches, sampled=sampled)

    run = definition.sharded(begin_rows, params, (PREFIX_SPECS, WHOLE), ((COPIED_SPECS, WHOLE), WHOLE))
    return run(params, filled, terms)


def _put_row(buffer: jax.Array, row: jax.Array, place: jax.Array) -> jax.Array:
    """buffer [B, ...] with row [1, ...] at `place`; what belongs to no sequence stays."""
    if not buffer.ndim:
        return buffer
    return jax.lax.dynamic_update_slice_in_dim(buffer, row, place, axis=0)


def _told(first_token: jax.Array, rows: DecodeState) -> jax.Array:
    """int32 [P, 2] as in `Slots.first`."""
    return jnp.stack([first_token, rows.done.astype(jnp.int32)], axis=1)


@partial(jax.jit, static_argnames="definition", donate_argnames="slots")
def take_whole(definition: Definition, params: Params, slots: Slots, whole: jax.Array) -> Slots:
    """A prompt that is one chunk, taken in where it is to lie: its keys and values are written into its slot's rows.

    On a single device. `whole`: as `packed_whole` has it. The first token, in `Slots.first`, is the best one.
    """
    placed, chunk = jnp.split(whole, [1 + TERM_COLUMNS], axis=1)
    place, terms, held = placed[:, 0], Terms.unpacked(placed[:, 1:]), slots.decode
    width, room = held.committed.hidden.shape[1], held.tokens.shape[1]
    branches = 0 if held.signals is None else held.signals.most_branches
    model = join(definition, params)

    in_place: dict[str, Any] = {name: placed_cache.placed(getattr(held, name), place) for name in CACHES}
    empty = Filled.empty(model, 1, room, keep=held.signals is not None)._replace(**in_place)
    filled = fill_chunk(model, empty, chunk[:, 2:], chunk[:, 0], fresh=False)
    (row, eos_ids), first_token = begin_slots(model, filled, terms, width, branches, sampled=False)

    caches = {name: placed_cache.all_of(getattr(row, name)) for name in CACHES}
    without = dict.fromkeys(CACHES, ())
    put = partial(_put_row, place=place[0])
    decode = jax.tree.map(put, held.replace(**without), row.replace(**without)).replace(**caches)
    first = written_into(slots.first, _told(first_token, row))
    return slots._replace(decode=decode, eos_ids=put(slots.eos_ids, eos_ids), first=first)


def draw_first(definition: Definition, params: Params, slots: Slots, placed: jax.Array | np.ndarray) -> Slots:
    """Another first token for the prompt that was laid last, drawn on its terms, also in `Slots.first`.

    On a single device. `placed`: as of `lay`. A program of its own, since one for drawn tokens beside each that takes a
    prompt in would double what XLA compiles.
    """
    # No more than the program needs: the host pays for every array that one is given.
    state = slots.decode
    changed = state.tokens, state.done, state.sampling
    final, width = state.committed.features.final, state.committed.hidden.shape[1]
    (tokens, done, sampling), first = _drawn(definition, params, changed, slots.first, final, placed, width=width)
    return slots._replace(decode=state.replace(tokens=tokens, done=done, sampling=sampling), first=first)


@partial(jax.jit, static_argnames=("definition", "width"), donate_argnames=("changed", "first"))
def _drawn(
    definition: Definition,
    params: Params,
    changed: tuple[jax.Array, jax.Array, Any],
    first: jax.Array,
    final: jax.Array,
    placed: jax.Array,
    *,
    width: int,
) -> tuple[tuple[jax.Array, jax.Array, Any], jax.Array]:
    """All slots' tokens, and what else a first token changes, with that of the prompt; and it, as `Slots.first`.

    `final` [B, W, D]: of all slots' last rows, where that of a prompt just laid is its own last one.
    """
    model, place, terms = join(definition, params), placed[0, 0], Terms.unpacked(placed[:, 1:])
    tokens, last = (jax.lax.dynamic_slice_in_dim(x, place, 1) for x in (changed[0], final))
    nothing = Filled.empty(model, 1, tokens.shape[1], keep=False)
    features = nothing.features._replace(final=last[:, :1])
    filled = nothing._replace(tokens=tokens, features=features, shallow=(), deep=(), trunk=(), drafter=())
    (row, _), first_token = begin_slots(model, filled, terms, width, 0, sampled=True)
    changed = jax.tree.map(partial(_put_row, place=place), changed, (row.tokens, row.done, row.sampling))
    return changed, written_into(first, _told(first_token, row))


def packed_whole(tokens: np.ndarray, places: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """All in one array int32 [1, 1 + TERM_COLUMNS + 2 + C]: `placed` of `lay`, and what `packed_chunk` gives."""
    return np.column_stack([places, terms, packed_chunk(tokens, terms[:, 0], 0)])
