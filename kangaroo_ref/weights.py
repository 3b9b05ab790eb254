"""Reading Hugging Face Llama and Kangaroo adapter directories, and building the reference from tensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dvi_jax.errors import UserError
from kangaroo_ref.layers import ModelConfig
from kangaroo_ref.model import Adapter, EarlyExitLlamaForCausalLM, KangarooModel

REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
Module = TypeVar("Module", bound=nn.Module)
ROPE_KINDS = (None, "default", "linear", "llama3")
# Base weights in the order transformers 4.33.3 looks for them; an index lists the shards.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; expected a Hugging Face directory with that file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_config(directory: str | Path) -> ModelConfig:
    """The `config.json` of a Hugging Face Llama or a Kangaroo adapter; UserError if it is unsupported."""
    path = Path(directory) / "config.json"
    raw = _read_json(path)
    for name in REQUIRED_SIZES:
        if name not in raw:
            raise UserError(f"{path} has no {name}; expected a Llama config")
    scaling = raw.get("rope_scaling")
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type"))
    if kind not in ROPE_KINDS:
        raise UserError(f"{path}: rope_scaling {kind!r} is not supported; expected linear, llama3 or null")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; expected silu")
    heads = raw["num_attention_heads"]
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=raw.get("rope_theta", 10000.0),
        rope_scaling=scaling,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing, though the directory's index names it")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or no PyTorch weight file") from error


def read_state_dict(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of a directory, safetensors or .bin, one file or sharded; UserError if there is none."""
    directory = Path(directory)
    for name in WEIGHT_FILES:
        path = directory / name
        if path.is_file():
            break
    else:
        raise UserError(f"{directory} holds no weights; expected one of {', '.join(WEIGHT_FILES)}")
    if path.suffix != ".json":
        return _read_tensors(path)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(_read_json(path)["weight_map"].values())):
        tensors.update(_read_tensors(directory / shard))
    return tensors


def _fill(
    make: Callable[[], Module], state: Mapping[str, Tensor], what: str, dtype: torch.dtype, device: str | torch.device
) -> Module:
    # Modules are born without memory and take the given tensors, so a 7B model costs its weights once.
    with torch.device("meta"):
        module = make()
    wanted = module.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise UserError(f"the {what} has no tensor {name}; expected one of shape {tuple(tensor.shape)}")
        if state[name].shape != tensor.shape:
            found = tuple(state[name].shape)
            raise UserError(f"{what} tensor {name} is {found}; expected {tuple(tensor.shape)}")
    module.load_state_dict({name: state[name].to(dtype=dtype, device=device) for name in wanted}, assign=True)
    if isinstance(module, EarlyExitLlamaForCausalLM) and module.config.tie_word_embeddings:
        module.lm_head.weight = module.model.embed_tokens.weight
    return module.eval().requires_grad_(False)


def build_kangaroo(
    base_config: ModelConfig,
    base_state: Mapping[str, Tensor],
    adapter_config: ModelConfig,
    adapter_state: Mapping[str, Tensor],
    exit_layer: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> KangarooModel:
    """The reference from tensors under Hugging Face and Kangaroo names; UserError naming the first misfit.

    Of the adapter, tensors with unknown names are ignored, as the original does.
    """
    layers, size = base_config.num_layers, base_config.hidden_size
    if not 0 < exit_layer < layers:
        raise UserError(f"exit layer {exit_layer} is out of range; expected 1 to {layers - 1}")
    if adapter_config.num_layers != 1:
        raise UserError(f"the adapter has {adapter_config.num_layers} layers; expected 1")
    if adapter_config.hidden_size != size:
        raise UserError(f"the adapter's hidden size is {adapter_config.hidden_size}; expected the base's {size}")
    base_state = dict(base_state)
    if base_config.tie_word_embeddings and "model.embed_tokens.weight" in base_state:
        base_state["lm_head.weight"] = base_state["model.embed_tokens.weight"]
    base = _fill(lambda: EarlyExitLlamaForCausalLM(base_config, exit_layer), base_state, "base", dtype, device)
    unknown = sorted(set(base_state) - set(base.state_dict()))
    unknown = [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise UserError(f"the base has an unknown tensor {unknown[0]}; expected a Llama without biases")
    # The original ignores rope_theta, rope_scaling and head_dim of the adapter's config.
    adapter_config = replace(
        adapter_config,
        head_dim=adapter_config.hidden_size // adapter_config.num_heads,
        rope_theta=10000.0,
        rope_scaling=None,
    )
    adapter = _fill(lambda: Adapter(adapter_config), adapter_state, "adapter", dtype, device)
    return KangarooModel(base, adapter)


def load_kangaroo(
    base_dir: str | Path,
    adapter_dir: str | Path,
    exit_layer: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> KangarooModel:
    """The reference from a Hugging Face Llama directory and a Kangaroo adapter directory."""
    return build_kangaroo(
        read_config(base_dir),
        read_state_dict(base_dir),
        read_config(adapter_dir),
        read_state_dict(adapter_dir),
        exit_layer,
        dtype=dtype,
        device=device,
    )
