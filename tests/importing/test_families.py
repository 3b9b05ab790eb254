"""Every family and layout: the logits of transformers 5, the same weights through GGUF, and out and in again."""

from __future__ import annotations

import json
from dataclasses import replace

import gguf
import jax
import numpy as np
import pytest

from conversion.exporting import export_checkpoint
from conversion.importing import import_model
from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.importing.source import load_base, open_source
from experiments.families import KEPT, cases, own_logits
from tests.conversion.conftest import GGUF_PARTS

CASES = {case.name: case for case in cases()}
GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture(scope="module")
def recorded(request):
    """Logits of transformers 5.24 at `KEPT` of 600 positions, by name of the case."""
    with np.load(request.config.rootpath / "tests" / "golden" / "families.npz") as file:
        return {name: file[name] for name in file.files}


def assert_trees_equal(found, expected):
    """Same structure, types and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        assert left.tobytes() == right.tobytes()


def test_logits_equal_those_of_transformers_5(case, recorded):
    """To float32 rounding, 1.4e-5 of logits up to 34, at positions up to 599."""
    np.testing.assert_allclose(own_logits(case)[list(KEPT)], recorded[case.name], atol=5e-5, rtol=0)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.full), "bfloat16"])
def test_out_and_in_again(case, dtype, tmp_path):
    import_model(case.write(tmp_path / "source"), tmp_path / "a", dtype=dtype)
    export_checkpoint(tmp_path / "a", tmp_path / "hf", "hf")
    import_model(tmp_path / "hf", tmp_path / "b", dtype=dtype)
    first, second = read_checkpoint(tmp_path / "a"), read_checkpoint(tmp_path / "b")
    assert_trees_equal(second.base, first.base)
    assert second.config == first.config
    assert second.manifest.base_sha256 == first.manifest.base_sha256
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key in ("model_type", "architectures", "max_position_embeddings", "num_key_value_heads"):
        assert written[key] == case.config[key]


def gguf_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem in GGUF_TOP:
        return f"{GGUF_TOP[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_PARTS[part]}.{kind}"


def write_gguf(case, path):
    """As llama.cpp's converter does: Mistral as llama, whose rows of q and k are reordered; qwen2's are not."""
    config = case.config
    name = "qwen2" if config["model_type"] == "qwen2" else "llama"
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    for key, value in case.tensors.items():
        part = key.split(".")[-2]
        if name == "llama" and part in heads:
            value = value.reshape(heads[part], 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(gguf_name(key), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["mistral nemo", "vicuna 16k", "yi", "qwen2", "qwen2.5, tied"])
def test_gguf_is_the_same_model(name, tmp_path):
    case = CASES[name]
    write_gguf(case, tmp_path / "model.gguf")
    source, other = open_source(tmp_path / "model.gguf"), open_source(case.write(tmp_path / "hf"))
    assert_trees_equal(load_base(source, "float32"), load_base(other, "float32"))
    # Special tokens and the name Mistral are not in such a file.
    absent = {"bos_token_id": None, "eos_token_ids": (), "model_type": source.config.model_type}
    assert replace(source.config, **absent) == replace(other.config, **absent)
    assert source.config.qkv_bias == (case.config["model_type"] == "qwen2")
    assert source.config.context_length == 1024
