"""Hugging Face directories: configs, every weight file format, and the names and shapes that are refused."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from dvi_jax.config import RopeScaling
from dvi_jax.errors import UserError
from dvi_jax.importing import hf
from dvi_jax.importing.source import load_base, open_source


def load(directory, dtype="float32"):
    return load_base(open_source(directory), dtype)


@pytest.mark.parametrize("name", ["mha", "gqa_tied"])
def test_golden_models_equal_what_transformers_loads(helpers, name):
    from transformers import LlamaForCausalLM

    directory = helpers.golden / name / "base"
    state = LlamaForCausalLM.from_pretrained(directory).state_dict()
    tensors = {key: value.numpy() for key, value in state.items()}
    config = json.loads((directory / "config.json").read_text())
    helpers.assert_equal(load(directory), helpers.expected(config, tensors))


def test_bfloat16_rounds_to_nearest(helpers, make_hf):
    tensors = helpers.tensors(helpers.tiny)
    expected = helpers.expected(helpers.tiny, tensors)
    rounded = {
        key: torch.from_numpy(value).bfloat16().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        for key, value in expected.items()
    }
    helpers.assert_equal(load(make_hf(tensors), "bfloat16"), rounded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_torch_shards_and_half_types(helpers, make_hf, dtype):
    directory = make_hf()
    tensors = {key: torch.from_numpy(value).to(dtype) for key, value in helpers.tensors(helpers.tiny).items()}
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    weight_map = {name: file for file, members in shards.items() for name in members}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, members in shards.items():
        torch.save({name: tensors[name] for name in members}, directory / file)
    as_float32 = {key: value.float().numpy() for key, value in tensors.items()}
    helpers.assert_equal(load(directory), helpers.expected(helpers.tiny, as_float32))


def test_old_torch_format_views_and_rotary_buffers(helpers, make_hf):
    directory = make_hf()
    (directory / "model.safetensors").unlink()
    tensors = helpers.tensors(helpers.tiny)
    state = {key: torch.from_numpy(value) for key, value in tensors.items()}
    name = "model.layers.0.mlp.down_proj.weight"
    state[name] = state[name].T.contiguous().T
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    helpers.assert_equal(load(directory), helpers.expected(helpers.tiny, tensors))


def shard_safetensors(directory, tensors, second):
    """Move the tensors named in `second` into a second shard; both keep what else they are given."""
    (directory / "model.safetensors").unlink()
    first = {name: value for name, value in tensors.items() if name not in second}
    safetensors.numpy.save_file(first, directory / "a.safetensors")
    safetensors.numpy.save_file({name: tensors[name] for name in second}, directory / "b.safetensors")
    weight_map = {name: "b.safetensors" if name in second else "a.safetensors" for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_safetensors_shards(helpers, make_hf):
    tensors = helpers.tensors(helpers.tiny)
    directory = make_hf(tensors)
    shard_safetensors(directory, tensors, ["model.norm.weight", "lm_head.weight"])
    helpers.assert_equal(load(directory), helpers.expected(helpers.tiny, tensors))


def test_a_tensor_in_two_shards_is_refused(helpers, make_hf):
    tensors = helpers.tensors(helpers.tiny)
    directory = make_hf(tensors)
    shard_safetensors(directory, tensors, ["model.norm.weight"])
    safetensors.numpy.save_file(tensors, directory / "a.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is in both a\.safetensors and b\.safetensors"):
        load(directory)


@pytest.mark.parametrize(
    ("entry", "message"),
    [("../a.safetensors", "plain file name"), ("c.safetensors", "cannot read"), (7, "plain file name")],
)
def test_index_entries_that_lead_elsewhere(helpers, make_hf, entry, message):
    tensors = helpers.tensors(helpers.tiny)
    directory = make_hf(tensors)
    shard_safetensors(directory, tensors, ["model.norm.weight"])
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"b.safetensors"', json.dumps(entry)))
    with pytest.raises(UserError, match=message):
        load(directory)


def test_tied_model_may_carry_an_equal_head_only(helpers, make_hf):
    config = {**helpers.tiny, "tie_word_embeddings": True}
    tensors = helpers.tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    base = load(make_hf(tensors, tie_word_embeddings=True))
    helpers.assert_equal(base, helpers.expected(config, tensors))
    tensors["lm_head.weight"][5, 3] += 1
    with pytest.raises(UserError, match=r"ties lm_head\.weight to the embedding, but the two differ"):
        load(make_hf(tensors, name="other", tie_word_embeddings=True))


def test_missing_unknown_misshapen_and_non_finite_tensors(helpers, make_hf):
    def outcome(number, **changes):
        tensors = helpers.tensors(helpers.tiny) | changes
        tensors = {key: value for key, value in tensors.items() if value is not None}
        with pytest.raises(UserError) as caught:
            load(make_hf(tensors, name=f"case{number}"))
        return str(caught.value)

    key = "model.layers.1.self_attn.k_proj.weight"
    assert f"{key} is missing" in outcome(0, **{key: None})
    assert f"{key} has shape [8, 32], expected [16, 32]" in outcome(1, **{key: np.zeros((8, 32), np.float32)})
    bias = "model.layers.1.self_attn.k_proj.bias"
    assert f"unknown tensor {bias}" in outcome(2, **{bias: np.zeros(16, np.float32)})
    assert f"{key} holds NaN" in outcome(3, **{key: np.full((16, 32), np.nan, np.float32)})
    assert f"{key} is of type I32" in outcome(4, **{key: np.zeros((16, 32), np.int32)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral', which needs a mixture of experts"),
        ({"model_type": "mistral"}, "only MistralForCausalLM"),
        ({"model_type": ...}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias=True is not part of a plain Llama"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling type 'dynamic' is not supported",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor must be a number above 0, got None"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rope_scaling.factor"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling.factor must be a number above 0"),
        ({"architectures": ["x" * 9999]}, "only LlamaForCausalLM"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"hidden_size": 33}, "hidden_size=33 must be a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_kv_heads must be a divisor"),
        ({"vocab_size": 10**7}, "embed_tokens.weight has shape [40, 32], expected [10000000, 32]"),
        ({"vocab_size": 10**4000}, "vocab_size must be"),
        ({"num_hidden_layers": 1000}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 10**12}, "num_layers must be"),
        ({"num_hidden_layers": "many"}, "num_layers"),
        ({"rope_theta": 0}, "rope_theta must be above 0, got 0.0"),
        ({"rope_theta": {"base": 1}}, "config.json: rope_theta must be a number, got {'base': 1}"),
        ({"rms_norm_eps": "1e-5"}, "config.json: rms_norm_eps must be a number, got '1e-5'"),
        ({"eos_token_id": "2"}, "config.json: eos_token_id must be a token id, got '2'"),
        ({"eos_token_id": [2, [3]]}, "config.json: eos_token_id must be a token id, got [3]"),
        ({"bos_token_id": [1]}, "config.json: bos_token_id must be a token id, got [1]"),
        ({"eos_token_id": 40}, "eos_token_id 40 is outside the vocabulary of 40"),
    ],
)
def test_configs_that_are_refused(helpers, make_hf, changes, message):
    directory = make_hf(helpers.tensors(helpers.tiny), **changes)
    with pytest.raises(UserError) as caught:
        load(directory)
    assert message in str(caught.value)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"rope_type": "llama3", **LLAMA3}, RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
        ({"type": "llama3", **LLAMA3}, RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    ],
)
def test_rope_scaling_survives_both_directions(helpers, scaling, expected):
    config = hf.parse_config({**helpers.tiny, "rope_scaling": scaling}, "test")
    assert config.rope_scaling == expected
    assert hf.parse_config(hf.config_to_hf(config, "float32"), "test") == config


def test_config_defaults_and_head_dim(helpers, make_hf):
    directory = make_hf(num_key_value_heads=4, rope_theta=..., head_dim=20)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    config = hf.read_config(directory)
    assert (config.head_dim, config.rope_theta, config.eos_token_ids) == (20, 10000.0, (2, 5))
    assert load(directory)["layers"]["0"]["qkv"].shape == (3 * 4 * 20, 32)
    newer = {**helpers.tiny, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 7.0}}
    del newer["rope_theta"]
    parsed = hf.parse_config(newer, "test")
    assert (parsed.rope_theta, parsed.rope_scaling) == (7.0, RopeScaling("linear", 3.0))


def test_a_setting_that_is_null_has_its_default(helpers):
    nulls = dict.fromkeys(("tie_word_embeddings", "num_key_value_heads", "head_dim", "max_position_embeddings"))
    config = hf.parse_config({**helpers.tiny, **nulls, "rope_scaling": None, "rope_theta": None}, "test")
    assert (config.tie_word_embeddings, config.num_kv_heads, config.head_dim) == (False, 4, 8)
    assert (config.max_position_embeddings, config.rope_theta, config.rope_scaling) == (2048, 10000.0, None)


def test_directory_without_weights_or_config(tmp_path, make_hf):
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        load(tmp_path)
    directory = make_hf()
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights: expected one of model\.safetensors"):
        load(directory)


@pytest.mark.parametrize(
    ("changes", "bos", "eos"),
    [
        ({"bos_token_id": ..., "eos_token_id": ...}, 1, (2,)),
        ({"bos_token_id": None, "eos_token_id": None}, None, ()),
        ({"eos_token_id": [5, 6]}, 1, (5, 6)),
    ],
)
def test_ends_that_a_config_does_not_name_are_hugging_faces(make_hf, changes, bos, eos):
    directory = make_hf()
    data = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    config = hf.read_config(directory)
    assert (config.bos_token_id, config.eos_token_ids) == (bos, eos)
