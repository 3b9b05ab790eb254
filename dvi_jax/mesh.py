"""One mesh for all devices, and where every array lies on it.

Two axes. Along `data` lie the sequences of a batch and the rows of an update; every device there has the whole model.
Along `model` a device has a smaller Llama: N/n of its heads, F/n columns of its feed-forward, V/n of its vocabulary.
So what runs on one device runs on each, kernels included (`jax.shard_map`), and what is new are the sums after the
attention's and the feed-forward's last product (Megatron-LM, arXiv 1909.08053) and what is asked of all logits.

    embed, head               by vocabulary          qkv, gate_up      by rows, its own q, k, v (gate, up) together
    KV caches                 by KV head             out, down         by columns
    norms, drafters           copied                 LoRA sets         as their weights

Where there are fewer KV heads than devices, or as many as do not divide, they are copied until each device has as many.
Letters: n devices along `model`, N query heads, K KV heads, H head size, D hidden, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvi_jax.config import LlamaConfig, MeshConfig
from dvi_jax.errors import UserError
from dvi_jax.model.quantised import BY_GROUP, Quantised
from dvi_jax.quantisation import PARTS

DATA, MODEL = "data", "model"
WHOLE, ROWS, CACHES = P(), P(DATA), P(DATA, MODEL)  # copied; a leading batch; keys or values [B, K, S, H]
COPIED_CACHES = P(None, MODEL)  # of a batch that is on all devices along `data`
BY_OUTPUT, BY_INPUT = P(MODEL, None), P(None, MODEL)  # weights [out, in]
WEIGHTS = {
    "embed": BY_OUTPUT,
    "head": BY_OUTPUT,
    "qkv": BY_OUTPUT,
    "qkv_bias": P(MODEL),
    "qkv_factors": P(MODEL),
    "gate_up": BY_OUTPUT,
    "out": BY_INPUT,
    "down": BY_INPUT,
}


def make_mesh(shape: MeshConfig) -> Mesh | None:
    """The first devices there are, as `shape` says; None for one device, where nothing is split.

    `UserError` where there are too few, or where other processes' devices would be left out.
    """
    count, devices = shape.data * shape.model, jax.devices()
    if count > len(devices):
        raise UserError(f"mesh {shape} needs {count} devices, there are {len(devices)} ({devices[0].device_kind})")
    if jax.process_count() > 1 and count != len(devices):
        raise UserError(f"mesh {shape} leaves out devices: {jax.process_count()} processes have {len(devices)}")
    if count == 1:
        return None
    if devices[0].platform == "gpu":
        # Shardy of jaxlib 0.11.2 dies (in ManualComputationUnusedInputsPattern) compiling a round for several GPUs.
        jax.config.update("jax_use_shardy_partitioner", False)
    return Mesh(np.array(devices[:count]).reshape(shape.data, shape.model), (DATA, MODEL))


def shards(mesh: Mesh | None) -> int:
    """n: into how many parts the model is split."""
    return 1 if mesh is None else mesh.shape[MODEL]


def replicas(mesh: Mesh | None) -> int:
    """Into how many parts a batch is split."""
    return 1 if mesh is None else mesh.shape[DATA]


def check_batch(mesh: Mesh | None, rows: int, what: str) -> None:
    """Raise `UserError` unless `rows` rows of `what` divide among the devices along `data`."""
    if rows % replicas(mesh):
        raise UserError(f"mesh data={replicas(mesh)}: {what} of {rows} does not divide among {replicas(mesh)} devices")


def shard_config(config: LlamaConfig, mesh: Mesh | None) -> LlamaConfig:
    """The smaller Llama that a device has, but for the vocabulary's size. `UserError` where it does not divide."""
    n = shards(mesh)
    if n == 1:
        return config
    for name in ("num_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % n:
            raise UserError(f"mesh model={n}: the model's {name} {getattr(config, name)} does not divide by {n}")
    return replace(
        config,
        num_heads=config.num_heads // n,
        num_kv_heads=math.lcm(config.num_kv_heads, n) // n,  # divides N/n, since both K and n divide N
        intermediate_size=config.intermediate_size // n,
    )


def check_blocks(mesh: Mesh | None, base: Mapping[str, Any]) -> None:
    """Raise `UserError` for a matrix in fewer bits whose inputs are not whole blocks on each device."""
    n = shards(mesh)
    for layer in base["layers"].values():
        for name, parts in layer.items():
            if isinstance(parts, Mapping) and WEIGHTS[name] == BY_INPUT:
                matrix = Quantised.of(parts)
                width = matrix.shape[1]
                if width % (n * matrix.block):
                    raise UserError(
                        f"mesh model={n}: the {width} inputs of {name} are kept in blocks of {matrix.block},"
                        f" which do not divide by {n}: import with a smaller --group, or as int8"
                    )


def row_order(name: str, config: LlamaConfig, n: int) -> np.ndarray | None:
    """Which rows of a joined weight each of n devices has, one device after the other; None: as they lie."""
    if n == 1:
        return None
    if name in ("qkv", "qkv_bias"):
        queries, keys, size = config.num_heads, config.num_kv_heads, config.head_dim
        copies = math.lcm(keys, n) // keys
        kv = np.repeat(np.arange(keys), copies).reshape(n, -1)
        heads = [np.arange(queries).reshape(n, -1), queries + kv, queries + keys + kv]
        return (np.concatenate(heads, axis=1).reshape(-1, 1) * size + np.arange(size)).ravel()
    if name == "gate_up":
        return np.arange(2 * config.intermediate_size).reshape(2, n, -1).swapaxes(0, 1).ravel()
    return None


def spec_of(path: tuple[str, ...], axes: int = 2) -> P:
    """Where an array of `Params` lies, by the names on the way to it, such as `llama/layers/3/qkv`.

    Of a matrix in fewer bits (`qkv/values`, `qkv/scales`), every part is cut as the matrix is. Scales of output
    channels have one axis (`axes`), and are copied where the inputs are cut. The model has those of groups transposed.
    """
    if not path or path[0] != "llama":
        return WHOLE
    if path[-1].startswith(BY_GROUP):
        return P(*reversed(spec_of(path[:-1])))
    if path[-1] in PARTS:
        whole = spec_of(path[:-1])
        return whole if axes == 2 else P(*whole[:1])
    if "lora" in path:  # [R, in] and [out, R] of the weight that it is added to
        by = WEIGHTS[path[-2]]
        return by if (path[-1] == "b") == (by == BY_OUTPUT) else WHOLE
    return WEIGHTS.get(path[-1], WHOLE)


def specs_of(params: Any) -> Any:
    """`spec_of` every array of a `Params`."""
    return jax.tree.map_with_path(lambda path, leaf: spec_of(_names(path), leaf.ndim), params)


def place(mesh: Mesh | None, config: LlamaConfig, path: tuple[str, ...], array: Any) -> jax.Array:
    """One array of a checkpoint on its devices, each of which gets its own part alone.

    `array`: on the host, as checkpoints have it; `path` as in `spec_of`.
    """
    if mesh is None:
        return jax.numpy.asarray(array)
    array, order = np.asarray(array), _order_of(mesh, config, path)
    shape = array.shape if order is None else (len(order), *array.shape[1:])

    def part(index: Any) -> np.ndarray:
        return array[index] if order is None else array[(order[index[0]], *index[1:])]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec_of(path, array.ndim)), part)


