"""The two LoRA sets of DVI: lora_S for drafting, lora_D for the verifier. Inject, count, merge.

Each set is a variable type (`variables.py`), so `nnx.split(model, ShallowLoRA, DeepLoRA, ...)` separates them and
optimisers, gradients and checkpoints cannot mix them up.
"""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np
from flax import nnx

from dvi_jax.errors import UserError
from dvi_jax.model.drafters import BlockDrafter
from dvi_jax.model.layers import LoRA
from dvi_jax.model.quantised import Quantised
from dvi_jax.model.speculative_llama import SpeculativeLlama
from dvi_jax.model.variables import DeepLoRA, ShallowLoRA

TARGETS = ("qkv", "out", "gate_up", "down")


def inject_dual_lora(
    model: SpeculativeLlama,
    *,
    rank_s: int,
    rank_d: int,
    key: jax.Array,
    alpha_s: float | None = None,
    alpha_d: float | None = None,
) -> SpeculativeLlama:
    """Put lora_S of `rank_s` on every shallow matrix and lora_D of `rank_d` on every deep one, in place.

    Rank 0 leaves a set out; alpha defaults to the rank (scale 1). B starts at zero: output is unchanged until trained.
    A lora_S in the shallow layers makes the trunk separate (see `SpeculativeLlama`); a block drafter's drafts do not go
    through shallow layers, and such a trunk would lack them: `UserError`, as without shallow layers. Returns `model`.
    """
    llama = model.llama
    if rank_s and isinstance(model.drafter, BlockDrafter):
        raise UserError(f"drafter {model.drafter.kind} drafts whole blocks: it takes no lora_S in the shallow layers")
    if rank_s and not llama.exit_layer:
        raise UserError("a lora_S in the shallow layers takes an exit layer, and this drafter has none")
    for index, layer in enumerate(llama.layers):
        below = index < llama.exit_layer
        rank = rank_s if below else rank_d
        if not rank:
            continue
        alpha = (alpha_s if below else alpha_d) or float(rank)
        for name in TARGETS:
            key, used = jax.random.split(key)
            kind = ShallowLoRA if below else DeepLoRA
            layer.lora[name] = LoRA.create(kind, getattr(layer, name).shape, rank, alpha, used)
    model.separate_trunk = model.separate_trunk or rank_s > 0
    return model


def count_lora(model: SpeculativeLlama) -> tuple[int, int]:
    """Number of parameters in lora_S and in lora_D."""
    shallow, deep, _ = nnx.split_state(nnx.state(model), ShallowLoRA, DeepLoRA, ...)
    return tuple(sum(leaf.size for leaf in jax.tree.leaves(state)) for state in (shallow, deep))


def merge_lora(base: dict[str, Any], adapters: dict[str, Any], scale: float) -> dict[str, Any]:
    """Fold one set into a base weight tree: W + scale * B A, computed in float32, in W's dtype.

    A quantised W becomes an array of the embedding's dtype: rounded again, it would lose what was learned.

    `adapters`: {"layers": {i: {"lora": {name: {"a": [R, in], "b": [out, R]}}}}}, as `Params` and checkpoints hold them.
    """
    merged = copy.deepcopy(base)
    for index, layer in adapters.get("layers", {}).items():
        for name, pair in layer["lora"].items():
            weight = merged["layers"][str(index)][name]
            if isinstance(weight, dict):
                weight = Quantised.of(weight).dequantised(merged["embed"].dtype)
            weight = np.asarray(weight)
            delta = np.asarray(pair["b"], np.float32) @ np.asarray(pair["a"], np.float32) * scale
            merged["layers"][str(index)][name] = (weight.astype(np.float32) + delta).astype(weight.dtype)
    return merged
