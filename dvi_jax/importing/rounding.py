"""Rounding matrices to 8 and 4 bits, as numpy arrays, a few rows at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from dvi_jax.model.quantised import OFFSET, PACKING, Quantised
from dvi_jax.quantisation import GROUPS, Quantisation

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_LARGEST_INT8 = 127
_LARGEST_FLOAT8 = float(ml_dtypes.finfo(FLOAT8).max)
_LARGEST_INT4 = 7
# What the range of four bits may be made smaller by, so that most of a group is rounded more finely.
SHRINKINGS = np.linspace(1.0, 0.7, 13, dtype=np.float32)


def rounded(rows: np.ndarray, how: Quantisation) -> Quantised:
    """`rows` [n, in] in the format of `how`; int8 where int4 finds no groups."""
    rows = rows.astype(np.float32, copy=False)
    if how.weights == "float8":
        scales = _scales(np.abs(rows).max(axis=1), _LARGEST_FLOAT8)
        return Quantised((rows / scales[:, None]).astype(FLOAT8), scales)
    group = group_of(rows.shape[1], how.group)
    if how.weights == "int8" or group is None:
        scales = _scales(np.abs(rows).max(axis=1), _LARGEST_INT8)
        return Quantised(np.rint(rows / scales[:, None]).astype(np.int8), scales)
    grouped = rows.reshape(len(rows), -1, group)
    scales = group_scales(grouped)
    integers = np.clip(np.rint(grouped / scales[..., None].astype(np.float32)), -OFFSET, _LARGEST_INT4)
    return Quantised(packed((integers + OFFSET).astype(np.uint8)), scales)


def group_of(width: int, most: int) -> int | None:
    """Inputs that share a scale of int4 in rows of `width`: `most` or the next fewer that divides; None for none."""
    return next((size for size in GROUPS if size <= most and width % size == 0), None)


def group_scales(grouped: np.ndarray) -> np.ndarray:
    """float16 scales [n, G] of groups [n, G, size]: of several ranges for each, that of the least squared error."""
    largest = np.abs(grouped).max(axis=2)
    best, least = np.zeros_like(largest), np.full_like(largest, np.inf)
    for shrinking in SHRINKINGS:
        scales = _scales(largest * shrinking, _LARGEST_INT4).astype(np.float16).astype(np.float32)
        integers = np.clip(np.rint(grouped / scales[..., None]), -OFFSET, _LARGEST_INT4)
        error = np.square(integers * scales[..., None] - grouped).sum(axis=2)
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best.astype(np.float16)


def packed(integers: np.ndarray) -> np.ndarray:
    """uint8 [n, G, size] from 0 to 15 -> words uint16 [n, G * size / 4], or bytes, as `Quantised` has them."""
    count, groups, size = integers.shape
    if groups % PACKING["uint16"]:
        planes = integers.reshape(count, groups, 2, size // 2)
    else:
        planes = integers.reshape(count, groups // 4, 4, size).astype(np.uint16)
    result = planes[:, :, 0].copy()
    for plane in range(1, planes.shape[2]):
        result |= planes[:, :, plane] << 4 * plane
    return result.reshape(count, -1)


def _scales(largest: np.ndarray, most: float) -> np.ndarray:
    """What `most` times them is `largest`; of the smallest that float16 divides by where there is nothing to scale."""
    return np.maximum(largest / most, np.finfo(np.float16).tiny).astype(np.float32)