def place_tree(mesh: Mesh | None, config: LlamaConfig, tree: Any, *above: str) -> Any:
    """`place` for every array of a tree, whose names stand behind `above`."""
    return jax.tree.map_with_path(lambda path, leaf: place(mesh, config, (*above, *_names(path)), leaf), tree)


def copied(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays on all devices of the mesh, as what learning moves lies there."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, WHOLE)

    def one(leaf: Any) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf)))
        return jax.make_array_from_callback(leaf.shape, sharding, to_host(leaf).__getitem__)

    return jax.tree.map(one, tree)


def spread(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays that were made in the shapes they have on the mesh, such as new LoRA sets, on its devices."""
    if mesh is None:
        return tree

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        sharding = NamedSharding(mesh, spec_of(_names(path), leaf.ndim))
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_callback(leaf.shape, sharding, np.asarray(leaf).__getitem__)

    return jax.tree.map_with_path(one, tree)


def place_shapes(mesh: Mesh | None, config: LlamaConfig, shapes: Any) -> Any:
    """What `place_tree` makes of a base tree of such shapes: `jax.ShapeDtypeStruct`s, float32, with their shardings."""

    def one(path: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        names = ("llama", *_names(path))
        order = _order_of(mesh, config, names)
        shape = shape if order is None else (len(order), *shape[1:])
        return jax.ShapeDtypeStruct(
            shape, np.float32, sharding=None if mesh is None else NamedSharding(mesh, spec_of(names))
        )

    return jax.tree.map_with_path(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


def stored_shapes(mesh: Mesh | None, config: LlamaConfig, tree: Any) -> Any:
    """The shapes that arrays on the mesh have in a checkpoint."""

    def one(path: Any, leaf: jax.Array) -> tuple[int, ...]:
        order = _order_of(mesh, config, _names(path))
        return leaf.shape if order is None else (len(np.unique(order)), *leaf.shape[1:])

    return jax.tree.map_with_path(one, tree)


def collect(mesh: Mesh | None, config: LlamaConfig, tree: Any, *above: str) -> Any:
    """The tree that `place_tree` was given, array by array on the host, from all devices of all processes."""

    def whole(path: Any, leaf: jax.Array) -> Any:
        array, order = to_host(leaf), _order_of(mesh, config, (*above, *_names(path)))
        return array if order is None else array[np.unique(order, return_index=True)[1]]  # the first copy of each row

    return jax.tree.map_with_path(whole, tree)


def to_host(tree: Any) -> Any:
    """Arrays as numpy, whole, also where other processes have parts of them (then all processes must ask)."""

    def whole(array: Any) -> Any:
        if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
            sharding: Any = array.sharding
            array = jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, WHOLE))(array)
        return array

    return jax.device_get(jax.tree.map(whole, tree))


def bytes_of(mesh: Mesh | None, tree: Any, specs: Any = None) -> int:
    """Bytes on each device of arrays, or of shapes of arrays, that lie as `specs` says (a prefix of the tree).

    Without `specs` they are parts of a `Params`.
    """
    leaves = jax.tree.leaves(tree)
    if mesh is None:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    each = _spread_out(specs_of(tree) if specs is None else specs, tree)
    return sum(
        leaf.size * leaf.dtype.itemsize // math.prod(mesh.shape[axis] for axis in spec if axis is not None)
        for leaf, spec in zip(leaves, each, strict=True)
    )


def run_sharded(mesh: Mesh | None, body: Callable[..., Any], specs: tuple[Any, ...], out_specs: Any) -> Any:
    """`body` on every device, over its parts of the arguments; without a mesh `body` itself.

    What is not split comes out of the same operations on every device, and so is the same.
    """
    if mesh is None:
        return body
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)


def specs_for(specs: Any, tree: Any) -> Any:
    """A spec for every array of `tree`, from specs for parts of it."""
    return jax.tree.unflatten(jax.tree.structure(tree), _spread_out(specs, tree))


def _spread_out(specs: Any, tree: Any) -> list[P]:
    """The spec of each leaf of `tree`."""
    spread = jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), specs, tree, is_leaf=_is_spec)
    return jax.tree.leaves(spread, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(key.key) for key in path if hasattr(key, "key"))


def _order_of(mesh: Mesh | None, config: LlamaConfig, path: tuple[str, ...]) -> np.ndarray | None:
    """`row_order` of an array; the rows of a LoRA's B are those of its weight, A has none of them."""
    if not path or path[0] != "llama" or ("lora" in path and path[-1] == "a"):
        return None
    return row_order(path[-2] if "lora" in path or path[-1] in PARTS else path[-1], config, shards(mesh))
