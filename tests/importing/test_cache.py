"""Whatever a checkpoint is taken for: imported once, found again, imported anew when it changes, whole after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from conversion.__main__ import main as conversion
from conversion.importing import import_model
from dvi_jax import load
from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.errors import UserError
from dvi_jax.generate import main as generate
from dvi_jax.importing.cache import checkpoint_directory, open_checkpoint
from experiments.families import cases

CASES = {case.name: case for case in cases()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of ours, and an empty one of Hugging Face's."""
    monkeypatch.setenv("DVI_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def models(cache):
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.startswith("."))


def test_a_directory_is_imported_once(cache, tmp_path, capfd):
    source = CASES["qwen2"].write(tmp_path / "my model")
    import_model(source, tmp_path / "explicit")
    expected = read_checkpoint(tmp_path / "explicit")
    first = open_checkpoint(source)
    line = capfd.readouterr().err
    assert line.startswith(f"importing {source} as float32 into {cache}")
    assert line.count("\n") == 1
    again = open_checkpoint(str(source))
    assert capfd.readouterr().err == ""
    assert again.path == first.path
    assert first.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, first.base, expected.base)
    assert len(models(cache)) == 1


def test_dtypes_and_changes_are_imports_of_their_own(cache, tmp_path):
    source = CASES["qwen2"].write(tmp_path / "model")
    assert open_checkpoint(source, "bfloat16").manifest.dtype == "bfloat16"
    before = open_checkpoint(source, "float32")
    assert before.manifest.dtype == "float32"
    with pytest.raises(UserError, match="holds float32 weights"):
        open_checkpoint(before.path, "bfloat16")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    assert open_checkpoint(source, "float32").config.rope_theta == 5e5
    weights, times = source / "model.safetensors", os.stat(source / "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # of the last weight; size and time of modification stay
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_checkpoint(source, "float32").manifest.base_sha256 != before.manifest.base_sha256
    assert len(models(cache)) == 4


def test_names_in_the_hugging_face_cache(cache, tmp_path, monkeypatch):
    """Blobs, and snapshots of links to them, as huggingface_hub lays them out."""
    repository = tmp_path / "hub" / "models--some-org--Tiny-Model.v1"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    for revision, name in (("a" * 40, "qwen2"), ("b" * 40, "yi")):
        written = CASES[name].write(tmp_path / name)
        (repository / "snapshots" / revision).mkdir(parents=True)
        for path in written.iterdir():
            shutil.copy(path, repository / "blobs" / f"{name}-{path.name}")
            (repository / "snapshots" / revision / path.name).symlink_to(f"../../blobs/{name}-{path.name}")
    (repository / "refs" / "main").write_text("a" * 40)
    assert open_checkpoint("some-org/Tiny-Model.v1").config.model_type == "qwen2"
    (repository / "refs" / "main").write_text("b" * 40)
    assert open_checkpoint("some-org/Tiny-Model.v1").config.rope_theta == 5e6
    assert [name[:23] for name in models(cache)] == ["some-org--Tiny-Model.v1"] * 2
    command = ["conversion", "import", "--from", "some-org/Tiny-Model.v1", "--out", str(tmp_path / "imported")]
    monkeypatch.setattr(sys, "argv", command)
    assert conversion() == 0
    assert read_checkpoint(tmp_path / "imported").config.rope_theta == 5e6
    for name in ("some-org/other", "../no/such", "some-org/Tiny-Model.v1/x/y", "org/" + "x" * 5000):
        with pytest.raises(UserError, match="no checkpoint at"):
            open_checkpoint(name)


def test_a_directory_of_gguf_files(cache, tmp_path):
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"a\.gguf"):
        open_checkpoint(folder)
    (folder / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"holds several GGUF files: name one of a\.gguf, b\.gguf"):
        open_checkpoint(folder)


def test_the_commands_and_load_take_it(cache, tmp_path, capsys):
    source = CASES["mistral nemo"].write(tmp_path / "nemo")
    options = ["--prompt-ids", "5,9,2", "--max-new-tokens", "6", "--eos-id", "-1", "--json"]
    assert generate(["--checkpoint", str(source), *options]) == 0
    found = json.loads(capsys.readouterr().out)["new_ids"]
    assert generate(["--checkpoint", str(source), "--plain", *options]) == 0
    assert json.loads(capsys.readouterr().out)["new_ids"] == found
    assert load(source).config.head_dim == 16
    assert len(models(cache)) == 1


def test_what_cannot_be_imported_leaves_nothing(cache, tmp_path):
    source = CASES["qwen2"].write(tmp_path / "model")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        open_checkpoint(source)
    assert models(cache) == []
    cache_file = tmp_path / "file"
    cache_file.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVI_JAX_CACHE", str(cache_file))
        with pytest.raises(UserError, match=r"cannot import into .*set DVI_JAX_CACHE to a folder"):
            open_checkpoint(source)


IMPORT = """
import sys, time
from dvi_jax.importing import cache, checkpoint
loading = checkpoint.load_base
def slow(*arguments):
    base = loading(*arguments)
    open(sys.argv[1] + ".began", "w").close()
    time.sleep(float(sys.argv[2]))
    return base
checkpoint.load_base = slow
print(cache.checkpoint_directory(sys.argv[1]))
"""


def start(source, root, *arguments):
    command = [sys.executable, "-c", IMPORT, str(source), *arguments]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_import_and_two_at_once(cache, tmp_path, pytestconfig, capsys):
    source, root = CASES["yi"].write(tmp_path / "model"), pytestconfig.rootpath
    began = tmp_path / "model.began"
    killed = start(source, root, "600")
    wait_for(began)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = cache / "models" / f".{checkpoint_name(source)}.0123abcd.partial"
    left.mkdir(parents=True)  # what a writer leaves that is killed later
    assert models(cache) == []
    began.unlink()
    slow = start(source, root, "3")
    wait_for(began)
    capsys.readouterr()
    found = checkpoint_directory(source)  # waits for the other, and then finds its import
    assert "importing" not in capsys.readouterr().err
    out, err = slow.communicate()
    assert (out.strip(), err.count("importing")) == (str(found), 1)
    assert models(cache) == [checkpoint_name(source)]
    assert not left.exists()
    assert open_checkpoint(source).path == checkpoint_directory(source)


def checkpoint_name(source):
    from dvi_jax.importing.cache import _identity

    return f"model-float32-{_identity(source, 'float32')}"
