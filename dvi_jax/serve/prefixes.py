"""What prompts share is taken in once: whole chunks of their beginnings are kept, least recently used ones dropped.

A chunk is computed by one program from the chunks before it, so one that is laid back has the very bits that computing
it again would give. A chunk is known by its tokens and all tokens before it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dvi_jax.decode.prefill import Filled
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import Definition, Params, join
from dvi_jax.serve.places import written_into


class Block(NamedTuple):
    """All that the model made of a chunk."""

    rows: dict[str, Any]  # `Filled`'s fields that a chunk adds to, the chunk's positions of them
    frontier: Features  # [1, 1, ...], of its last token


class Prefixes:
    """Blocks on the device, at most so many bytes of them."""

    def __init__(self, chunk: int, budget: int):
        """`chunk`: tokens of a block. `budget`: bytes; 0 keeps nothing."""
        self._chunk, self.budget = chunk, budget
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()  # least recently used first
        self.bytes = 0

    def names(self, prompt: Sequence[int]) -> list[bytes]:
        """Names of the prompt's blocks, first to last. The last token's is none: it is always computed."""
        count = (len(prompt) - 1) // self._chunk if self.budget else 0
        names, digest = [], hashlib.sha256()
        for ids in np.array(prompt[: count * self._chunk], np.int32).reshape(count, self._chunk):
            digest.update(ids.tobytes())
            names.append(digest.digest())
        return names

    def find(self, names: Sequence[bytes]) -> list[Block]:
        """The blocks that are kept, up to the first that is not."""
        found = []
        for name in names:
            if name not in self._blocks:
                break
            found.append(self._blocks[name])
        # A block is of no use without those before it: they must not be dropped first.
        for name in reversed(names[: len(found)]):
            self._blocks.move_to_end(name)
        return found

    def keep(self, name: bytes, block: Block) -> None:
        """Keep one more, dropping old ones; blocks of a prompt come in order."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(block))
        if name in self._blocks or size > self.budget:
            return
        while self.bytes + size > self.budget:
            _, dropped = self._blocks.popitem(last=False)
            self.bytes -= sum(leaf.nbytes for leaf in jax.tree.leaves(dropped))
        self._blocks[name] = block
        self.bytes += size


Axes = tuple[int | None, ...]


def position_axes(definition: Definition, params: Params, *, record: bool) -> Axes:
    """Which axis of each of `Filled`'s arrays counts positions, None where none does; in the order of its leaves."""

    def shapes(positions: int) -> list[jax.ShapeDtypeStruct]:
        empty = jax.eval_shape(lambda p: Filled.empty(join(definition, p), 1, positions, keep=record), params)
        return jax.tree.leaves(_rows(empty))

    pairs = zip(shapes(1024), shapes(2048), strict=True)
    return tuple(
        next((axis for axis, sizes in enumerate(zip(few.shape, many.shape, strict=True)) if sizes[0] != sizes[1]), None)
        for few, many in pairs
    )


@partial(jax.jit, static_argnames=("axes", "chunk"))
def cut_block(filled: Filled, axes: Axes, chunk: int) -> Block:
    """The chunk that was taken in last."""
    leaves, tree = jax.tree.flatten(_rows(filled))
    start = filled.position - chunk
    cut = [
        leaf if axis is None else jax.lax.dynamic_slice_in_dim(leaf, start, chunk, axis)
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    return Block(jax.tree.unflatten(tree, cut), filled.frontier)


def put_block(filled: Filled, block: Block, axes: Axes, start: np.int32) -> Filled:
    """The chunk from position `start` on from what is kept of it: as if it had been taken in."""
    changed = _rows(filled), filled.frontier, filled.position
    rows, frontier, position = _put(changed, block, axes, start)
    return filled._replace(**rows, frontier=frontier, position=position)


@partial(jax.jit, static_argnames="axes", donate_argnames="changed")
def _put(
    changed: tuple[dict[str, Any], Features, jax.Array], block: Block, axes: Axes, start: jax.Array
) -> tuple[dict[str, Any], Features, jax.Array]:
    """`_rows`, the frontier and the position of prompts, with a block from position `start` on."""
    rows, frontier, position = changed
    leaves, tree = jax.tree.flatten(rows)
    put = [
        written_into(leaf, new) if axis is None else jax.lax.dynamic_update_slice_in_dim(leaf, new, start, axis)
        for leaf, new, axis in zip(leaves, jax.tree.leaves(block.rows), axes, strict=True)
    ]
    frontier = jax.tree.map(written_into, frontier, block.frontier)
    behind = start + block.rows["tokens"].shape[1]
    return jax.tree.unflatten(tree, put), frontier, written_into(position, behind)


def _rows(filled: Filled) -> dict[str, Any]:
    """What a chunk adds to: all but the place, and the rows of the last token, which is always computed."""
    names = ("tokens", "shallow", "deep", "trunk", "drafter", "kept")
    return {name: getattr(filled, name) for name in names}
