"""Matrices in 8 or 4 bits: what they are kept as, and what they stand for.

A matrix [out, in] is kept as integers, or eight-bit floats, and scales: one for each output channel, or one for each
group of inputs of a channel; weight = scale * integer, plus a minimum where a matrix has those. Every part has the
output channels first, so that it can be cut, taken and joined along them as the matrix itself could be.

Four-bit integers are offset by 8 where there are no minima. Where a channel's groups are a multiple of four, they lie
in words of 16 bits: word j of four groups has term j of each, the first group's in its lowest bits, so that what one
load brings serves four products, each with a scale of its own. Else they lie two to a byte: byte j of a group has term
j of its first half in the low bits and that of the second half in the high ones.

Letters: O output channels, I inputs, G groups of a channel, P integers of a byte or word.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dvi_jax.model.variables import Base

PACKING = {"uint8": 2, "uint16": 4}  # four-bit integers of a byte, and of a word
BY_GROUP = "group_"  # how names of arrays begin that a model has for groups, [G, O]
OFFSET = 8  # what four bits without minima are more than the integer they stand for


class Quantised(NamedTuple):
    """A matrix [O, I] in fewer bits; arrays may be numpy's."""

    values: Any  # int8 or float8_e4m3fn [O, I]; four-bit integers in words or bytes, uint16 or uint8 [O, I / P]
    scales: Any  # float32 [O], one for each channel, or float16 [O, G]
    minima: Any = None  # float16 [O, G]; only with four bits

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that it stands for: (O, I)."""
        out, width = self.values.shape
        return out, width * self.packing

    @property
    def packing(self) -> int:
        """P: how many integers an element of `values` holds."""
        return PACKING.get(jnp.dtype(self.values.dtype).name, 1)

    @property
    def is_packed(self) -> bool:
        """Whether the integers have four bits."""
        return self.packing > 1

    @property
    def is_grouped(self) -> bool:
        """Whether every group of inputs has a scale, and not only every channel."""
        return self.scales.ndim == 2

    @property
    def group(self) -> int:
        """Inputs that share a scale: all of a channel where it isn't grouped."""
        return self.shape[1] // self.scales.shape[1] if self.is_grouped else self.shape[1]

    @property
    def block(self) -> int:
        """Inputs that lie together: `values` may be cut along the inputs between blocks alone."""
        if self.is_packed:
            return self._block * self.packing
        return self.group if self.is_grouped else 1

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

    def dequantised(self, dtype: Any) -> Any:
        """The matrix [O, I] in `dtype`: worked out in float32 and rounded once; by numpy where the parts are."""
        if not self.is_packed:
            whole = self.values.astype(jnp.float32)
            scales = self.scales.astype(jnp.float32)
            if not self.is_grouped:
                return (whole * scales[:, None]).astype(dtype)
            return (whole.reshape(*scales.shape, -1) * scales[..., None]).reshape(self.shape).astype(dtype)
        joined = np.concatenate if isinstance(self.values, np.ndarray) else jnp.concatenate
        blocks = [plane[:, :, None] for plane in self._planes()]
        return joined(blocks, axis=2).reshape(self.shape).astype(dtype)

    def planes(self, dtype: Any) -> list[Any]:
        """Of packed values P matrices [O, I / P]: what the first integers of all elements stand for, the second, ..."""
        return [plane.reshape(len(plane), -1).astype(dtype) for plane in self._planes()]

    def inputs_of_planes(self, x: jax.Array) -> list[jax.Array]:
        """What of rows x [..., I] each of `planes` is multiplied with: P times [..., I / P]."""
        blocks = x.reshape(*x.shape[:-1], -1, self.packing, self._block)
        return [blocks[..., plane, :].reshape(*x.shape[:-1], -1) for plane in range(self.packing)]

    @property
    def _block(self) -> int:
        """Elements of `values` after which the inputs go on behind those of all planes."""
        return self.group if self.packing == PACKING["uint16"] else self.group // 2

    def _planes(self) -> list[Any]:
        """float32 [O, blocks, elements of a block] for each plane."""
        packed = self.values.reshape(len(self.values), -1, self._block)
        planes = []
        for plane in range(self.packing):
            integers = ((packed >> 4 * plane) & 15).astype(jnp.float32)
            # A byte's integers are of one group, a word's of four.
            chosen = slice(plane, None, 4) if self.packing == PACKING["uint16"] else slice(None)
            scales = self.scales[:, chosen, None].astype(jnp.float32)
            if self.minima is None:
                planes.append((integers - OFFSET) * scales)
            else:
                planes.append(integers * scales + self.minima[:, chosen, None].astype(jnp.float32))
        return planes


Matrix = jax.Array | Quantised  # what a product takes for a weight


class QuantisedWeight(nnx.Module):
    """A frozen matrix of the model in fewer bits, where else a `Base` variable stands.

    What a matrix has for each group lies here by groups, [G, O]: programs of a GPU work on neighbouring channels at a
    time, and find their scales side by side.
    """

    def __init__(self, parts: Mapping[str, Any]):
        """`parts`: the fields of a `Quantised` by name, as a base tree has them."""
        whole = Quantised.of(parts)
        self.values = Base(whole.values)
        self.is_grouped, self.has_minima = whole.is_grouped, whole.minima is not None
        if self.is_grouped:
            self.group_scales = Base(by_group(whole.scales))
        else:
            self.scales = Base(whole.scales)
        if self.has_minima:
            self.group_minima = Base(by_group(whole.minima))

    def __getitem__(self, everything: Any) -> Quantised:
        """The matrix, by [...] as a variable's array is had; XLA takes transposing out where it is transposed back."""
        return Quantised(
            self.values[everything],
            by_group(self.group_scales[everything]) if self.is_grouped else self.scales[everything],
            by_group(self.group_minima[everything]) if self.has_minima else None,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that it stands for: (O, I)."""
        return self[...].shape


@jax.jit
def by_group(scales: jax.Array) -> jax.Array:
    """What each channel has for its groups, [O, G], as each group has it for the channels, [G, O]; and back."""
    return scales.T


def frozen(weight: Any) -> Base | QuantisedWeight:
    """A weight of a base tree, array or parts of a quantised matrix, as what a module holds."""
    return QuantisedWeight(weight) if isinstance(weight, Mapping) else Base(weight)


def multiply_rows(weight: Base | QuantisedWeight, factors: jax.Array) -> None:
    """Row o of a matrix, or element o of a vector, times factors[o], in place; exact where they are powers of two."""
    if isinstance(weight, Base):
        weight.set_value(_times(weight[...], factors, axis=0))
        return
    for name in ("scales", "group_scales", "group_minima"):
        if hasattr(weight, name):
            part = getattr(weight, name)
            part.set_value(_times(part[...], factors, axis=part.ndim - 1))


@partial(jax.jit, static_argnames="axis")
def _times(x: jax.Array, factors: jax.Array, axis: int) -> jax.Array:
    """x, with O elements along `axis`, times factors float32 [O]; in x's dtype."""
    return (x * jnp.expand_dims(factors, [i for i in range(x.ndim) if i != axis])).astype(x.dtype)
