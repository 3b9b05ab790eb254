"""Hugging Face Llama directories: the config, in both directions, and the weight files.

Everything that is not a plain Llama (another architecture, biases, an unknown rotary scaling, quantised
weights) is refused here, before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from conversion.safetensors_file import SafetensorsFile
from conversion.tensors import Rows, TensorSource
from conversion.torch_file import TorchFile
from dvi_jax.config import LlamaConfig
from dvi_jax.errors import UserError
from dvi_jax.importing.files import read_json_object

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# What a plain Llama has for the settings that would change its computation: key -> values accepted.
_PLAIN = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
}
# Our name -> (Hugging Face's name, its default there).
_REQUIRED = object()
_FIELDS = {
    "vocab_size": ("vocab_size", _REQUIRED),
    "hidden_size": ("hidden_size", _REQUIRED),
    "intermediate_size": ("intermediate_size", _REQUIRED),
    "num_layers": ("num_hidden_layers", _REQUIRED),
    "num_heads": ("num_attention_heads", _REQUIRED),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_FILE_NAME = re.compile(r"\w[\w.-]{0,199}", re.ASCII)  # so it lies in the directory itself
_LARGEST = 1e30  # of a number that becomes a float


def read_config(directory: Path) -> LlamaConfig:
    """The architecture of a Hugging Face directory; anything but a plain Llama is a `UserError`."""
    path = directory / "config.json"
    data = read_json_object(path)
    _refuse_other_models(data, path)
    generation = directory / "generation_config.json"
    if generation.exists():
        # Hugging Face's own `generate` obeys this file where the two disagree.
        eos = read_json_object(generation).get("eos_token_id")
        data = data if eos is None else data | {"eos_token_id": eos}
    return parse_config(data, path)


def parse_config(data: dict[str, Any], where: object) -> LlamaConfig:
    """A `config.json` object as `LlamaConfig`, with Hugging Face's defaults for what it leaves out."""
    values: dict[str, Any] = {}
    for name, (key, default) in _FIELDS.items():
        values[name] = data.get(key, default)
        if values[name] is _REQUIRED or values[name] is None:
            raise UserError(f"{where}: {key} is missing; every Llama config states it")
    heads, width = values["num_heads"], values["hidden_size"]
    values["num_kv_heads"] = _or(data.get("num_key_value_heads"), heads)
    head_dim = data.get("head_dim")
    if head_dim is None:
        if type(heads) is not int or type(width) is not int or heads < 1 or width % heads:
            raise UserError(f"{where}: hidden_size={width} must be a multiple of num_attention_heads={heads}")
        head_dim = width // heads
    rope = data.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters must be an object, got {rope!r:.100}")
    values |= {
        "head_dim": head_dim,
        "rope_theta": _or(data.get("rope_theta"), rope.get("rope_theta", 10000.0)),
        "rope_scaling": _parse_rope_scaling(data.get("rope_scaling") or rope, where),
        # Hugging Face's defaults for keys that are absent; null is none.
        "bos_token_id": data.get("bos_token_id", 1),
        "eos_token_ids": _as_list(data.get("eos_token_id", 2)),
    }
    return _checked(LlamaConfig.from_json(values, str(where)), where)


def config_to_hf(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` object that transformers (4.33 and later) reads as this model."""
    eos = list(config.eos_token_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_to_hf(config),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "torch_dtype": dtype,
    }


def open_weights(directory: Path) -> TensorSource:
    """The weights of a directory: safetensors first, then PyTorch files, each whole or in shards."""
    candidates: list[tuple[str, Callable[[Path], TensorSource]]] = [
        (SAFETENSORS, SafetensorsFile),
        (SAFETENSORS_INDEX, partial(_open_shards, SafetensorsFile)),
        (TORCH, TorchFile),
        (TORCH_INDEX, partial(_open_shards, TorchFile)),
    ]
    for name, opener in candidates:
        if (directory / name).exists():
            return opener(directory / name)
    names = ", ".join(name for name, _ in candidates)
    raise UserError(f"{directory} holds no weights: expected one of {names}")


def is_ignored(name: str) -> bool:
    """Buffers that older files carry and the config determines."""
    return _IGNORED.search(name) is not None


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


def _open_shards(kind: Callable[[Path], TensorSource], index: Path) -> TensorSource:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map from tensor to file")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise UserError(f"{index}: the file of {tensor[:256]} must be a plain file name, got {name!r:.100}")
        names.add(name)
    shards = Shards(index.name, [kind(index.parent / name) for name in sorted(names)])
    for tensor in weight_map:
        if tensor not in shards.shapes:
            raise UserError(f"{index.name} lists tensor {tensor[:256]}, but {weight_map[tensor]} does not hold it")
    return shards


def _refuse_other_models(data: dict[str, Any], where: object) -> None:
    model_type, architectures = data.get("model_type"), data.get("architectures")
    if model_type != "llama":
        raise UserError(f"{where}: model_type is {model_type!r:.100}; only plain 'llama' models can be imported")
    if architectures and architectures not in (["LlamaForCausalLM"], ["LLaMAForCausalLM"]):
        raise UserError(f"{where}: architectures is {architectures!r:.100}; only LlamaForCausalLM can be imported")
    for key, accepted in _PLAIN.items():
        if data.get(key) not in accepted:
            raise UserError(
                f"{where}: {key}={data[key]!r:.100} is not part of a plain Llama (expected {accepted[0]!r})"
            )


def _parse_rope_scaling(scaling: Any, where: object) -> dict[str, Any] | None:
    if not isinstance(scaling, dict):
        raise UserError(f"{where}: rope_scaling must be an object, got {scaling!r:.100}")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in (None, "default"):
        return None
    keys = {"linear": ("factor",), "llama3": _LLAMA3_KEYS}.get(kind) if isinstance(kind, str) else None
    if keys is None:
        raise UserError(f"{where}: rope_scaling type {kind!r:.100} is not supported, only linear and llama3")
    for key in keys:
        if type(scaling.get(key)) not in (int, float) or not 0 < scaling[key] < _LARGEST:
            raise UserError(f"{where}: rope_scaling.{key} must be a number above 0, got {scaling.get(key)!r:.100}")
    return {"kind": kind} | {key: scaling[key] for key in keys}


_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope_scaling_to_hf(config: LlamaConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.kind == "linear":
        # transformers 4.33.3 accepts exactly these two keys.
        return {"type": "linear", "factor": scaling.factor}
    return {"rope_type": "llama3"} | {key: getattr(scaling, key) for key in _LLAMA3_KEYS}


def _checked(config: LlamaConfig, where: object) -> LlamaConfig:
    for name in ("rms_norm_eps", "rope_theta"):
        value = getattr(config, name)
        if not 0 < value < _LARGEST:
            raise UserError(f"{where}: {name} must be a finite number above 0, got {value!r}")
    for token in config.eos_token_ids:
        if not 0 <= token < config.vocab_size:
            raise UserError(f"{where}: eos_token_id {token} is outside the vocabulary of {config.vocab_size}")
    return config


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
