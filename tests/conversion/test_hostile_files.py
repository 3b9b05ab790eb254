"""Damaged and dishonest weight files: one `UserError`, nothing executed, nothing believed unchecked."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.torch_file import TorchFile
from dvi_jax.errors import UserError
from dvi_jax.importing.gguf_file import GGUFFile
from dvi_jax.importing.safetensors_file import SafetensorsFile, write_safetensors
from dvi_jax.importing.source import load_base, open_source


def safetensors_bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x01\x02", "truncated"),
        (safetensors_bytes({}, length=1 << 62), "truncated: header of 4611686018427387904 bytes"),
        (safetensors_bytes(b" " * (9 << 20)), "is absurd"),
        (safetensors_bytes(b"[" * 100_000), "not valid JSON"),
        (safetensors_bytes(b"\xff\xfe"), "not UTF-8"),
        (safetensors_bytes(b"[]"), "must hold a JSON object"),
        (safetensors_bytes(b'{"x": 1, "x": 2}'), "duplicate key 'x'"),
        (safetensors_bytes({"x": 3}), "malformed"),
        (safetensors_bytes(entry(shape=(-2, -1))), "malformed"),
        (safetensors_bytes(entry(shape=(True, 2))), "malformed"),
        (safetensors_bytes(entry(dtype="F8_E4M3"), b"\0" * 8), "of type F8_E4M3"),
        (safetensors_bytes(entry(shape=(3,)), b"\0" * 8), "do not agree with its shape"),
        (safetensors_bytes(entry(offsets=(8, 0)), b"\0" * 8), "do not agree with its shape"),
        (safetensors_bytes(entry(shape=(1 << 40,), offsets=(0, 1 << 42)), b"\0" * 8), "is truncated"),
        (safetensors_bytes(entry(), b"\0" * 7), "is truncated: tensor x ends"),
        (safetensors_bytes(entry(shape=[10**4000] * 1000, offsets=(0, 10**4000))), "malformed"),
        (safetensors_bytes(entry(shape=[1] * 9, offsets=(0, 4)), b"\0" * 4), "malformed"),
        (safetensors_bytes(entry(offsets=(10**4299, 2 * 10**4299))), "malformed"),
        (safetensors_bytes({"y" * 257: 3}), "a tensor name of 257 characters is absurd"),
        (safetensors_bytes(b'{"%b": 1, "%b": 2}' % (b"x" * 9999, b"x" * 9999)), "duplicate key 'xxx"),
    ],
)
def test_safetensors_headers(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        SafetensorsFile(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_safetensors_writer_is_read_by_the_library(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((3, 5), dtype=np.float32), "b": np.arange(4, dtype=np.float16)}
    tensors["view"] = tensors["a"][1:]
    write_safetensors(tmp_path / "x.safetensors", tensors)
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[name], array)


class Payload:
    """Touches a file when unpickled freely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_are_refused_and_not_executed(tmp_path, make_hf, protocol):
    directory = make_hf()
    (directory / "model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "executed")}, directory / "pytorch_model.bin", pickle_protocol=protocol)
    with pytest.raises(UserError, match="not unpickled"):
        open_source(directory)
    raw = pickle.dumps({"x": Payload(tmp_path / "executed")}, protocol)
    (directory / "pytorch_model.bin").write_bytes(raw)
    with pytest.raises(UserError):
        open_source(directory)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.zeros(2)], "must hold a dict of tensors, got list"),
        ({"state_dict": {"x": torch.zeros(2)}}, "state_dict is dict"),
        ({"x": torch.zeros(2).to_sparse()}, "more than plain tensors (torch._utils _rebuild_sparse_tensor)"),
        ({"x": torch.zeros(2, device="meta")}, "more than plain tensors"),
        ({3: torch.zeros(2)}, "plain tensors only"),
    ],
)
def test_torch_files_of_other_things(tmp_path, state, message):
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        TorchFile(tmp_path / "pytorch_model.bin")
    assert message in str(caught.value)


