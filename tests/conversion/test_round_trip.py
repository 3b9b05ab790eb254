"""import -> export -> import, and what other readers make of the exports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch

from conversion.exporting import export_checkpoint, export_hf
from conversion.importing import import_model
from dvi_jax.checkpoint import read_checkpoint, rewrite_checkpoint
from dvi_jax.errors import UserError

TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": text, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for index, text in ((1, "<s>"), (2, "</s>"))
        ],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "model": {"type": "BPE", "vocab": {"<s>": 1, "a": 0, "</s>": 2}, "merges": []},
    }
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mha", "gqa_tied"])
def test_hf_round_trip_is_bit_equal(helpers, tmp_path, name, dtype):
    golden = helpers.golden / name
    import_model(golden / "base", tmp_path / "a", adapter=golden / "adapter", dtype=dtype, exit_layer=3)
    export_checkpoint(tmp_path / "a", tmp_path / "hf", "hf")
    import_model(tmp_path / "hf", tmp_path / "b", adapter=tmp_path / "hf" / "adapter", dtype=dtype, exit_layer=3)
    first, second = read_checkpoint(tmp_path / "a"), read_checkpoint(tmp_path / "b")
    helpers.assert_equal(second.base, first.base)
    helpers.assert_equal(second.drafter, first.drafter)
    assert second.config == first.config
    assert second.manifest.drafter_config == first.manifest.drafter_config


@pytest.mark.parametrize("name", ["mha", "gqa_tied"])
def test_transformers_reads_the_export(helpers, tmp_path, name):
    from transformers import LlamaForCausalLM

    import_model(helpers.golden / name / "base", tmp_path / "a")
    export_checkpoint(tmp_path / "a", tmp_path / "hf", "hf")
    original = LlamaForCausalLM.from_pretrained(helpers.golden / name / "base")
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.arange(12)[None]
    assert torch.equal(exported(ids).logits, original(ids).logits)


@pytest.mark.parametrize("name", ["mha", "gqa_tied"])
def test_adapter_in_and_out_equals_the_golden_file(helpers, tmp_path, name):
    golden = helpers.golden / name
    import_model(golden / "base", tmp_path / "a", adapter=golden / "adapter")
    checkpoint = read_checkpoint(tmp_path / "a")
    state = torch.load(golden / "adapter" / "pytorch_model.bin", weights_only=True)
    prefix = "layers.0.self_attn"
    qkv = torch.cat([state[f"{prefix}.{part}_proj.weight"] for part in "qkv"])
    expected = {
        "attn_norm": state["layers.0.input_layernorm.weight"].numpy(),
        "qkv": qkv.numpy(),
        "out": state[f"{prefix}.o_proj.weight"].numpy(),
        "norm": state["norm.weight"].numpy(),
    }
    helpers.assert_equal(checkpoint.drafter, expected)
    export_checkpoint(tmp_path / "a", tmp_path / "hf", "hf")
    written = torch.load(tmp_path / "hf" / "adapter" / "pytorch_model.bin", weights_only=True)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)


def test_sharded_export_covers_every_tensor_once(helpers, tmp_path):
    import_model(helpers.golden / "mha" / "base", tmp_path / "a")
    checkpoint = read_checkpoint(tmp_path / "a")
    export_hf(checkpoint, tmp_path / "hf", max_shard_bytes=200_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    for file in files:
        with safetensors.safe_open(tmp_path / "hf" / file, framework="np") as shard:
            assert set(shard.keys()) == {name for name, owner in index["weight_map"].items() if owner == file}
    import_model(tmp_path / "hf", tmp_path / "b")
    helpers.assert_equal(read_checkpoint(tmp_path / "b").base, checkpoint.base)


def test_tokenizer_template_config_and_extras_round_trip(helpers, make_hf, tmp_path):
    scaling = {"type": "linear", "factor": 2.0}
    source = make_hf(head_dim=16, rope_scaling=scaling, eos_token_id=[2, 5])
    (source / "tokenizer.json").write_text(TOKENIZER)
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 'é' }}"}))
    import_model(source, tmp_path / "a")
    export_checkpoint(tmp_path / "a", tmp_path / "hf", "hf")
    import_model(tmp_path / "hf", tmp_path / "b")
    first, second = read_checkpoint(tmp_path / "a"), read_checkpoint(tmp_path / "b")
    assert second.config == first.config
    assert second.config.eos_token_ids == (2, 5)
    assert (second.tokenizer_json, second.chat_template) == (TOKENIZER, "{{ 'é' }}")
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")


@pytest.fixture
def trained(helpers, tmp_path):
    """A checkpoint with a trained exit head and a LoRA set."""
    import_model(helpers.golden / "gqa_tied" / "base", tmp_path / "plain", dtype="bfloat16")
    rng = np.random.default_rng(0)
    lora = {"lora_s": {"0": {"q": {"a": rng.standard_normal((4, 96), dtype=np.float32)}}}}
    drafter = {"norm": rng.standard_normal(96, dtype=np.float32)}
    rewrite_checkpoint(read_checkpoint(tmp_path / "plain"), tmp_path / "trained", lora=lora, drafter=drafter)
    return tmp_path / "trained"


def test_hf_export_keeps_lora_and_exit_head_apart(trained, tmp_path):
    export_checkpoint(trained, tmp_path / "hf", "hf")
    checkpoint = read_checkpoint(trained)
    with safetensors.safe_open(tmp_path / "hf" / "lora" / "model.safetensors", framework="np") as file:
        assert list(file.keys()) == ["lora_s.0.q.a"]
        np.testing.assert_array_equal(file.get_tensor("lora_s.0.q.a"), checkpoint.lora["lora_s"]["0"]["q"]["a"])
    with safetensors.safe_open(tmp_path / "hf" / "drafter" / "model.safetensors", framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("norm"), checkpoint.drafter["norm"])
    assert json.loads((tmp_path / "hf" / "drafter" / "config.json").read_text())["drafter"] == "exit_head"


def test_orbax_export_restores_without_this_package(helpers, trained, tmp_path):
    export_checkpoint(trained, tmp_path / "orbax", "orbax")
    script = """
