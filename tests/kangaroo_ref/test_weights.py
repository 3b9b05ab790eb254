"""Loading: against transformers' own Llama, and what is refused."""

import json
import math
import shutil

import pytest

from dvi_jax.errors import UserError


@pytest.fixture
def hf_llama(tmp_path):
    """A random GQA Llama with linear RoPE scaling: the directory, in shards, and the transformers model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=5000.0, rms_norm_eps=1e-5,
        rope_scaling={"type": "linear", "factor": 2.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path, model


def _adapter_parts(base_config):
    import torch

    from kangaroo_ref import Adapter, ModelConfig

    sizes = {**vars(base_config), "num_layers": 1, "num_kv_heads": base_config.num_heads}
    config = ModelConfig(**sizes)
    torch.manual_seed(1)
    return config, Adapter(config).state_dict()


@pytest.mark.parametrize("exit_layer", [1, 2])
def test_logits_equal_transformers(hf_llama, exit_layer):
    import torch

    from kangaroo_ref import build_kangaroo, prompt_stages, read_config, read_state_dict

    path, model = hf_llama
    assert (path / "pytorch_model.bin.index.json").is_file()
    config = read_config(path)
    reference = build_kangaroo(config, read_state_dict(path), *_adapter_parts(config), exit_layer)
    prompt = [1, 5, 60, 33, 5, 2, 9]
    with torch.no_grad():
        expected = model(torch.tensor([prompt]), output_hidden_states=True)
    stages = prompt_stages(reference, prompt)
    torch.testing.assert_close(stages["logits"], expected.logits[0], rtol=0, atol=1e-5)
    hidden_exit = expected.hidden_states[exit_layer][0]
    torch.testing.assert_close(stages["hidden_exit"], hidden_exit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_close_to_float32(golden, reference, dtype):
    import torch

    from kangaroo_ref import load_kangaroo, prompt_stages

    path, record = golden
    half = load_kangaroo(path / "base", path / "adapter", record["exit_layer"], dtype=getattr(torch, dtype))
    prompt = record["runs"][2]["prompt"]
    stages, wide = prompt_stages(half, prompt), prompt_stages(reference, prompt)
    assert stages["hidden_exit"].dtype == stages["adapter_out"].dtype == getattr(torch, dtype)
    assert stages["logits"].dtype == stages["adapter_logits"].dtype == torch.float32
    tolerance = 32 * torch.finfo(getattr(torch, dtype)).eps
    for name in stages:
        scale = wide[name].abs().max().item()
        torch.testing.assert_close(stages[name].float(), wide[name], rtol=0, atol=tolerance * scale)


def test_tied_head_is_the_embedding(golden, reference):
    path, _ = golden
    tied = json.loads((path / "base/config.json").read_text(encoding="utf-8"))["tie_word_embeddings"]
    head, embed = reference.base.lm_head.weight, reference.base.model.embed_tokens.weight
    assert (head.data_ptr() == embed.data_ptr()) == tied


def test_llama3_frequencies_follow_the_published_rule():
    from kangaroo_ref.layers import rotary_frequencies

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    for index, value in enumerate(rotary_frequencies(128, 500000.0, scaling).tolist()):
        plain = 500000.0 ** (-2 * index / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4.0:
            expected = plain
        elif wavelength > 8192 / 1.0:
            expected = plain / 8.0
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected = (1 - smooth) * plain / 8.0 + smooth * plain
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def copied(golden, tmp_path):
    """A writable copy of a golden directory."""
    shutil.copytree(golden[0], tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "copy"


def _load(path, exit_layer=1):
    from kangaroo_ref import load_kangaroo

    return load_kangaroo(path / "base", path / "adapter", exit_layer)


@pytest.mark.parametrize("name", ["base/config.json", "adapter/config.json", "adapter/pytorch_model.bin"])
def test_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(UserError, match="adapter holds no weights" if name.endswith("bin") else name):
        _load(copied)


def test_damaged_weights_are_named(copied):
    path = next((copied / "base").glob("*model.*"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=path.name):
        _load(copied)


def test_wrong_shape_is_named(copied):
    path = copied / "base/config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "vocab_size": 300}), encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is \(\d+, \d+\); expected \(300, "):
        _load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_hidden_layers": 7}, r"no tensor model\.layers\.\d\."),
        ({"num_hidden_layers": 2}, r"unknown tensor model\.layers\.2\."),
    ],
)
def test_unsupported_base_is_refused(copied, change, message):
    path = copied / "base/config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        _load(copied)


@pytest.mark.parametrize("exit_layer", [0, 99])
def test_exit_layer_out_of_range_is_refused(golden, exit_layer):
    with pytest.raises(UserError, match=f"exit layer {exit_layer} is out of range"):
        _load(golden[0], exit_layer)
