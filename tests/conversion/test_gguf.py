"""GGUF files: written with the `gguf` package in llama.cpp's layout, read back in Hugging Face's."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from dvi_jax.config import RopeScaling
from dvi_jax.errors import UserError
from dvi_jax.importing.source import load_base, open_source


def load(path):
    return load_base(open_source(path), "float32")


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0])
def test_every_type_is_the_quantised_value_in_hugging_face_order(helpers, write_gguf, kind):
    tensors = helpers.tensors(helpers.tiny)
    base = load(write_gguf(tensors, kind))
    # Blocks lie inside a row, so quantising commutes with the permutation of rows.
    stored = {
        name: gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind) if value.ndim == 2 else value
        for name, value in tensors.items()
    }
    helpers.assert_equal(base, helpers.expected(helpers.tiny, stored))


def test_many_chunks_of_whole_heads(helpers, write_gguf, monkeypatch):
    monkeypatch.setattr("dvi_jax.importing.tensors.CHUNK_BYTES", 1500)
    tensors = helpers.tensors(helpers.tiny)
    helpers.assert_equal(load(write_gguf(tensors)), helpers.expected(helpers.tiny, tensors))


def test_tied_without_an_output_tensor(helpers, write_gguf):
    tensors = helpers.tensors(helpers.tiny)
    del tensors["lm_head.weight"]
    path = write_gguf(tensors)
    assert open_source(path).config.tie_word_embeddings
    assert "head" not in load(path)


def test_config_and_end_tokens_from_metadata(helpers, write_gguf):
    metadata = {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 7,
        "llama.rope.dimension_count": 8,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    source = open_source(write_gguf(helpers.tensors(helpers.tiny), metadata=metadata))
    config = source.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 4, 2, 8)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (40, 32, 64)
    assert (config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == (1e-5, 500000.0, 128)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 7))
    assert config.rope_scaling == RopeScaling("linear", 4.0)
    assert source.chat_template == "{{ messages }}"
    assert source.tokenizer_json is None


def llama3_factors(theta, size, factor):
    """Loop form of the published rule, bounds 1, 4 and 8192."""
    result = []
    for index in range(0, size, 2):
        wavelength = 2 * np.pi * theta ** (index / size)
        if wavelength < 8192 / 4:
            result.append(1.0)
        elif wavelength > 8192:
            result.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


def test_stored_rope_factors_are_llama3_scaling_or_refused(helpers, write_gguf):
    config = {**helpers.tiny, "head_dim": 64, "num_key_value_heads": 2}
    tensors = helpers.tensors(config)
    size = {"llama.attention.key_length": 64, "llama.attention.value_length": 64}
    factors = llama3_factors(500000.0, 64, 32.0)
    path = write_gguf(tensors, metadata=size, extra={"rope_freqs.weight": factors})
    assert open_source(path).config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    helpers.assert_equal(load(path), helpers.expected(config, tensors))
    with pytest.raises(UserError, match="are not those of llama3 rope scaling"):
        open_source(write_gguf(tensors, metadata=size, extra={"rope_freqs.weight": factors * 1.5 - 0.5}))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4 must equal the head size 8"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"tokenizer.ggml.eos_token_id": 40}, "eos_token_id 40 is outside the vocabulary of 40"),
        ({"llama.expert_count": [1, 2]}, "llama.expert_count is not one whole number"),
        ({"llama.rope.scaling.type": [1, 2]}, "llama.rope.scaling.type must be a text"),
        ({"llama.rope.scale_linear": 1e-38}, "llama.rope.scale_linear must be a number above 0"),
        (
            {
                "tokenizer.ggml.model": "bert",
                "tokenizer.ggml.tokens": ["a"],
                "tokenizer.ggml.token_type": [1],
            },
            "'bert'",
        ),
    ],
)
def test_metadata_that_is_refused(helpers, write_gguf, metadata, message):
    with pytest.raises(UserError) as caught:
        open_source(write_gguf(helpers.tensors(helpers.tiny), metadata=metadata))
    assert message in str(caught.value)


def test_rope_factors_without_end_are_not_read(helpers, write_gguf):
    """A tensor of rows without bytes may have any number of rows."""
    path = write_gguf(helpers.tensors(helpers.tiny), extra={"rope_freqs.weight": np.ones((3, 4), np.float32)})
    data = path.read_bytes()
    for dims in ((0, 2**62), (0, 0), (4, 3)):
        path.write_bytes(data.replace(struct.pack("<2Q", 4, 3), struct.pack("<2Q", *dims), 1))
        with pytest.raises(UserError, match=r"rope_freqs\.weight must hold 4 positive factors"):
            open_source(path)


def test_other_architectures_and_extra_tensors_are_refused(helpers, write_gguf, tmp_path):
    bias = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    with pytest.raises(UserError, match=r"unknown tensor blk\.0\.attn_q\.bias"):
        load(write_gguf(helpers.tensors(helpers.tiny), extra=bias))
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen3")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture is 'qwen3', which needs norms of queries and keys"):
        open_source(tmp_path / "other.gguf")
