"""Control groups as files in a folder: what they leave of the machine's memory."""

from __future__ import annotations

import errno
import os

import pytest

from dvi_jax import directories
from dvi_jax.containers import container_bytes
from dvi_jax.decode import memory
from dvi_jax.directories import partial_directory
from dvi_jax.errors import UserError
from dvi_jax.importing import cache

MIB = 2**20


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n", encoding="ascii")


def test_version_2(tmp_path):
    """The tightest of all groups above counts, and cached files of which there is no need do not."""
    process = tmp_path / "process"
    process.write_text("0::/outer/inner\n", encoding="ascii")
    assert container_bytes(tmp_path, process) is None
    stat = f"anon 5\ninactive_file {30 * MIB}"
    group(tmp_path / "outer", memory__max=100 * MIB, memory__current=60 * MIB, memory__stat=stat)
    group(tmp_path / "outer" / "inner", memory__max="max", memory__current=60 * MIB)
    assert container_bytes(tmp_path, process) == 70 * MIB
    group(tmp_path / "outer" / "inner", memory__max=80 * MIB, memory__current=79 * MIB)
    assert container_bytes(tmp_path, process) == MIB
    group(tmp_path / "outer" / "inner", memory__max=80 * MIB, memory__current=90 * MIB)
    assert container_bytes(tmp_path, process) == 0


def test_version_1(tmp_path):
    """The group's own folder may not be visible from inside, and the root then has the limit."""
    process = tmp_path / "process"
    process.write_text("5:devices:/x\n4:memory,other:/docker/abc\n", encoding="ascii")
    root = tmp_path / "memory"
    stat = f"inactive_file 1\ntotal_inactive_file {2 * MIB}"
    group(root, memory__limit_in_bytes=50 * MIB, memory__usage_in_bytes=20 * MIB, memory__stat=stat)
    assert container_bytes(tmp_path, process) == 32 * MIB
    assert container_bytes(tmp_path / "none", process) is None


def test_what_is_available_is_the_least(monkeypatch):
    monkeypatch.setattr(memory, "container_bytes", lambda: 3 * MIB)
    assert memory.available_bytes() == 3 * MIB
    with pytest.raises(UserError, match=r"^these arrays need 4\.0 MiB, but there are 3\.0 MiB$"):
        memory.check_room(4 * MIB, "these arrays")
    memory.check_room(2 * MIB, "these arrays")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_no_directories(tmp_path, monkeypatch, number):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(directories.os, "fsync", fsync)
    with partial_directory(tmp_path / "new") as partial:
        (partial / "x").write_text("", encoding="utf-8")
    assert (tmp_path / "new" / "x").exists()
    monkeypatch.setattr(directories.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "")))
    with pytest.raises(OSError, match="5"), partial_directory(tmp_path / "other"):
        pass


def test_a_user_without_a_home_has_no_hub_cache(monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "expanduser", expanduser)
    with pytest.raises(UserError, match="no checkpoint at org/name: no such file or directory"):
        cache.checkpoint_directory("org/name")
