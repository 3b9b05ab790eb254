"""Matrices in 8 or 4 bits: what they are kept as, and what they stand for.

A matrix [out, in] is kept as integers, or eight-bit floats, and scales: one for each output channel, or one for each
group of inputs of a channel; weight = scale * integer, plus a minimum where a matrix has those. Every part has the
output channels first, so that it can be cut, taken and joined along them as the matrix itself could be.

Four-bit integers lie two to a byte: byte j of a group's `group / 2` has term j in its low and term j + group / 2 in its
high four bits, offset by 8 where there are no minima. These are the blocks of ggml's Q4_0 and Q4_1, so a GGUF file's
integers can be kept as they are.

Letters: O output channels, I inputs, G groups of a channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dvi_jax.model.variables import Base

OFFSET = 8  # what four bits without minima are more than the integer they stand for


class Quantised(NamedTuple):
    """A matrix [O, I] in fewer bits; arrays may be numpy's."""

    values: Any  # int8 or float8_e4m3fn [O, I]; two four-bit integers a byte, uint8 [O, I / 2]
    scales: Any  # float32 [O], one for each channel, or float16 [O, G]
    minima: Any = None  # float16 [O, G]; only with four bits

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that it stands for: (O, I)."""
        out, width = self.values.shape
        return out, width * (2 if self.is_packed else 1)

    @property
    def is_packed(self) -> bool:
        """Whether a byte holds two values."""
        return self.values.dtype == jnp.uint8

    @property
    def is_grouped(self) -> bool:
        """Whether every group of inputs has a scale, and not only every channel."""
        return self.scales.ndim == 2

    @property
    def group(self) -> int:
        """Inputs that share a scale: all of a channel where it isn't grouped."""
        return self.shape[1] // self.scales.shape[1] if self.is_grouped else self.shape[1]

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> Quantised:
        """From its fields by name, as a base tree has them."""
        return cls(**parts)

    def parts(self) -> dict[str, Any]:
        """Its fields by name, for a base tree."""
        return {name: part for name, part in self._asdict().items() if part is not None}

    def rows(self, chosen: Any) -> Quantised:
        """The output channels `chosen`: a slice, or int32 [n]."""
        return jax.tree.map(lambda part: part[chosen], self)

    def integers(self) -> Any:
        """What the scales are for: [O, I] as kept, or uint8 [O, I] from 0 to 15."""
        if not self.is_packed:
            return self.values
        out, width = self.shape
        halves = self.values.reshape(out, width // self.group, 1, self.group // 2)
        joined = np.concatenate if isinstance(halves, np.ndarray) else jnp.concatenate
        return joined([halves & 15, halves >> 4], axis=2).reshape(out, width)

    def dequantised(self, dtype: Any) -> Any:
        """The matrix [O, I] in `dtype`: worked out in float32 and rounded once; by numpy where the parts are."""
        whole = self.integers().astype(jnp.float32)
        if not self.is_grouped:
            return (whole * self.scales[:, None].astype(jnp.float32)).astype(dtype)
        grouped = whole.reshape(*self.scales.shape, self.group)
        scales = self.scales[..., None].astype(jnp.float32)
        if self.minima is not None:
            grouped = grouped * scales + self.minima[..., None].astype(jnp.float32)
        else:
            grouped = (grouped - (OFFSET if self.is_packed else 0)) * scales
        return grouped.reshape(self.shape).astype(dtype)


Matrix = jax.Array | Quantised  # what a product takes for a weight


class QuantisedWeight(nnx.Module):
    """A frozen matrix of the model in fewer bits, where else a `Base` variable stands."""

    def __init__(self, parts: Mapping[str, Any]):
        """`parts`: the fields of a `Quantised` by name, as a base tree has them."""
        self.values, self.scales = Base(parts["values"]), Base(parts["scales"])
        self.has_minima = "minima" in parts
        if self.has_minima:
            self.minima = Base(parts["minima"])

    def __getitem__(self, everything: Any) -> Quantised:
        """The matrix, by [...] as a variable's array is had."""
        return Quantised(
            self.values[everything], self.scales[everything], self.minima[everything] if self.has_minima else None
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that it stands for: (O, I)."""
        return self[...].shape


def frozen(weight: Any) -> Base | QuantisedWeight:
    """A weight of a base tree, array or parts of a quantised matrix, as what a module holds."""
    return QuantisedWeight(weight) if isinstance(weight, Mapping) else Base(weight)
