"""How a checkpoint keeps its matrices in fewer bits: what its manifest says of it, and which arrays stand for a matrix.

In a base tree a quantised matrix is a mapping of the fields of `dvi_jax.model.quantised.Quantised` in place of an
array. Each says by its arrays what it is kept in, so a file's own integers may lie beside requantised ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dvi_jax.errors import UserError
from dvi_jax.settings import require

FORMATS = ("int8", "int4", "float8")
BFLOAT16 = "bfloat16"  # of `--weights`: nothing quantised
WEIGHTS = (BFLOAT16, *FORMATS)
GROUPS = (128, 64, 32)  # inputs that may share a scale of int4, the largest first
MATRICES = ("qkv", "out", "gate_up", "down")  # of a layer; norms, biases and the embedding stay as they are
PARTS = {"values", "scales", "minima"}
_VALUES = {"int8": 1, "float8_e4m3fn": 1, "uint8": 2, "uint16": 4}  # types, and integers of an element


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How matrices are kept. Norms, biases and the embedding keep the checkpoint's dtype."""

    weights: str  # one of FORMATS: int8 and float8 with a scale for each output channel, int4 for each group
    group: int = 64  # inputs that share a scale of int4, fewer where rows aren't whole groups; others ignore it
    head: bool = False  # the LM head too; where it is tied, as a matrix beside the embedding
    calibration_tokens: int = 0  # of the text that int4 was rounded by (`importing/gptq.py`), 0 for rounding to nearest
    source_sha256: str = ""  # `identity.hash_base` of the weights that were rounded

    def __post_init__(self) -> None:
        require(self.weights in FORMATS, "quantisation: weights", self.weights, "int8, int4 or float8")
        require(self.group in GROUPS, "quantisation: group", self.group, "128, 64 or 32")

    def includes(self, path: tuple[str, ...]) -> bool:
        """Whether the array at `path` of a base tree is one that is kept in fewer bits."""
        return path[-1] in MATRICES or (self.head and path == ("head",))


def chosen_storage(weights: str | None, dtype: str | None, **options: Any) -> tuple[str | None, Quantisation | None]:
    """The dtype and quantisation that `--weights` and `--dtype` ask for together; `options` are a `Quantisation`'s.

    `UserError` for weights of no known name, or bfloat16 beside another dtype.
    """
    if weights is None:
        return dtype, None
    if weights != BFLOAT16:
        return dtype, Quantisation(weights=weights, **options)
    if dtype not in (None, BFLOAT16):
        raise UserError(f"--weights {weights} and --dtype {dtype} ask for two things: leave out one")
    return BFLOAT16, None


class _Whole(NamedTuple):
    """The matrix that parts stand for, as far as a comparison of shapes looks at it."""

    shape: tuple[int, int]


def with_wholes(tree: Mapping[str, Any], shapes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`tree`, of what has a shape and a dtype, with a whole where parts stand for a matrix of `shapes`.

    Raises `UserError` naming the first whose parts don't fit each other.
    """
    result: dict[str, Any] = {}
    for name, node in tree.items():
        wanted = shapes.get(name)
        if isinstance(node, Mapping) and isinstance(wanted, Mapping):
            node = with_wholes(node, wanted, f"{where}/{name}")
        elif isinstance(node, Mapping) and wanted is not None and name in (*MATRICES, "head"):
            node = _Whole(_whole_shape(node, f"{where}/{name}"))
        result[name] = node
    return result


def _whole_shape(parts: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(out, in) of the matrix that `parts` stand for; else `UserError`."""
    if not {"values", "scales"} <= parts.keys() <= PARTS or any(isinstance(part, Mapping) for part in parts.values()):
        raise UserError(f"{where}: a quantised matrix has values and scales, and minima if any, got {sorted(parts)}")
    values, scales, minima = parts["values"], parts["scales"], parts.get("minima")
    dtype = np.dtype(values.dtype).name
    if dtype not in _VALUES or len(values.shape) != 2 or not 1 <= len(scales.shape) <= 2:
        raise UserError(
            f"{where}: values of {dtype} {list(values.shape)} with scales {list(scales.shape)} are no matrix"
        )
    packed = _VALUES[dtype] > 1
    out, width = values.shape[0], values.shape[1] * _VALUES[dtype]
    grouped = len(scales.shape) == 2
    fits = scales.shape[0] == out and (grouped or not packed) and (minima is None or packed)
    if grouped:
        fits = fits and scales.shape[1] > 0 and width % scales.shape[1] == 0 and width // scales.shape[1] in GROUPS
        fits = fits and (dtype != "uint16" or scales.shape[1] % 4 == 0)
    if not fits or (minima is not None and tuple(minima.shape) != tuple(scales.shape)):
        raise UserError(f"{where}: values {list(values.shape)} and scales {list(scales.shape)} do not fit each other")
    for part in (scales, *([] if minima is None else [minima])):
        if np.dtype(part.dtype).name not in ("float16", "float32"):
            raise UserError(f"{where}: scales must be float16 or float32, got {np.dtype(part.dtype).name}")
    return out, width
