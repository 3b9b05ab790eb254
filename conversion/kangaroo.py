"""Kangaroo adapter directories (`config.json` + weights) to drafter trees, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from conversion.hf import TORCH, open_weights
from conversion.layout import attention_parts
from conversion.tensors import Slot, Tree, check_slots, get_path, load_tree
from conversion.torch_file import write_torch
from dvi_jax.config import LlamaConfig
from dvi_jax.errors import UserError
from dvi_jax.importing.files import read_json_object

_NAMES = {
    "attn_norm": "layers.0.input_layernorm.weight",
    "q": "layers.0.self_attn.q_proj.weight",
    "k": "layers.0.self_attn.k_proj.weight",
    "v": "layers.0.self_attn.v_proj.weight",
    "out": "layers.0.self_attn.o_proj.weight",
    "norm": "norm.weight",
}


def read_adapter(directory: Path, base: LlamaConfig, dtype: str) -> tuple[Tree, dict[str, Any]]:
    """(drafter tree, drafter_config) of an adapter that belongs to `base`.

    Tree: attn_norm [D], qkv [(N+2K)*H, D], out [D, N*H], norm [D]. Unknown tensors are ignored, as upstream
    does; a missing tensor, a wrong shape or another hidden size is a `UserError`.
    """
    config = _read_config(directory / "config.json", base)
    slots = _slots(base.hidden_size, config)
    source = open_weights(directory)
    return load_tree(source, check_slots(source, slots, ignored=lambda name: True), dtype), config


def write_adapter(directory: Path, drafter: Tree, config: dict[str, Any], base: LlamaConfig) -> None:
    """Write `config.json` and `pytorch_model.bin` as upstream reads them."""
    directory.mkdir(parents=True)
    tensors: dict[str, np.ndarray] = {
        slot.name: get_path(drafter, slot.path)[slot.rows] for slot in _slots(base.hidden_size, config)
    }
    write_torch(directory / TORCH, tensors)
    (directory / "config.json").write_text(json.dumps(_config_to_hf(config, base), indent=2), encoding="utf-8")


def _slots(width: int, config: dict[str, Any]) -> list[Slot]:
    head_dim = width // config["num_heads"]
    parts = attention_parts(width, config["num_heads"] * head_dim, config["num_kv_heads"] * head_dim)
    norms = [Slot(_NAMES[key], (key,), 0, (width,)) for key in ("attn_norm", "norm")]
    return norms + [Slot(_NAMES[part], (key,), start, shape) for part, key, start, shape in parts]


def _read_config(path: Path, base: LlamaConfig) -> dict[str, Any]:
    data = read_json_object(path)
    width, heads = data.get("hidden_size"), data.get("num_attention_heads")
    if width != base.hidden_size:
        raise UserError(f"{path}: hidden_size {width!r:.100} is not the base model's {base.hidden_size}")
    if data.get("num_hidden_layers", 1) != 1:
        raise UserError(f"{path}: num_hidden_layers is {data['num_hidden_layers']!r:.100}; an adapter has 1 layer")
    kv_heads = data.get("num_key_value_heads") or heads
    for name, value, whole in (
        ("num_attention_heads", heads, width),
        ("num_key_value_heads", kv_heads, heads),
    ):
        if type(value) is not int or value < 1 or whole % value:
            raise UserError(f"{path}: {name} must be a divisor of {whole}, got {value!r:.100}")
    if width // heads % 2:
        raise UserError(f"{path}: num_attention_heads={heads} gives heads of odd size {width // heads}")
    eps = data.get("rms_norm_eps", 1e-6)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise UserError(f"{path}: rms_norm_eps must be a small number above 0, got {eps!r:.100}")
    return {"num_heads": heads, "num_kv_heads": kv_heads, "rms_norm_eps": eps}


def _config_to_hf(config: dict[str, Any], base: LlamaConfig) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "hidden_size": base.hidden_size,
        "intermediate_size": base.intermediate_size,
        "max_position_embeddings": base.max_position_embeddings,
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": config["num_kv_heads"],
        "num_hidden_layers": 1,
        "rms_norm_eps": config["rms_norm_eps"],
        "vocab_size": base.vocab_size,
        "bos_token_id": base.bos_token_id,
        "eos_token_id": base.eos_token_ids[0] if base.eos_token_ids else None,
    }
