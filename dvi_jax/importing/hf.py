"""Hugging Face's config.json of a Llama and its near relatives, in both directions.

Everything else (another architecture, other biases, an unknown rotary scaling, a sliding window that takes effect,
quantised weights) is refused here, before any weight is read.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from dvi_jax.config import LlamaConfig
from dvi_jax.errors import UserError
from dvi_jax.importing.families import Family, family_of
from dvi_jax.importing.files import read_json_object

# What a plain Llama has for the settings that would change its computation: key -> values accepted.
_PLAIN = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
# Our name -> (Hugging Face's name, its default there).
_REQUIRED = object()
_FIELDS = {
    "vocab_size": ("vocab_size", _REQUIRED),
    "hidden_size": ("hidden_size", _REQUIRED),
    "intermediate_size": ("intermediate_size", _REQUIRED),
    "num_layers": ("num_hidden_layers", _REQUIRED),
    "num_heads": ("num_attention_heads", _REQUIRED),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_LARGEST = 1e30  # of a number that becomes a float
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_UNSCALED_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_config(directory: Path) -> LlamaConfig:
    """The architecture of a Hugging Face directory; what cannot be computed here is a `UserError`."""
    path = directory / "config.json"
    data = read_json_object(path)
    generation = directory / "generation_config.json"
    if generation.exists():
        # Hugging Face's own `generate` obeys this file where the two disagree.
        eos = read_json_object(generation).get("eos_token_id")
        data = data if eos is None else data | {"eos_token_id": eos}
    return parse_config(data, path)


def parse_config(data: dict[str, Any], where: object) -> LlamaConfig:
    """A `config.json` object as `LlamaConfig`, with Hugging Face's defaults for what it leaves out."""
    family = family_of(data.get("model_type"), where)
    _refuse_other_models(data, family, where)
    values: dict[str, Any] = {"model_type": family.model_type}
    for name, (key, default) in _FIELDS.items():
        values[name] = default if data.get(key) is None else data[key]
        if values[name] is _REQUIRED:
            raise UserError(f"{where}: {key} is missing; every config of a Llama states it")
    heads, width = values["num_heads"], values["hidden_size"]
    values["num_kv_heads"] = _or(data.get("num_key_value_heads", _or(family.num_kv_heads, heads)), heads)
    head_dim = data.get("head_dim")
    if head_dim is None:
        if type(heads) is not int or type(width) is not int or heads < 1 or width % heads:
            raise UserError(f"{where}: hidden_size={width} must be a multiple of num_attention_heads={heads}")
        head_dim = width // heads
    rope = _rope_parameters(data, where)
    for name, number in (("rope_theta", rope.get("rope_theta", 10000.0)), ("rms_norm_eps", values["rms_norm_eps"])):
        if type(number) not in (int, float):
            raise UserError(f"{where}: {name} must be a number, got {number!r:.100}")
    eos = data.get("eos_token_id", _within(family.eos_token_id, values["vocab_size"]))
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    bos = data.get("bos_token_id", _within(family.bos_token_id, values["vocab_size"]))
    for name, token in (("bos_token_id", bos), *(("eos_token_id", token) for token in eos)):
        if type(token) is not int and not (token is None and name == "bos_token_id"):
            raise UserError(f"{where}: {name} must be a token id, got {token!r:.100}")
    values |= {
        "head_dim": head_dim,
        "max_position_embeddings": _or(data.get("max_position_embeddings"), family.max_position_embeddings),
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": _parse_rope_scaling(rope, where),
        "bos_token_id": bos,
        "eos_token_ids": eos,
    }
    config = _checked(LlamaConfig.from_json(values, str(where)), where)
    return _inside_window(config, data, family, where)


