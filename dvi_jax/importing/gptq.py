"""Rounding to four bits by what a model does with its weights: GPTQ (Frantar et al., arXiv 2210.17323).

Column after column is rounded, and what that changes in the matrix's outputs on a calibration text is taken up by the
columns that are still to come. Layers are done in order, each on what the rounded layers below give it.

Letters as in `model/layers.py`; O outputs and I inputs of a matrix, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.architecture import LlamaConfig
from dvi_jax.importing.rounding import SHRINKINGS, group_of, packed, rounded
from dvi_jax.model import attention
from dvi_jax.model.products import linear
from dvi_jax.model.quantised import OFFSET, Quantised
from dvi_jax.model.residual import rms_norm
from dvi_jax.quantisation import Quantisation

_DAMPING = 0.01  # of the mean diagonal, added to it: inputs that never vary have an inverse too (the paper's value)
_SHORTEST = 1e-6  # length of a row of zeros, which must not be divided by zero
_LARGEST = 7


def rounded_base(config: LlamaConfig, base: dict[str, Any], tokens: np.ndarray, how: Quantisation) -> dict[str, Any]:
    """A base tree of floating-point arrays with the matrices of its layers in int4, calibrated on int32 tokens [B, T].

    A head is rounded without calibration, where `how` has it.
    """
    x = jnp.asarray(base["embed"])[tokens].astype(jnp.float32)
    layers = {}
    for index in range(config.num_layers):
        layer = jax.tree.map(jnp.asarray, base["layers"][str(index)])
        inputs = x
        for name in ("qkv", "out", "gate_up", "down"):
            seen = _input_of(name, config, layer, inputs)
            layer[name] = jax.tree.map(jnp.asarray, _rounded(layer[name], seen, how).parts())
        x = _output(config, layer, inputs)
        layers[str(index)] = jax.tree.map(np.asarray, layer)
    result = base | {"layers": layers}
    if how.head:
        result["head"] = rounded(np.asarray(base.get("head", base["embed"])), how).parts()
    return result


def _rounded(weight: jax.Array, inputs: jax.Array, how: Quantisation) -> Quantised:
    """The matrix [O, I] that `inputs` [..., I] are multiplied with."""
    group = group_of(weight.shape[1], how.group)
    if group is None:
        return rounded(np.asarray(weight), how)
    integers, scales = gptq(weight.astype(jnp.float32), second_moments(inputs), group)
    return Quantised(packed(np.asarray(integers)), np.asarray(scales))


@jax.jit
def second_moments(inputs: jax.Array) -> jax.Array:
    """float32 [I, I], the sum of x x^T over rows x of `inputs` [..., I], each brought to length one.

    Half the Hessian of a squared error relative to x. Not of the error itself, as in the paper: a few positions, where
    attention rests, have inputs a thousand times as large, and would be all that the rounding cares for.
    """
    rows = inputs.reshape(-1, inputs.shape[-1]).astype(jnp.float32)
    rows /= jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), _SHORTEST)
    return jnp.matmul(rows.T, rows, precision="highest")


@partial(jax.jit, static_argnames="group")
def gptq(weight: jax.Array, moments: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """float32 `weight` [O, I] and `second_moments` [I, I] -> uint8 integers [O, G, group] and float16 scales [O, G].

    The integers are offset as in a `Quantised`. The paper's algorithm in blocks of one group, whose scales are chosen
    when its columns have taken up the errors of all before them.
    """
    out, width = weight.shape
    damping = _DAMPING * jnp.mean(jnp.diag(moments)) + 1e-12
    inverse = jnp.linalg.inv(moments + damping * jnp.eye(width))
    # Row i of the upper factor: how the columns behind i take up an error in column i.
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T

    def of_group(number: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        weight, integers, scales = carry
        start = number * group
        block = jax.lax.dynamic_slice(weight, (0, start), (out, group))
        rows = jax.lax.dynamic_slice(upper, (start, 0), (group, width))
        within = jax.lax.dynamic_slice(rows, (0, start), (group, group))
        scale = _scales(block)

        def of_column(i: jax.Array, inner: tuple[Any, ...]) -> tuple[Any, ...]:
            block, chosen, errors = inner
            column = jax.lax.dynamic_index_in_dim(block, i, 1, keepdims=False)
            integer = jnp.clip(jnp.rint(column / scale), -OFFSET, _LARGEST)
            error = (column - integer * scale) / within[i, i]
            block = block - error[:, None] * within[i]  # zero before i
            return block, chosen.at[:, i].set(integer), errors.at[:, i].set(error)

        _, chosen, errors = jax.lax.fori_loop(
            0, group, of_column, (block, jnp.zeros_like(block), jnp.zeros_like(block))
        )
        later = jnp.arange(width) >= start + group
        weight = weight - jnp.where(later, jnp.matmul(errors, rows, precision="highest"), 0)
        integers = jax.lax.dynamic_update_index_in_dim(integers, (chosen + OFFSET).astype(jnp.uint8), number, 1)
        return weight, integers, scales.at[:, number].set(scale.astype(jnp.float16))

    groups = width // group
    start = weight, jnp.zeros((out, groups, group), jnp.uint8), jnp.zeros((out, groups), jnp.float16)
    return jax.lax.fori_loop(0, groups, of_group, start)[1:]


def _scales(block: jax.Array) -> jax.Array:
    """float32 [O] that float16 holds, of a group [O, size]: as `rounding.group_scales` chooses them."""
    largest = jnp.abs(block).max(axis=1)
    least_scale = float(np.finfo(np.float16).tiny)
    candidates = jnp.maximum(largest * jnp.asarray(SHRINKINGS)[:, None] / _LARGEST, least_scale)  # [shrinkings, O]
    candidates = candidates.astype(jnp.float16).astype(jnp.float32)

    def error(scale: jax.Array) -> jax.Array:
        near = jnp.clip(jnp.rint(block / scale[:, None]), -OFFSET, _LARGEST) * scale[:, None]
        return jnp.square(near - block).sum(axis=1)

    best = jnp.argmin(jax.lax.map(error, candidates), axis=0)
    return jnp.take_along_axis(candidates, best[None], axis=0)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _input_of(name: str, config: LlamaConfig, layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """What the matrix `name` of a layer is multiplied with, when x [B, T, D] enters the layer."""
    return _run(config, layer, x)[name]


@partial(jax.jit, static_argnums=0)
def _output(config: LlamaConfig, layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return _run(config, layer, x)["output"]


def _run(config: LlamaConfig, layer: Mapping[str, Any], x: jax.Array) -> dict[str, jax.Array]:
    """A layer's inputs of every matrix, [B, T, ...], and its output, for x [B, T, D] from position 0 on."""
    weights: dict[str, Any] = {
        name: Quantised.of(part) if isinstance(part, Mapping) else part for name, part in layer.items()
    }
    seen: dict[str, jax.Array] = {}

    def product(name: str, rows: jax.Array) -> jax.Array:
        seen[name] = rows
        weight = weights[name]
        return linear(rows, weight if isinstance(weight, Quantised) else weight.astype(rows.dtype))

    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    frequencies = attention.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    rope = attention.rope_tables(frequencies, positions)
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    qkv = product("qkv", rms_norm(x, weights["attn_norm"], config.rms_norm_eps))
    mixed, _ = attention.attend_fresh(qkv[None], heads, rope, None, positions, weights.get("qkv_bias"))
    x = x + product("out", mixed)
    gate, up = jnp.split(product("gate_up", rms_norm(x, weights["mlp_norm"], config.rms_norm_eps)), 2, axis=-1)
    return seen | {"output": x + product("down", jax.nn.silu(gate) * up)}
