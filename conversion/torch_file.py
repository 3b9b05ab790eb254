"""`pytorch_model.bin`: plain tensors only, unpickled with weights-only rules and streamed row by row."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from conversion.pickle_check import check_torch_file
from dvi_jax.errors import UserError
from dvi_jax.importing.tensors import Rows, row_chunks

# Pages of a mapping stay resident until it goes away, so a large file is mapped anew after this many bytes.
_REMAP_BYTES = 64 << 20


class TorchFile:
    """One file written by `torch.save(state_dict)`, a `TensorSource`.

    Whatever weights-only unpickling refuses, and anything but a flat dict of dense tensors, is a `UserError`.
    """

    def __init__(self, path: Path) -> None:
        self.label = path.name
        self.files: tuple[Path, ...] = (path,)
        self._path = path
        check_torch_file(path)
        self._tensors = _load(path)
        self._touched = 0
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def chunks(self, name: str) -> Iterator[tuple[Rows, np.ndarray]]:
        tensor = self._tensors[name]
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{self.label}: {name} is of type {kind}; weights must be float32, float16 or bfloat16")
        num_rows = tensor.shape[0]
        row_bytes = tensor[:1].numel() * tensor.element_size()
        for start, stop in row_chunks(num_rows, row_bytes):
            yield slice(start, stop), _to_numpy(self._tensors[name][start:stop])
            self._release((stop - start) * row_bytes)

    def _release(self, num_bytes: int) -> None:
        self._touched += num_bytes
        if self._touched >= _REMAP_BYTES and _is_zip(self._path):
            self._touched = 0
            self._tensors = _load(self._path)


def write_torch(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write arrays as a state dict; bfloat16 stays bfloat16."""
    import torch

    def to_torch(array: np.ndarray) -> torch.Tensor:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    torch.save({name: to_torch(array) for name, array in tensors.items()}, path)


def _to_numpy(tensor: Any) -> np.ndarray:
    import torch

    dense = tensor.detach().contiguous()
    if dense.dtype == torch.bfloat16:
        return dense.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return dense.numpy()


def _load(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading {path.name} needs PyTorch: install torch, or give safetensors weights") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path.name} refused: it holds more than plain tensors, and is not unpickled") from error
    except (
        AssertionError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        EOFError,
        OSError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        raise UserError(f"{path.name} is damaged or not a PyTorch file: {str(error)[:200]}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path.name} must hold a dict of tensors, got {type(state).__name__}")
    for name, value in state.items():
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
        if not isinstance(name, str) or not plain or value.is_quantized or value.device.type != "cpu":
            raise UserError(f"{path.name} must hold plain tensors only; {str(name)[:80]} is {type(value).__name__}")
    return state


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
