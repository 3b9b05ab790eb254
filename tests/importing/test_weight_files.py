"""Directories and files as people have them: heads alone, indices that list too much, pointers, parts of a GGUF."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import safetensors.numpy

from dvi_jax.errors import UserError
from dvi_jax.importing.source import load_base, open_source
from experiments.families import cases

CASES = {case.name: case for case in cases()}
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4938985352\n"
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def load(path):
    return load_base(open_source(path), "float32")


@pytest.fixture
def tied(tmp_path):
    """A tied model's directory and its tensors, the embedding among them."""
    case = CASES["qwen2.5, tied"]
    return case.write(tmp_path / "tied"), dict(case.tensors)


def test_a_tied_model_saved_with_its_head_alone(tied):
    directory, tensors = tied
    expected = load(directory)
    tensors[HEAD] = tensors.pop(EMBED)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    found = load(directory)
    np.testing.assert_array_equal(found["embed"], tensors[HEAD])
    assert found.keys() == expected.keys()


def test_an_untied_model_needs_both(tmp_path):
    case = CASES["qwen2"]
    for name in (HEAD, EMBED):
        tensors = {key: value for key, value in case.tensors.items() if key != name}
        directory = case.write(tmp_path / name)
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        with pytest.raises(UserError, match=f"tensor {name} is missing"):
            load(directory)


def test_a_bias_that_is_missing(tmp_path):
    directory = CASES["qwen2"].write(tmp_path / "model")
    tensors = dict(CASES["qwen2"].tensors)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj\.bias is missing \(expected shape \[16\]\)"):
        load(directory)


def test_an_index_may_list_what_nobody_needs(tied):
    directory, tensors = tied
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    listed = dict.fromkeys([*tensors, HEAD, "model.layers.0.self_attn.rotary_emb.inv_freq"], "a.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    np.testing.assert_array_equal(load(directory)["embed"], tensors[EMBED])
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if k != EMBED}, directory / "a.safetensors")
    with pytest.raises(UserError, match=rf"tensor {EMBED} is missing"):
        load(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin", "tokenizer.json"])
def test_git_lfs_pointers(tmp_path, name):
    directory = CASES["qwen2"].write(tmp_path / "model")
    if name == "pytorch_model.bin":
        (directory / "model.safetensors").unlink()
    (directory / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer, not the file itself: fetch it"):
        load(directory)


def test_a_gguf_that_is_a_pointer(tmp_path):
    (tmp_path / "model.gguf").write_text(POINTER)
    with pytest.raises(UserError, match=r"model\.gguf is a Git LFS pointer"):
        load(tmp_path / "model.gguf")


def write_parts(folder, count=3):
    """A small qwen2 model split as llama.cpp's gguf-split does: metadata in the first part, tensors in all."""
    folder.mkdir()
    names = [folder / f"tiny-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    tensors = {"token_embd.weight": (24, 16), "output_norm.weight": (16,)}
    for layer in range(2):
        shapes = {"attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16)}
        shapes |= {
            "ffn_gate": (32, 16),
            "ffn_up": (32, 16),
            "ffn_down": (16, 32),
            "attn_norm": (16,),
            "ffn_norm": (16,),
        }
        tensors |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        tensors |= {f"blk.{layer}.attn_{part}.bias": (shapes[f"attn_{part}"][0],) for part in "qkv"}
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in tensors.items()}
    for number, path in enumerate(names):
        writer = gguf.GGUFWriter(path, "qwen2")
        if number == 0:
            writer.add_block_count(2)
            writer.add_context_length(64)
            writer.add_embedding_length(16)
            writer.add_feed_forward_length(32)
            writer.add_head_count(2)
            writer.add_head_count_kv(1)
            writer.add_layer_norm_rms_eps(1e-6)
        for key, value in (("split.no", number), ("split.count", count)):
            writer.add_uint16(key, value)
        writer.add_int32("split.tensors.count", len(tensors))
        for name in list(tensors)[number::count]:
            writer.add_tensor(name, tensors[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names, tensors


def test_a_split_gguf_is_read_whole_from_any_part(tmp_path):
    names, tensors = write_parts(tmp_path / "parts")
    source = open_source(names[0])
    assert source.config.model_type == "qwen2"
    assert source.weights.files == tuple(names)
    base = load_base(source, "float32")
    np.testing.assert_array_equal(base["embed"], tensors["token_embd.weight"])
    parts = [tensors[f"blk.1.attn_{part}.weight"] for part in "qkv"]
    np.testing.assert_array_equal(base["layers"]["1"]["qkv"], np.concatenate(parts))
    biases = [tensors[f"blk.1.attn_{part}.bias"] for part in "qkv"]
    np.testing.assert_array_equal(base["layers"]["1"]["qkv_bias"], np.concatenate(biases))
    assert open_source(names[1]).weights.files == tuple(names)


def test_a_folder_of_gguf_files_is_called_that(tmp_path):
    write_parts(tmp_path / "model")
    with pytest.raises(UserError, match=r"model holds GGUF files: name the one to use, such as tiny-00001-of-00003"):
        open_source(tmp_path / "model")


def test_parts_that_are_missing_renamed_or_of_another_model(tmp_path):
    names, _ = write_parts(tmp_path / "parts")
    other, _ = write_parts(tmp_path / "other", count=2)
    shutil.copy(names[0], tmp_path / "alone.gguf")
    with pytest.raises(UserError, match=r"alone\.gguf is part 1 of 3; the parts must be named as they were split"):
        open_source(tmp_path / "alone.gguf")
    shutil.copy(names[0], names[1])
    with pytest.raises(UserError, match=r"tiny-00002-of-00003\.gguf is not part 2 of 3"):
        open_source(names[0])
    names[1].unlink()
    names[2].unlink()
    missing = r"part 1 of 3; tiny-00002-of-00003\.gguf, tiny-00003-of-00003\.gguf must lie beside it"
    with pytest.raises(UserError, match=missing):
        open_source(names[0])
    other[1].unlink()
    with pytest.raises(UserError, match=r"part 1 of 2; tiny-00002-of-00002\.gguf must lie beside it"):
        open_source(other[0])


WITHOUT = """
import importlib, pkgutil, sys
from pathlib import Path
sys.modules |= dict.fromkeys(("torch", "transformers", "conversion"))  # whoever imports one, fails
import dvi_jax
for module in pkgutil.walk_packages(dvi_jax.__path__, "dvi_jax."):
    if not module.name.endswith(("__main__", "template_worker")):
        importlib.import_module(module.name)
from dvi_jax.errors import UserError
from dvi_jax.importing.source import load_base, open_source
def told(path):
    try:
        return load_base(open_source(Path(path)), "float32")["embed"].sum()
    except UserError as error:
        return error
whole, shards = sys.argv[1:]
print(told(whole), told(shards), sep="\\n")
del sys.modules["conversion"]  # that is here again, torch is not
print(told(shards))
assert not {"torch", "transformers"} & {name for name, module in sys.modules.items() if module}
"""


def test_the_library_reads_models_without_torch(tmp_path, pytestconfig):
    """Every module of it can be imported; PyTorch files need the package conversion, and that needs torch."""
    case = CASES["mistral 0.3"]
    paths = case.write(tmp_path / "whole"), case.write(tmp_path / "bin", "bin shards")
    command = [sys.executable, "-c", WITHOUT, *map(str, paths)]
    ended = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True)
    embedding, without_package, without_torch = ended.stdout.splitlines()
    assert float(embedding) == pytest.approx(case.tensors[EMBED].sum(), rel=1e-5)
    assert "needs the package conversion" in without_package
    assert "needs PyTorch: install torch" in without_torch
