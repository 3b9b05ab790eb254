"""The weight files of a Hugging Face directory: safetensors or PyTorch, whole or in shards."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dvi_jax.errors import UserError
from dvi_jax.importing.files import FILE_NAME, read_json_object
from dvi_jax.importing.safetensors_file import SafetensorsFile
from dvi_jax.importing.tensors import Rows, TensorSource
from dvi_jax.tools import make_tools_importable

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def open_weights(directory: Path) -> TensorSource:
    """The weights of a directory: safetensors first, then PyTorch files, each whole or in shards."""
    candidates: list[tuple[str, Callable[[Path], TensorSource]]] = [
        (SAFETENSORS, SafetensorsFile),
        (SAFETENSORS_INDEX, partial(_open_shards, SafetensorsFile)),
        (TORCH, _open_torch),
        (TORCH_INDEX, partial(_open_shards, _open_torch)),
    ]
    for name, opener in candidates:
        if (directory / name).exists():
            return opener(directory / name)
    names = ", ".join(name for name, _ in candidates)
    raise UserError(f"{directory} holds no weights: expected one of {names}")


class Shards:
    """Several weight files as one `TensorSource`; a tensor that two of them hold is a `UserError`."""

    def __init__(self, label: str, parts: Sequence[TensorSource]) -> None:
        self.label = label
        self.files = tuple(path for part in parts for path in part.files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._owner: dict[str, TensorSource] = {}
        for part in parts:
            for name, shape in part.shapes.items():
                if name in self._owner:
                    raise UserError(f"{label}: tensor {name} is in both {self._owner[name].label} and {part.label}")
                self._owner[name] = part
                self.shapes[name] = shape

    def chunks(self, name: str) -> Iterator[tuple[Rows, np.ndarray]]:
        return self._owner[name].chunks(name)


def _open_torch(path: Path) -> TensorSource:
    """The one place from which this package reaches for `conversion`, which may use PyTorch."""
    make_tools_importable()
    try:
        return importlib.import_module("conversion.torch_file").TorchFile(path)
    except ModuleNotFoundError as error:
        if error.name not in ("conversion", "conversion.torch_file"):
            raise
        raise UserError(f"reading {path.name} needs the package conversion: give safetensors weights") from error


def _open_shards(kind: Callable[[Path], TensorSource], index: Path) -> TensorSource:
    """The shards that an index names. What they hold counts; the index may list tensors that nobody needs."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map from tensor to file")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise UserError(f"{index}: the file of {tensor[:256]} must be a plain file name, got {name!r:.100}")
        names.add(name)
    return Shards(index.name, [kind(index.parent / name) for name in sorted(names)])
