"""Random weights in fewer bits, made on the device as they are kept: for speed, which no value changes."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dvi_jax.config import LlamaConfig
from dvi_jax.importing.rounding import group_of
from dvi_jax.model.llama import base_shapes
from dvi_jax.model.quantised import PACKING, Quantised
from dvi_jax.quantisation import Quantisation

_STD = 0.02  # of the weights
_INTEGERS = {"int8": 73.3, "float8": 64.0, "int4": 4.61}  # standard deviation of what is scaled


def random_quantised_base(config: LlamaConfig, key: jax.Array, dtype: jnp.dtype, how: Quantisation) -> dict[str, Any]:
    """`llama.random_base` with matrices in the format of `how`, never in a wider one."""
    shapes = base_shapes(config)
    chosen = sorted(name for name in shapes["layers"]["0"] if how.includes((name,)))
    layers = {}
    for index, layer in shapes["layers"].items():
        made = {name: jnp.ones(shape, dtype) for name, shape in layer.items() if name.endswith("norm")}
        made |= {name: jnp.zeros(shape, dtype) for name, shape in layer.items() if name.endswith("bias")}
        for name in chosen:
            key, used = jax.random.split(key)
            made[name] = random_matrix(layer[name], used, how).parts()
        layers[index] = made
    base = {"layers": layers, "norm": jnp.ones(shapes["norm"], dtype)}
    for name in ("embed", "head"):
        if name in shapes:
            base[name] = _normal(shapes[name], key, dtype)
    if how.head:
        base["head"] = random_matrix(shapes["embed"], key, how).parts()
    return base


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(shape: tuple[int, ...], key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _STD * jax.random.normal(key, shape, dtype)


@partial(jax.jit, static_argnames=("shape", "how"))
def random_matrix(shape: tuple[int, int], key: jax.Array, how: Quantisation) -> Quantised:
    """A matrix of `shape` in the format of `how`, int8 where int4 finds no groups."""
    out, width = shape
    group = group_of(width, how.group) if how.weights == "int4" else None
    if group is not None:
        scales = jnp.full((out, width // group), _STD / _INTEGERS["int4"], jnp.float16)
        packed = jnp.uint8 if width // group % PACKING["uint16"] else jnp.uint16
        return Quantised(jax.random.bits(key, (out, width // PACKING[jnp.dtype(packed).name]), packed), scales)
    if how.weights == "float8":
        values = (_INTEGERS["float8"] * jax.random.normal(key, shape, jnp.bfloat16)).astype(jnp.float8_e4m3fn)
        return Quantised(values, jnp.full((out,), _STD / _INTEGERS["float8"], jnp.float32))
    scales = jnp.full((out,), _STD / _INTEGERS["int8"], jnp.float32)
    return Quantised(jax.random.randint(key, shape, -127, 128, jnp.int8), scales)
