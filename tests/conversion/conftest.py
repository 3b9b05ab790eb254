"""A tiny Llama as plain numpy tensors under Hugging Face's names, and directories made from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
from gguf.constants import GGMLQuantizationType

GOLDEN = Path(__file__).parent.parent / "golden"

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights; shapes written out here, not taken from the code under test."""
    rng = np.random.default_rng(seed)
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    kv = config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.self_attn.q_proj.weight": (heads * size, width),
            f"{prefix}.self_attn.k_proj.weight": (kv, width),
            f"{prefix}.self_attn.v_proj.weight": (kv, width),
            f"{prefix}.self_attn.o_proj.weight": (width, heads * size),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.mlp.gate_proj.weight": (inner, width),
            f"{prefix}.mlp.up_proj.weight": (inner, width),
            f"{prefix}.mlp.down_proj.weight": (width, inner),
        }
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def expected_base(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The fused tree, flattened to slash-separated names, by concatenation of the named tensors."""
    base = {"embed": tensors["model.embed_tokens.weight"], "norm": tensors["model.norm.weight"]}
    if "lm_head.weight" in tensors and not config["tie_word_embeddings"]:
        base["head"] = tensors["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):

        def part(name: str, prefix: str = f"model.layers.{layer}") -> np.ndarray:
            return tensors[f"{prefix}.{name}.weight"]

        base |= {
            f"layers/{layer}/attn_norm": part("input_layernorm"),
            f"layers/{layer}/qkv": np.concatenate([part(f"self_attn.{name}_proj") for name in "qkv"]),
            f"layers/{layer}/out": part("self_attn.o_proj"),
            f"layers/{layer}/mlp_norm": part("post_attention_layernorm"),
            f"layers/{layer}/gate_up": np.concatenate([part("mlp.gate_proj"), part("mlp.up_proj")]),
            f"layers/{layer}/down": part("mlp.down_proj"),
        }
    return base


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dict of arrays -> slash-separated names."""
    result: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def assert_trees_equal(actual: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    """Same names, dtypes and bits; `expected` may be nested or flat."""
    found, wanted = flat(actual), flat(expected)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


class Helpers:
    """What the tests of this folder share, handed out as one fixture."""

    golden = GOLDEN
    tiny = TINY
    tensors = staticmethod(tiny_tensors)
    expected = staticmethod(expected_base)
    assert_equal = staticmethod(assert_trees_equal)
    flat = staticmethod(flat)


@pytest.fixture
def helpers() -> Helpers:
    return Helpers()


@pytest.fixture
def make_hf(tmp_path: Path) -> Callable[..., Path]:
    """make_hf(tensors=..., name=..., **config changes) writes a directory with `model.safetensors`."""

    def make(tensors: dict[str, np.ndarray] | None = None, name: str = "model", **changes: Any) -> Path:
        config = {key: value for key, value in {**TINY, **changes}.items() if value is not ...}
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        if tensors is None:
            tensors = tiny_tensors({**TINY, **changes})
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return directory

    return make


GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name):
    if name in GGUF_TOP:
        return GGUF_TOP[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{GGUF_PARTS[part]}.weight"


def interleave(weights, heads):
    """The permutation of llama.cpp's converter: a head's two rotary halves, row by row."""
    return weights.reshape(heads, 2, -1, weights.shape[-1]).swapaxes(1, 2).reshape(weights.shape)


@pytest.fixture
def write_gguf(tmp_path, helpers):
    """write_gguf(tensors, kind) writes them as llama.cpp's converter does, matrices in blocks of `kind`."""

    def make(tensors, kind=GGMLQuantizationType.F32, metadata=None, extra=None, **config):
        config = {**helpers.tiny, **config}
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
        for key, value in (metadata or {}).items():
            add = {
                str: writer.add_string,
                int: writer.add_uint32,
                float: writer.add_float32,
                list: writer.add_array,
            }
            add[type(value)](key, value)
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        for name, value in tensors.items():
            part = name.split(".")[-2]
            stored = interleave(value, heads[part]) if part in heads else value
            stored_kind = kind if stored.ndim == 2 else GGMLQuantizationType.F32
            data = gguf.quants.quantize(stored, stored_kind)
            writer.add_tensor(gguf_name(name), data, raw_dtype=stored_kind)
        for name, value in (extra or {}).items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make