def config_to_hf(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` object that transformers reads as this model: 4.33 and later, Qwen2 from 4.37 on."""
    eos = list(config.eos_token_ids)
    own: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": False, "mlp_bias": False},
        "mistral": {"sliding_window": None},
        "qwen2": {"use_sliding_window": False},
    }
    return {
        "architectures": [family_of(config.model_type, "config").architectures[0]],
        "model_type": config.model_type,
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
        **own[config.model_type],
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "torch_dtype": dtype,
    }


def is_ignored(name: str) -> bool:
    """Buffers that older files carry and the config determines."""
    return _IGNORED.search(name) is not None


def _refuse_other_models(data: dict[str, Any], family: Family, where: object) -> None:
    architectures = data.get("architectures")
    if architectures and architectures not in [[name] for name in family.architectures]:
        raise UserError(
            f"{where}: architectures is {architectures!r:.100}; only {family.architectures[0]} can be imported"
        )
    for key, accepted in _PLAIN.items():
        if data.get(key) not in accepted:
            raise UserError(
                f"{where}: {key}={data[key]!r:.100} is not part of a plain Llama (expected {accepted[0]!r})"
            )


def _rope_parameters(data: dict[str, Any], where: object) -> dict[str, Any]:
    """What a config says of its rotary positions, as one object: `rope_parameters` (transformers 5) before the rest."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = data.get(key) or {}
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} must be an object, got {value!r:.100}")
        kind = _or(value.get("rope_type"), value.get("type"))
        if kind is None and value.keys() - _UNSCALED_KEYS:
            raise UserError(f"{where}: {key}={value!r:.100} has no type: rope_type says which, linear or llama3")
        if kind is not None:
            found = {"kind": kind}
        found |= {name: number for name, number in value.items() if number is not None}
    if data.get("rope_theta") is not None:
        found.setdefault("rope_theta", data["rope_theta"])
    if found.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{where}: partial_rotary_factor={found['partial_rotary_factor']!r:.100} is not supported")
    return found


def _parse_rope_scaling(rope: dict[str, Any], where: object) -> dict[str, Any] | None:
    kind = rope.get("kind", "default")
    if kind == "default":
        return None
    keys = {"linear": ("factor",), "llama3": _LLAMA3_KEYS}.get(kind) if isinstance(kind, str) else None
    if keys is None:
        raise UserError(f"{where}: rope_scaling type {kind!r:.100} is not supported, only linear and llama3")
    for key in keys:
        if type(rope.get(key)) not in (int, float) or not 0 < rope[key] < _LARGEST:
            raise UserError(f"{where}: rope_scaling.{key} must be a number above 0, got {rope.get(key)!r:.100}")
    return {"kind": kind} | {key: rope[key] for key in keys}


def _rope_scaling_to_hf(config: LlamaConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.kind == "linear":
        # transformers 4.33.3 accepts exactly these two keys.
        return {"type": "linear", "factor": scaling.factor}
    return {"rope_type": "llama3"} | {key: getattr(scaling, key) for key in _LLAMA3_KEYS}


def _inside_window(config: LlamaConfig, data: dict[str, Any], family: Family, where: object) -> LlamaConfig:
    """`config`, once no position of its context is beyond a sliding window.

    A window that a config only has by its family's default bounds the context; one that it states is refused.
    """
    window = data.get("sliding_window", family.sliding_window)
    if window is None or not _has_sliding_layers(config, data, family):
        return config
    if type(window) is not int or window < 1:
        raise UserError(f"{where}: sliding_window must be a whole number above 0, got {window!r:.100}")
    if window >= config.context_length:
        return config
    if "sliding_window" not in data and config.rope_scaling is None:
        return replace(config, max_position_embeddings=window)
    raise UserError(
        f"{where}: sliding_window={window} is shorter than the context of {config.context_length};"
        " attention through a sliding window is not supported"
    )


def _has_sliding_layers(config: LlamaConfig, data: dict[str, Any], family: Family) -> bool:
    if family.model_type != "qwen2":
        return True
    if not data.get("use_sliding_window", False):
        return False
    kinds = data.get("layer_types")
    if isinstance(kinds, list):
        return kinds != ["full_attention"] * len(kinds)
    first = data.get("max_window_layers", 28)
    return type(first) is not int or first < config.num_layers


def _checked(config: LlamaConfig, where: object) -> LlamaConfig:
    for name in ("rms_norm_eps", "rope_theta"):
        value = getattr(config, name)
        if not 0 < value < _LARGEST:
            raise UserError(f"{where}: {name} must be a finite number above 0, got {value!r}")
    for token in config.eos_token_ids:
        if not 0 <= token < config.vocab_size:
            raise UserError(f"{where}: eos_token_id {token} is outside the vocabulary of {config.vocab_size}")
    return config


def _within(token: int | None, vocab_size: Any) -> int | None:
    """A family's default token, where the vocabulary is large enough to have it."""
    return token if token is not None and type(vocab_size) is int and token < vocab_size else None


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