import sys, numpy, orbax.checkpoint
with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(sys.argv[1])
assert not any(name.split(".")[0] in ("dvi_jax", "conversion", "torch") for name in sys.modules)
assert sorted(tree) == ["base", "drafter", "lora"]
embed = numpy.asarray(tree["base"]["embed"])
numpy.savez(sys.argv[2], embed=embed.view(numpy.uint16), lora=tree["lora"]["lora_s"]["0"]["q"]["a"])
"""
    arguments = [str(tmp_path / "orbax" / "weights"), str(tmp_path / "out.npz")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=tmp_path)
    checkpoint, restored = read_checkpoint(trained), np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(restored["embed"].view(ml_dtypes.bfloat16), checkpoint.base["embed"])
    np.testing.assert_array_equal(restored["lora"], checkpoint.lora["lora_s"]["0"]["q"]["a"])
    assert (tmp_path / "orbax" / "config.json").read_text() == (trained / "config.json").read_text()


def adapter_copy(helpers, directory: Path, change_state, **changes) -> Path:
    golden = helpers.golden / "mha" / "adapter"
    directory.mkdir()
    config = json.loads((golden / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    state = torch.load(golden / "pytorch_model.bin", weights_only=True)
    change_state(state)
    torch.save(state, directory / "pytorch_model.bin")
    return directory


def test_adapter_with_unknown_tensors_and_fewer_kv_heads(helpers, tmp_path):
    def change(state):
        state["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        state["lm_head.weight"] = torch.ones(3, 3)
        for part in "kv":
            name = f"layers.0.self_attn.{part}_proj.weight"
            state[name] = state[name][:32].clone()

    adapter = adapter_copy(helpers, tmp_path / "adapter", change, num_key_value_heads=2)
    import_model(helpers.golden / "mha" / "base", tmp_path / "a", adapter=adapter)
    checkpoint = read_checkpoint(tmp_path / "a")
    assert checkpoint.drafter["qkv"].shape == (64 + 32 + 32, 64)
    assert checkpoint.manifest.drafter == "kangaroo"
    assert checkpoint.manifest.drafter_config == {"num_heads": 4, "num_kv_heads": 2, "rms_norm_eps": 1e-6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128}, "hidden_size 128 is not the base model's 64"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2; an adapter has 1 layer"),
        ({"num_attention_heads": 5}, "num_attention_heads must be a divisor of 64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of 4"),
        ({"num_key_value_heads": 2}, "k_proj.weight has shape [64, 64], expected [32, 64]"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({}, "tensor norm.weight is missing"),
    ],
)
def test_adapters_that_are_refused(helpers, tmp_path, changes, message):
    drop = None if changes else "norm.weight"
    adapter = adapter_copy(helpers, tmp_path / "adapter", lambda state: state.pop(drop, None), **changes)
    with pytest.raises(UserError) as caught:
        import_model(helpers.golden / "mha" / "base", tmp_path / "a", adapter=adapter)
    assert message in str(caught.value)
    assert not (tmp_path / "a").exists()
