"""Arrays of a checkpoint that are read one by one, so that a model never has to fit into the host's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class StoredArray:
    """An array on the disk, read by `np.asarray` and not kept."""

    def __init__(self, path: Path, names: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype):
        """`path`: of an orbax checkpoint; `names`: the keys that lead to the array there."""
        self.path, self.names = path, names
        self.shape, self.dtype = shape, dtype
        self.ndim, self.size = len(shape), int(np.prod(shape))
        self.nbytes = self.size * dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        item: Any = 0  # whatever stands there, orbax asks for its place alone
        arguments: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for name in reversed(self.names):
            item, arguments = {name: item}, {name: arguments}
        with reader() as checkpointer:
            wanted = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
            found = checkpointer.restore(self.path.absolute(), args=wanted)
        for name in self.names:
            found = found[name]
        return found if dtype is None else found.astype(dtype)


def stored_tree(path: Path, structure: dict[str, Any], *names: str) -> dict[str, Any]:
    """`StoredArray`s of the checkpoint at `path`, nested as `structure`, which has what it says of its arrays."""
    return {
        key: stored_tree(path, leaf, *names, key)
        if isinstance(leaf, dict)
        else StoredArray(path, (*names, key), tuple(leaf.shape), np.dtype(leaf.dtype))
        for key, leaf in structure.items()
    }


def one_process() -> Any:
    """Options for orbax: this process reads and writes by itself, and waits for no other."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )


def reader() -> ocp.Checkpointer:
    """What reads nested dicts of arrays."""
    alone = one_process()
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


def read_stored(tree: Any) -> Any:
    """A nested dict with every `StoredArray` read."""
    if isinstance(tree, dict):
        return {key: read_stored(value) for key, value in tree.items()}
    return np.asarray(tree) if isinstance(tree, StoredArray) else tree
