"""GGUF files of `llama` and `qwen2` models: the config from their metadata, the weights in Hugging Face's order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dvi_jax.config import LlamaConfig
from dvi_jax.errors import UserError
from dvi_jax.importing import gguf_blocks
from dvi_jax.importing.end_tokens import end_ids
from dvi_jax.importing.families import check_gguf_architecture
from dvi_jax.importing.gguf_file import GGUFFile, open_parts
from dvi_jax.importing.layout import GGUF_NAMES
from dvi_jax.importing.tensors import Rows
from dvi_jax.model.quantised import Quantised

_ROPE_FACTORS = "rope_freqs.weight"
_SMALLEST, _LARGEST = 1e-30, 1e30  # of a number that becomes a float32
# Every published Llama with this tensor (3.1 to 3.3) has these bounds; only the factor varies.
_LLAMA3_BOUNDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GGUFModel:
    """A GGUF file, or all parts of one, as a `TensorSource` with its `config`.

    `file` is the first part, whose metadata keeps tokenizer and template.
    """

    def __init__(self, path: Path) -> None:
        parts = open_parts(path)
        self.file = parts[0]
        self.label = path.name
        self.files: tuple[Path, ...] = tuple(part.path for part in parts)
        self._owner: dict[str, GGUFFile] = {}
        for part in parts:
            for name in part.tensors:
                if name in self._owner:
                    raise UserError(f"tensor {name} is in both {self._owner[name].path.name} and {part.path.name}")
                self._owner[name] = part
        self.shapes = {name: part.tensors[name].shape for name, part in self._owner.items()}
        self.config = _read_config(self.file, self._owner)
        # llama.cpp turns neighbouring pairs for `llama`, whose converter reorders rows for it; for `qwen2`, halves.
        self._reordered = self.file.metadata["general.architecture"] == "llama"

    def chunks(self, name: str) -> Iterator[tuple[Rows, np.ndarray]]:
        """As `TensorSource.chunks`, with the rotary permutation of q and k undone."""
        for rows, values in self._owner[name].rows(name, multiple=self._multiple(name)):
            yield self._original(name, rows), values

    def kept_form(self, name: str) -> tuple[str, int] | None:
        """As `QuantisedSource.kept_form`: the kind of block, where its integers can be kept as they are."""
        return gguf_blocks.form_of(self._owner[name].tensors[name].kind)

    def kept_chunks(self, name: str) -> Iterator[tuple[Rows, Quantised]]:
        """As `chunks`, of integers and scales as they are in the file."""
        file = self._owner[name]
        for rows, raw in file.raw_rows(name, multiple=self._multiple(name)):
            yield self._original(name, rows), gguf_blocks.taken_apart(raw, file.tensors[name].kind)

    def _multiple(self, name: str) -> int:
        """Of how many rows a chunk must be a multiple."""
        return self.config.head_dim if self._reordered and _is_rotary(name) else 1

    def _original(self, name: str, rows: slice) -> Rows:
        """Which rows of the original's tensor the file's `rows` are."""
        size = self._multiple(name)
        if size == 1:
            return rows
        # GGUF's row 2i + j of a head is Hugging Face's row j * H/2 + i: pairs abut there, halves here.
        order = np.arange(size).reshape(2, size // 2).T.reshape(-1)
        heads = np.arange(rows.start, rows.stop, size)
        return (heads[:, None] + order).reshape(-1)


def is_ignored(name: str) -> bool:
    """Tensors that the config already accounts for."""
    return name == _ROPE_FACTORS


def _is_rotary(name: str) -> bool:
    tail = name.rsplit(".", 2)[-2:]
    return tail in (["attn_q", "weight"], ["attn_k", "weight"])


class _Metadata:
    """Typed access to the keys; what is missing or of another type is a `UserError`."""

    def __init__(self, file: GGUFFile) -> None:
        self.values, self.label = file.metadata, file.path.name

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.values.get(key, default)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.label}: {key} must be a text, got {value!r:.100}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if type(value) is not int:
            found = "missing" if value is None else "not one whole number for all layers"
            raise UserError(f"{self.label}: {key} is {found}; a plain Llama states it")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if value is None or type(value) not in (int, float) or not _SMALLEST < value < _LARGEST:
            raise UserError(f"{self.label}: {key} must be a number above 0, got {value!r:.100}")
        # Stored as float32: the shortest decimal is what the original config said (1e-05, not 9.9999997e-06).
        return float(str(np.float32(value)))


def _read_config(file: GGUFFile, owner: Mapping[str, GGUFFile]) -> LlamaConfig:
    """`file`: the one with the metadata; `owner`: the part that holds each tensor."""
    meta = _Metadata(file)
    name = check_gguf_architecture(meta.text("general.architecture"), meta.label)
    if meta.integer(f"{name}.expert_count", 0):
        raise UserError(f"{meta.label}: a mixture of experts is not a plain Llama")
    heads, width = meta.integer(f"{name}.attention.head_count"), meta.integer(f"{name}.embedding_length")
    head_dim = meta.integer(f"{name}.attention.key_length", width // heads if heads > 0 else None)
    for key in (f"{name}.rope.dimension_count", f"{name}.attention.value_length"):
        if meta.integer(key, head_dim) != head_dim:
            raise UserError(f"{meta.label}: {key}={file.metadata[key]} must equal the head size {head_dim}")
    if GGUF_NAMES["embed"] not in owner:
        raise UserError(f"{meta.label}: tensor {GGUF_NAMES['embed']} is missing")
    vocab_size = owner[GGUF_NAMES["embed"]].tensors[GGUF_NAMES["embed"]].shape[0]
    theta = meta.number(f"{name}.rope.freq_base", 10000.0)
    scaling = _rope_scaling(meta, name, owner.get(_ROPE_FACTORS), theta, head_dim)
    context = meta.integer(f"{name}.context_length")
    if scaling is not None and scaling["kind"] == "linear":
        context = meta.integer(f"{name}.rope.scaling.original_context_length", context)
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": meta.integer(f"{name}.feed_forward_length"),
        "num_layers": meta.integer(f"{name}.block_count"),
        "num_heads": heads,
        "num_kv_heads": meta.integer(f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": meta.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": GGUF_NAMES["head"] not in owner,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_ids": end_ids(file.metadata, vocab_size, meta.label),
        "model_type": name,
    }
    config = LlamaConfig.from_json(values, meta.label)
    window = meta.integer(f"{name}.attention.sliding_window", 0)
    if 0 < window < config.context_length:
        raise UserError(f"{meta.label}: attention through a sliding window ({window} tokens) is not supported")
    return config


def _rope_scaling(
    meta: _Metadata, name: str, factors: GGUFFile | None, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """The scaling that the metadata of architecture `name` states, or whose factors the part `factors` holds."""
    kind = meta.text(f"{name}.rope.scaling.type", "none")
    factor_key = f"{name}.rope.scaling.factor"
    if f"{name}.rope.scale_linear" in meta.values:
        kind, factor_key = "linear", f"{name}.rope.scale_linear"
    if factors is not None:
        if kind != "none":
            raise UserError(f"{meta.label}: {_ROPE_FACTORS} together with rope scaling {kind!r:.100} is not supported")
        return _llama3_scaling(factors, theta, head_dim)
    if kind == "none":
        return None
    if kind != "linear":
        raise UserError(f"{meta.label}: rope scaling {kind!r:.100} is not supported, only linear and llama3's factors")
    return {"kind": "linear", "factor": meta.number(factor_key)}


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 setting whose factors are stored; other factors are refused rather than approximated."""
    found, factor = np.zeros(0), 0.0
    if file.tensors[_ROPE_FACTORS].shape == (head_dim // 2,):  # else there may be no end of it
        found = np.concatenate([values for _, values in file.rows(_ROPE_FACTORS)]).astype(np.float64)
        factor = float(found.max(initial=0.0))
    if not 0 < factor < _LARGEST or not np.isfinite(found).all():
        raise UserError(f"{file.path.name}: {_ROPE_FACTORS} must hold {head_dim // 2} positive factors")
    if not np.allclose(found, llama3_factors(theta, head_dim, factor), rtol=1e-4):
        raise UserError(f"{file.path.name}: the factors in {_ROPE_FACTORS} are not those of llama3 rope scaling")
    return {"kind": "llama3", "factor": factor, **_LLAMA3_BOUNDS}


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """[head_dim / 2] divisors of the rotary frequencies under llama3 scaling with the published bounds."""
    low, high, context = _LLAMA3_BOUNDS.values()
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1 - smooth) / factor + smooth)
