"""The Pallas kernels of a tree, interpreted: a node's bits are those of its path decoded as a chain."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.model import attention
from dvi_jax.model import tree_attention as tree_attention_module
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.attention_chunks import CHUNK_SLOTS, UNCUT_SLOTS
from dvi_jax.model.decode_attention import cached_attention
from dvi_jax.model.tree_attention import Tree, keep_path, tree_attention
from dvi_jax.model.tree_cache import TreeCache

# Two nodes behind the root, one behind the first of them, one behind that; paths as `Tree` has them.
PATHS = np.array([[0, 0, 0, 0], [0, 1, 1, 1], [0, 2, 2, 2], [0, 1, 3, 3], [0, 1, 3, 4]], np.int32)
DEPTH = np.array([0, 1, 1, 2, 3])
NODES, KV_HEADS, SIZE = len(PATHS), 2, 32
# name: parts of the product, query heads, cache slots, the root's position in each sequence, biased
SHAPES = {
    "whole": (1, 2, 128, (61, 5), False),  # 61 .. 64 cross a block's end
    "three query heads per KV head, split": (3, 6, UNCUT_SLOTS + 76, (CHUNK_SLOTS - 2, UNCUT_SLOTS + 60), True),
}


class Case:
    """Random rows, keys and values, and what the kernel makes of them."""

    def __init__(self, parts, heads, slots, starts, biased):
        keys = jax.random.split(jax.random.key(0), 4)
        self.heads, self.batch = heads, len(starts)
        self.start = jnp.array(starts, jnp.int32)
        rows = (parts, self.batch, NODES, heads + 2 * KV_HEADS, SIZE)
        self.qkv = jax.random.normal(keys[0], rows, jnp.float32 if parts > 1 else jnp.bfloat16) / np.sqrt(parts)
        shape = (self.batch, KV_HEADS, slots, SIZE)
        self.key, self.value = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:3])
        self.bias = jax.random.normal(keys[3], rows[3:], jnp.bfloat16) if biased else None
        self.mixed, *self.nodes = self.pass_of(slice(None))

    def rope(self, positions):
        return attention.rope_tables(attention.rope_frequencies(SIZE, 10000.0, None), positions)

    def pass_of(self, rows, nodes=None, key=None, value=None):
        """Attention [B, T, N*H] of some rows of the tree, after others gave `nodes`; and their keys and values."""
        positions = self.start[:, None] + DEPTH[rows]
        path = jnp.broadcast_to(PATHS[rows], (self.batch, *PATHS[rows].shape))
        tree = Tree(path, self.start, first=rows.start or 0, room=NODES)
        flat = self.qkv[:, :, rows].reshape(len(self.qkv), -1, self.heads + 2 * KV_HEADS, SIZE)
        flat = jnp.pad(flat, ((0, 0), (0, 3), (0, 0), (0, 0)))  # rows that only fill up
        arrays = (self.key if key is None else key, self.value if value is None else value, positions, tree, nodes)
        mixed, *nodes = tree_attention(flat, self.rope(positions), *arrays, self.bias, interpret=True)
        return [mixed[: positions.size].reshape(*positions.shape, -1), *nodes]

    def chain(self, sequence, node):
        """The same of the node's path alone, by the kernel of chains: attention of its last row, and the caches."""
        path = PATHS[node][: DEPTH[node] + 1]
        one = slice(sequence, sequence + 1)
        positions = self.start[one, None] + jnp.arange(len(path))
        rows = (self.qkv[:, sequence, path], self.rope(positions), self.key[one], self.value[one], positions)
        mixed, *caches = cached_attention(*rows, self.bias, interpret=True)
        return mixed[-1], *caches


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def case(request):
    return Case(*request.param)


def equal_bits(a, b):
    return np.array_equal(np.asarray(a).view(np.int16), np.asarray(b).view(np.int16))


def test_a_node_has_the_bits_of_its_path_as_a_chain(case):
    for sequence in range(case.batch):
        for node in (2, 4):
            mixed, *caches = case.chain(sequence, node)
            assert equal_bits(case.mixed[sequence, node], mixed)
            slot = int(case.start[sequence]) + DEPTH[node]
            for nodes, cache in zip(case.nodes, caches, strict=True):
                assert equal_bits(nodes[sequence, :, node], cache[0, :, slot])


def test_nodes_of_earlier_passes(case):
    """The root and its children in one pass, the others in the next: the same bits."""
    first, *nodes = case.pass_of(slice(0, 3))
    second, *nodes = case.pass_of(slice(3, 5), tuple(nodes))
    assert equal_bits(jnp.concatenate([first, second], axis=1), case.mixed)
    for found, right in zip(nodes, case.nodes, strict=True):
        assert equal_bits(found, right)


def test_slots_from_the_root_on_are_not_read(case):
    """What lies there is of a round before."""
    stale = (jnp.arange(case.key.shape[2]) >= case.start[:, None])[:, None, :, None]
    found = case.pass_of(slice(None), key=jnp.where(stale, 1e4, case.key), value=jnp.where(stale, -1e4, case.value))
    assert all(map(equal_bits, found, (case.mixed, *case.nodes)))


def test_without_the_kernel_it_is_the_einsum_of_a_chain(case):
    """Row by row, each path laid behind the committed slots: every bit of a round of as many rows."""
    heads = (case.heads, KV_HEADS, SIZE)
    joined = case.qkv.reshape(*case.qkv.shape[:3], -1)
    bias = None if case.bias is None else case.bias.reshape(-1)
    positions = case.start[:, None] + DEPTH
    tree = Tree(jnp.broadcast_to(PATHS, (case.batch, *PATHS.shape)), case.start, room=NODES)

    @partial(jax.jit, static_argnames="tree_given")
    def attended(rows, at, tree_given):
        cache = LayerCache(case.key, case.value)
        cache = TreeCache(cache, tree) if tree_given else cache
        return attention.attend_cached(rows, heads, case.rope(at), cache, at, bias)[0]

    found = attended(joined, positions, True)
    chained = attended(joined[:, :, PATHS[4][[0, 1, 2, 3, 3]]], case.start[:, None] + jnp.arange(NODES), False)
    for node in (0, 1, 3, 4):
        assert equal_bits(found[:, node], chained[:, DEPTH[node]])


def test_the_accepted_path_is_kept_in_all_layers(case, monkeypatch):
    """More layers than one kernel takes, here two; slots before and behind stay as they were."""
    monkeypatch.setattr(tree_attention_module, "ARRAYS_AT_ONCE", 4)
    layers = 3
    caches = [(case.key + i, case.value - i) for i in range(layers)]
    path = jnp.array([PATHS[4], PATHS[2]])
    kept = keep_path(caches, [tuple(case.nodes)] * layers, path, case.start, interpret=True)
    for before, after in zip(caches, kept, strict=True):
        for old, new, nodes in zip(before, after, case.nodes, strict=True):
            expected = np.array(old)
            for sequence, nodes_of_path in enumerate(np.asarray(path)):
                slots = int(case.start[sequence]) + np.arange(len(nodes_of_path))
                expected[sequence][:, slots] = np.asarray(nodes[sequence])[:, nodes_of_path]
            assert equal_bits(new, expected)