def test_tensors_that_stretch_a_small_file_are_refused(helpers, make_hf):
    directory = make_hf(helpers.tensors(helpers.tiny), vocab_size=10_000_000)
    (directory / "model.safetensors").unlink()
    state = {key: torch.from_numpy(value) for key, value in helpers.tensors(helpers.tiny).items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.zeros(1, 1).expand(10_000_000, 32)
    torch.save(state, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights cannot fit into"):
        load_base(open_source(directory), "float32")


def text(value):
    return struct.pack("<Q", len(value)) + value


def gguf_bytes(tensors=0, keys=0, body=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def tensor_info(dims, kind=0, offset=0, name=b"x"):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"GGML" + bytes(20), "does not start with GGUF"),
        (gguf_bytes(version=1), "version 1 is not supported"),
        (gguf_bytes(version=3 << 24), "is not supported"),
        (gguf_bytes(tensors=1 << 60), "tensors are absurd"),
        (gguf_bytes(keys=1 << 60), "metadata keys are absurd"),
        (gguf_bytes(keys=1), "truncated or damaged"),
        (gguf_bytes(keys=1, body=struct.pack("<Q", 1 << 50)), "bytes in a string are absurd"),
        (gguf_bytes(keys=1, body=text(b"\xff") + bytes(20)), "not UTF-8"),
        (gguf_bytes(keys=1, body=text(b"k") + struct.pack("<I", 99)), "unknown metadata type 99"),
        (
            gguf_bytes(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60)),
            "strings in an array are absurd",
        ),
        (gguf_bytes(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 60)), "truncated or damaged"),
        (gguf_bytes(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 9, 1 << 20)), "unsupported array"),
        (gguf_bytes(keys=2, body=(text(b"k") + struct.pack("<IB", 0, 1)) * 2), "occurs twice"),
        (
            gguf_bytes(1, 1, text(b"general.alignment") + struct.pack("<II", 4, 3) + tensor_info([1])),
            "power of two",
        ),
        (gguf_bytes(1, body=tensor_info([])), "has 0 dimensions"),
        (gguf_bytes(1, body=tensor_info([1 << 40, 1 << 40])), "is truncated: tensor x"),
        (gguf_bytes(1, body=tensor_info([32], kind=77)), "unknown type 77"),
        (gguf_bytes(1, body=tensor_info([33], kind=8)), "not a multiple of the type's block of 32"),
        (gguf_bytes(2, body=tensor_info([1]) * 2 + bytes(128)), "tensor x occurs twice"),
        (gguf_bytes(1, body=tensor_info([1], name=b"y" * 257)), "a tensor name of 257 characters is absurd"),
        (gguf_bytes(keys=1, body=text(b"k" * 257)), "a metadata key of 257 characters is absurd"),
    ],
)
def test_gguf_headers(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        GGUFFile(path)
    assert message in str(caught.value)


def test_a_gguf_header_is_not_kept_whatever_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr("dvi_jax.importing.gguf_file._MAX_HEADER", 10_000)
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 0, 20_000) + bytes(20_000)))
    with pytest.raises(UserError, match="a header of more than"):
        GGUFFile(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_pipes_are_not_waited_for(make_hf, name):
    directory = make_hf()
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(UserError, match="not a regular file"):
        open_source(directory)


def test_links_are_followed_to_files_alone(make_hf, tmp_path):
    """The Hugging Face cache keeps a model as links to files elsewhere."""
    directory = make_hf()
    (directory / "config.json").rename(tmp_path / "blob")
    (directory / "config.json").symlink_to(tmp_path / "blob")
    assert open_source(directory).config.vocab_size == 40
    (directory / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="not a regular file"):
        open_source(directory)


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "\ud800", "x" * 300, 7, None],
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_of_its_own_directory(make_hf, index, name):
    directory = make_hf()
    (directory / "model.safetensors").rename(directory.parent / "model.safetensors")
    (directory / index).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match=r"the file of model\.norm\.weight must be a plain file name"):
        open_source(directory)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.float64(1e300), "float32", "model.norm.weight holds values too large for float32"),
        (np.float32(3.4e38), "bfloat16", "model.norm.weight holds values too large for bfloat16"),
        (np.float16(-np.inf), "float32", "model.norm.weight holds NaN or infinite values"),
        (np.float64(np.nan), "bfloat16", "model.norm.weight holds NaN or infinite values"),
    ],
)
def test_what_is_stored_is_finite(helpers, make_hf, value, dtype, message):
    tensors = helpers.tensors(helpers.tiny)
    tensors["model.norm.weight"] = np.where(np.arange(32) == 31, value, np.ones(32, value.dtype))
    with pytest.raises(UserError) as caught:
        load_base(open_source(make_hf(tensors)), dtype)
    assert str(caught.value) == f"model.safetensors: tensor {message}"


def valid_files(directory):
    """One small valid file per format, with its parser."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    safetensors.numpy.save_file({"a": array, "b": array}, directory / "x.safetensors")
    torch.save({"a": torch.from_numpy(array)}, directory / "x.bin")
    body = text(b"k") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b") + tensor_info([3, 2]) + bytes(64)
    (directory / "x.gguf").write_bytes(gguf_bytes(1, 1, body))
    return {"x.safetensors": SafetensorsFile, "x.bin": TorchFile, "x.gguf": GGUFFile}


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.gguf"])
def test_damaged_files_load_or_are_refused(tmp_path_factory, name):
    directory = tmp_path_factory.mktemp("fuzz")
    parser = valid_files(directory)[name]
    original = (directory / name).read_bytes()
    parser(directory / name)
    messages = []

    @settings(max_examples=150, deadline=1000)
    @given(st.lists(st.tuples(st.integers(0, len(original) - 1), st.integers(0, 255)), max_size=6), st.data())
    def check(edits, data):
        damaged = bytearray(original)
        for position, value in edits:
            damaged[position] = value
        cut = data.draw(st.integers(0, len(original)) | st.just(len(original)))
        path = directory / f"damaged-{name}"
        path.write_bytes(damaged[:cut])
        try:
            parser(path)
        except UserError as error:
            messages.append(str(error))

    tracemalloc.start()
    check()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(messages) > 20
    assert max(map(len, messages)) < 500
    assert peak < 100 << 20
