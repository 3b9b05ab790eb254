"""Attention of the nodes of a token tree, each over the committed cache and its own ancestors.

A node's keys and values are not written into the cache: two nodes of one depth would want the same slot. They are kept
beside it, by node, and every row reads its ancestors as if they lay in the slots behind the committed ones. So a row's
sums run over the very slots, in the very order, in which they would run had its path been decoded plainly: its bits are
those of plain decoding, whatever else is in the tree. `keep_path` then writes the accepted path where it belongs.

Letters: P parts of a product, B batch, T rows of this pass, R >= B * T rows in all, N query heads, K KV heads,
G = N/K, H head size, S cache slots, C chunks, M nodes of the tree, A nodes of the longest path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dvi_jax.model import decode_attention as chain
from dvi_jax.model.attention_chunks import CHUNK_SLOTS, chunk_count, in_its_chunk, output_shapes, write
from dvi_jax.model.decode_attention import STEP_SLOTS, TILE, HeadRows, Ref, Rope, Slots
from dvi_jax.model.kept_kv import Rows

ARRAYS_AT_ONCE = 32  # of `keep_path`, as those of 16 layers: a kernel takes a few thousand bytes of pointers


class Tree(struct.PyTreeNode):
    """Where the rows of a pass stand in a tree. Its nodes are numbered from the root, ancestors before descendants."""

    path: jax.Array  # int32 [B, T, A], each row's ancestors from the root on and itself, which also fills the rest
    start: jax.Array  # int32 [B], the root's position
    first: int = struct.field(pytree_node=False, default=0)  # node of row 0; the others follow
    room: int = struct.field(pytree_node=False, default=0)  # M


@partial(jax.jit, static_argnames=("interpret",))  # traced and lowered once for all layers: seconds of every start
def tree_attention(
    qkv: jax.Array,
    rope: Rope,
    key: Rows,
    value: Rows,
    positions: jax.Array,
    tree: Tree,
    nodes: tuple[Rows, Rows] | None,
    bias: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, Rows, Rows]:
    """`decode_attention.cached_attention` of a tree's rows: key and value [B, K, S, H] are read and left as they are.

    `nodes`: keys and values [B, K, M, H] of the nodes of earlier passes, kept as the cache's are; None in the first.
    Returns the rows' attention [R, N*H], and both with the nodes of this pass; those of later passes hold anything.
    """
    _, rows, heads, size = qkv.shape
    batch, tokens = positions.shape
    kv_heads, slots = key.shape[1:3]
    queries = heads - 2 * kv_heads
    chunks, tiles = chunk_count(slots), pl.cdiv(queries // kv_heads, TILE)
    cos, sin = (table[:, :, 0] for table in rope)
    cache, structure = jax.tree.flatten((key, value))
    earlier, biases = jax.tree.leaves(nodes), [] if bias is None else [bias]
    noted = [jax.ShapeDtypeStruct((batch, kv_heads, tree.room, array.shape[3]), array.dtype) for array in cache]
    outputs = output_shapes(chunks, (rows, queries, size), key.dtype)
    kernel = partial(
        _kernel,
        earlier=len(earlier),
        biased=bias is not None,
        arrays=len(cache),
        kv_heads=kv_heads,
        chunks=chunks,
        first=tree.first,
        dtype=key.dtype,
        interpret=interpret,
    )
    written = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, tokens * tiles * chunks),
        in_specs=[
            *map(chain.of_head, earlier),
            *map(chain.of_head, cache),
            chain.entire(qkv.shape),
            *[_of_sequence(tokens, size // 2)] * 2,
            _of_sequence(tokens),
            _of_sequence(*tree.path.shape[1:]),
            chain.entire((batch,)),
            *(chain.entire((heads, size)) for _ in biases),
        ],
        out_specs=[*map(chain.of_head, noted), *(chain.entire(output.shape) for output in outputs)],
        out_shape=[*noted, *outputs],
        input_output_aliases={i: i for i in range(len(earlier))},
        compiler_params=plt.CompilerParams(num_warps=chain.WARPS, num_stages=chain.STAGES),
        interpret=interpret,
        name="tree_attention",
    )(*earlier, *cache, qkv, cos, sin, positions, tree.path, tree.start, *biases)
    return chain.results(written, structure, rows, positions, interpret=interpret)


def _of_sequence(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, *shape), lambda b, k, c: (b, *(0,) * len(shape)))


def _kernel(
    *refs: Ref,
    earlier: int,
    arrays: int,
    biased: bool,
    kv_heads: int,
    chunks: int,
    first: int,
    dtype: jnp.dtype,
    interpret: bool,
) -> None:
    """One row, one KV head and one chunk: note the keys and values of the row and its ancestors, then attend.

    Where the row does not reach the chunk, nothing.
    """
    committed_refs, (qkv, cos, sin, positions, path, start, *rest) = (
        refs[earlier : earlier + arrays],
        refs[earlier + arrays :],
    )
    bias, rest = (rest[0], rest[1:]) if biased else (None, rest)
    rows_of = partial(HeadRows.pair, inline=not interpret)
    (key, value), nodes, outputs = rows_of(committed_refs), rows_of(rest[:arrays]), rest[arrays:]
    heads, size = qkv.shape[2:]
    tokens, longest = path.shape
    sequence, kv_head, place = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    chunk, row = place % chunks, place // chunks % tokens
    queries = heads - 2 * kv_heads
    group, first_row = queries // kv_heads, sequence * tokens
    # The queries of the row's heads; what fills up the tile does the first one's work again.
    member = place // (chunks * tokens) * TILE + chain.tile_queries(queries * size, inline=not interpret)
    head = kv_head * group + jnp.where(member < group, member, 0)
    token = jnp.full((TILE,), row)
    turn = partial(chain.turned, qkv, bias, (cos, sin), first_row=first_row, dtype=dtype)
    slots, begin = key.values.shape[0], chunk * CHUNK_SLOTS
    limit = slots if chunks == 1 else jnp.minimum(begin + CHUNK_SLOTS, slots)
    position, root = plt.load(positions.at[token]), plt.load(start.at[sequence])
    end = jnp.minimum(limit, jnp.max(position) + 1)
    finish = partial(write, outputs, row=first_row + token, head=head, chunk=chunk, position=position)

    def work() -> None:
        query = turn((token[:, None], head[:, None]))
        # Every program notes its own path, as far as it is of this pass: it then reads what it wrote itself.
        step = jnp.arange(pl.next_power_of_2(longest))[:, None]
        node = plt.load(path.at[row, jnp.where(step < longest, step, 0)])
        new = node >= first
        source = jnp.where(new, node - first, 0)
        nodes[0].store(node, turn((source, queries + kv_head)), new)
        at = (first_row + source, queries + kv_heads + kv_head, jnp.arange(size)[None, :])
        nodes[1].store(node, [chain.summed(qkv, bias, at, dtype)], new)
        if not interpret:
            plt.debug_barrier()  # the program's other threads wrote what the next lines read
        last_step = pl.cdiv(end - begin, STEP_SLOTS)
        committed = chain.cached_slots(key, value, dtype)
        split = jnp.clip((root - begin) // STEP_SLOTS, 0, last_step)  # steps before it hold no node
        carry = chain.attend(chain.nothing_yet(size), query, committed, position, begin, (0, split))
        behind = _slots_of_path(committed, nodes, path, row, root, dtype)
        finish(chain.attend(carry, query, behind, position, begin, (split, last_step)))

    in_its_chunk(chunks, end > begin, work)


def _slots_of_path(
    committed: Slots, nodes: tuple[HeadRows, HeadRows], path: Ref, row: jax.Array, root: jax.Array, dtype: jnp.dtype
) -> Slots:
    """Slots before `root` from the cache, those from it on from the nodes of the row's path."""
    node_key, node_value = nodes
    size, longest = node_key.values.shape[1], path.shape[1]
    column, half = jnp.arange(size)[None, :], jnp.arange(size // 2)[None, :]

    def of_path(slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        depth = slot - root
        behind = (depth >= 0) & (depth < longest)
        return plt.load(path.at[row, jnp.where(behind, depth, 0)]), behind

    def scales(own: HeadRows, node: jax.Array, behind: jax.Array, others: jax.Array | None) -> jax.Array | None:
        found = own.load_scales(node, behind)
        return others if found is None or others is None else jnp.where(behind, found, others)

    def keys(slot: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        node, behind = of_path(slot)
        left, right, others = committed.keys(slot)
        at, mask = node[:, None], behind[:, None]
        own_left = node_key.load(at, half, mask, dtype)
        own_right = node_key.load(at, half + size // 2, mask, dtype)
        scale = scales(node_key, node, behind, others)
        return jnp.where(mask, own_left, left), jnp.where(mask, own_right, right), scale

    def values(slot: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        node, behind = of_path(slot)
        others, other_scales = committed.values(slot)
        own = node_value.load(node[:, None], column, behind[:, None], dtype)
        return jnp.where(behind[:, None], own, others), scales(node_value, node, behind, other_scales)

    return Slots(keys, values)


@partial(jax.jit, static_argnames=("interpret",))
def keep_path(
    caches: Sequence[tuple[Rows, Rows]],
    nodes: Sequence[tuple[Rows, Rows]],
    path: jax.Array,
    start: jax.Array,
    *,
    interpret: bool = False,
) -> list[tuple[Rows, Rows]]:
    """The caches of layers with the nodes of `path` int32 [B, A] in slots start[b] .. start[b] + A - 1.

    Caches [B, K, S, H] and nodes [B, K, M, H]: keys and values of each layer. One kernel for many layers.
    """
    arrays, structure = jax.tree.flatten(list(caches))
    new = jax.tree.leaves(list(nodes))
    kept: list[jax.Array] = []
    for begin in range(0, len(arrays), ARRAYS_AT_ONCE):
        some = slice(begin, begin + ARRAYS_AT_ONCE)
        kept += _keep_some(arrays[some], new[some], path, start, interpret=interpret)
    return jax.tree.unflatten(structure, kept)


def _keep_some(
    old: list[jax.Array], new: list[jax.Array], path: jax.Array, start: jax.Array, *, interpret: bool
) -> list[jax.Array]:
    (batch, longest), kv_heads = path.shape, old[0].shape[1]

    def of_head(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *array.shape[2:]), lambda i, b, k: (b, k, 0, 0))

    def kernel(*refs: Ref) -> None:
        path, start, *rest = refs
        sources, targets = rest[len(old) : 2 * len(old)], rest[2 * len(old) :]
        sequence, which = pl.program_id(1), pl.program_id(0)
        depth = jnp.arange(pl.next_power_of_2(longest))
        depth = jnp.where(depth < longest, depth, 0)[:, None]
        node = plt.load(path.at[sequence, depth])
        slot = plt.load(start.at[sequence]) + depth
        for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
            column = jnp.arange(target.shape[1])[None, :]

            @pl.when(which == index)
            def _(source: Ref = source, target: Ref = target, column: jax.Array = column) -> None:
                plt.store(target.at[slot, column], plt.load(source.at[node, column]))

    return pl.pallas_call(
        kernel,
        grid=(len(old), batch, kv_heads),
        in_specs=[chain.entire(path.shape), chain.entire(start.shape), *map(of_head, old), *map(of_head, new)],
        out_specs=[*map(of_head, old)],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in old],
        input_output_aliases={2 + i: i for i in range(len(old))},
        compiler_params=plt.CompilerParams(num_warps=chain.WARPS),
        interpret=interpret,
        name="keep_path",
    )(path, start, *old, *new)
