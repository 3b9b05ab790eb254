"""What a config.json means: defaults, rotary keys, contexts and sliding windows; and what is refused, by its reason."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from dvi_jax.config import RopeScaling
from dvi_jax.errors import UserError
from dvi_jax.importing.gguf import GGUFModel
from dvi_jax.importing.hf import config_to_hf, parse_config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1000,
}


def parse(model_type="llama", **changes):
    config = {"model_type": model_type, **SIZES, **changes}
    return parse_config({key: value for key, value in config.items() if value is not ...}, "config.json")


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("llama", {}, (1, (2,))),
        ("mistral", {}, (1, (2,))),
        ("qwen2", {}, (None, ())),
        ("llama", {"eos_token_id": None, "bos_token_id": None}, (None, ())),
        ("llama", {"eos_token_id": [7, 9]}, (1, (7, 9))),
        ("llama", {"vocab_size": 2}, (1, ())),
    ],
)
def test_special_tokens_of_keys_that_are_absent(model_type, keys, expected):
    """Those of Hugging Face's config classes; null is none."""
    config = parse(model_type, **keys)
    assert (config.bos_token_id, config.eos_token_ids) == expected


def test_sizes_of_keys_that_are_absent():
    assert parse(num_key_value_heads=...).num_kv_heads == 8
    assert parse("mistral", num_key_value_heads=..., num_attention_heads=16).num_kv_heads == 8
    assert parse("qwen2", num_key_value_heads=None).num_kv_heads == 8
    contexts = [parse(kind, max_position_embeddings=...).context_length for kind in ("llama", "qwen2")]
    assert contexts == [2048, 32768]
    assert parse("mistral", max_position_embeddings=..., sliding_window=None).context_length == 131072


LINEAR = RopeScaling("linear", 4.0)


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({"rope_theta": 5.0}, 5.0, None),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}, 7.0, None),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 5.0, LINEAR),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 10000.0, LINEAR),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0, "rope_theta": 3.0}}, 3.0, LINEAR),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            10000.0,
            LINEAR,
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
            10000.0,
            None,
        ),
        ({"rope_scaling": {}, "rope_parameters": None}, 10000.0, None),
    ],
)
def test_rope_parameters_come_before_the_older_keys(keys, theta, scaling):
    config = parse(**keys)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    assert parse_config(config_to_hf(config, "float32"), "again") == config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling=.*factor.* has no type"),
        ({"rope_parameters": {"factor": 4.0, "rope_theta": 3.0}}, r"rope_parameters=.*factor.* has no type"),
        ({"rope_scaling": {"type": None, "factor": 4.0}}, r"rope_scaling=.* has no type"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "has no type"),
        ({"rope_parameters": [4]}, "rope_parameters must be an object"),
    ],
)
def test_rotary_keys_that_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        parse(**keys)


@pytest.mark.parametrize(("factor", "context"), [(4.0, 4000), (2.5, 2500), (1.0, 1000), (0.5, 1000)])
def test_linear_scaling_makes_the_context_longer(factor, context):
    config = parse(rope_scaling={"type": "linear", "factor": factor})
    assert (config.max_position_embeddings, config.context_length) == (1000, context)


SLIDING = ["full_attention", "sliding_attention"] * 2


@pytest.mark.parametrize(
    ("model_type", "keys", "context"),
    [
        ("mistral", {"sliding_window": None}, 1000),
        ("mistral", {"sliding_window": 1000}, 1000),
        ("mistral", {"sliding_window": 4096}, 1000),
        ("mistral", {"sliding_window": 999}, None),
        ("mistral", {"sliding_window": "wide"}, None),
        ("mistral", {}, 1000),
        ("mistral", {"max_position_embeddings": 32768}, 4096),  # transformers' window where the key is absent
        ("mistral", {"sliding_window": 1000, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ("qwen2", {"sliding_window": 16}, 1000),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 0}, 1000),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, None),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 4}, 1000),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, 1000),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "layer_types": SLIDING}, None),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, 1000),
        ("llama", {"sliding_window": 4096}, 1000),
        ("llama", {"sliding_window": 16}, None),
    ],
)
def test_sliding_windows(model_type, keys, context):
    """None: refused, since a window would take effect inside the context."""
    if context is not None:
        assert parse(model_type, **keys).context_length == context
        return
    with pytest.raises(UserError, match="sliding_window"):
        parse(model_type, **keys)


@pytest.mark.parametrize(
    ("model_type", "part"),
    [
        ("gemma", "norms that scale by 1 \\+ weight"),
        ("gemma3_text", "sliding windows"),
        ("qwen3", "q_norm, k_norm"),
        ("qwen3_moe", "a mixture of experts"),
        ("mixtral", "a mixture of experts"),
        ("deepseek_v3", "latent keys"),
        ("gpt_neox", "layer norms with a mean"),
        ("phi3", "one matrix for q, k and v"),
        ("something_new", "only llama, Yi, mistral, qwen2"),
        (["llama"], "only llama"),
        (None, "model_type is None"),
    ],
)
def test_other_families_say_what_is_missing(model_type, part):
    with pytest.raises(UserError, match=part) as caught:
        parse(model_type)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "part"),
    [("qwen3", "q_norm, k_norm"), ("gemma2", "capped logits"), ("qwen2moe", "experts"), ("phi3", "one matrix")],
)
def test_other_gguf_architectures_say_it_too(architecture, part, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=f"architecture is '{architecture}', which needs .*{part}"):
        GGUFModel(tmp_path / "other.gguf")
