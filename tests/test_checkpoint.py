"""The checkpoint directory: damage is found and named before an array is read, and a full disk leaves nothing."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from dvi_jax.checkpoint import MANIFEST, read_checkpoint, read_manifest, rewrite_checkpoint
from dvi_jax.errors import UserError
from dvi_jax.loading import from_checkpoint, trained_parts

FLIPS = 500


@pytest.fixture
def copied(byte_checkpoint, tmp_path):
    return shutil.copytree(byte_checkpoint, tmp_path / "copied")


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def largest(directory):
    return max(files_of(directory / "base"), key=lambda path: path.stat().st_size)


def edit_manifest(directory, change):
    document = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    change(document)
    (directory / MANIFEST).write_text(json.dumps(document), encoding="utf-8")


def test_every_file_has_its_checksum(byte_checkpoint):
    checksums = json.loads((byte_checkpoint / MANIFEST).read_text(encoding="utf-8"))["checksums"]
    assert set(checksums) == {path.relative_to(byte_checkpoint).as_posix() for path in files_of(byte_checkpoint)}
    assert {"config.json", "tokenizer.json"} < set(checksums)


def test_nothing_tells_where_it_was_written(byte_checkpoint):
    """It is made to be handed on: orbax's mark names its folder of its own accord."""
    assert files_of(byte_checkpoint)
    telling = [path for path in files_of(byte_checkpoint) if os.fsencode(byte_checkpoint.parent) in path.read_bytes()]
    assert telling == []


def test_every_flipped_bit_is_found_or_changes_nothing(copied):
    """A bit at `FLIPS` places: a tenth spread over the files, however small, the others over the bytes."""
    rng = np.random.default_rng(0)
    files = files_of(copied)
    sizes = np.array([path.stat().st_size for path in files])
    manifest, config = read_manifest(copied), (copied / "config.json").read_bytes()
    places = [divmod(i, len(files))[1] for i in range(FLIPS // 10)]
    places += rng.choice(len(files), FLIPS - len(places), p=sizes / sizes.sum()).tolist()
    harmless, complaints = collections.Counter(), set()
    for index in places:
        path, whole = files[index], files[index].read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert read_manifest(copied) == manifest
            harmless[path.name] += 1
        except UserError as error:
            complaints.add(str(error))
        path.write_bytes(whole)
    # Between the values of the manifest, which is compared by what it says, a blank may become another blank.
    assert set(harmless) <= {MANIFEST}
    assert sum(harmless.values()) < 5
    assert all(str(copied) in complaint for complaint in complaints)
    assert (copied / "config.json").read_bytes() == config
    assert read_manifest(copied) == manifest


def cut_off(directory):
    path = largest(directory)
    path.write_bytes(path.read_bytes()[:-1])
    return path


def remove(directory):
    path = largest(directory)
    path.unlink()
    return path


def empty_directory(directory):
    path = largest(directory)
    path.unlink()
    path.mkdir()
    return path


def pipe(directory):
    """Opening it would wait for ever."""
    path = largest(directory)
    path.unlink()
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("damage", [cut_off, remove, empty_directory, pipe])
def test_damage_is_named(copied, damage):
    path = damage(copied)
    with pytest.raises(UserError, match=f"{path} is (damaged|missing)"):
        read_checkpoint(copied)


def test_a_part_that_vanished_is_missed(copied, tmp_path):
    """A trained drafter that is gone must not leave an untrained one."""
    whole = read_checkpoint(copied)
    rewrite_checkpoint(whole, tmp_path / "trained", drafter={"norm": np.ones(3, np.float32)})
    shutil.rmtree(tmp_path / "trained" / "drafter")
    with pytest.raises(UserError, match=r"trained/drafter/.* is missing"):
        read_checkpoint(tmp_path / "trained")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "base/../../secret", ".", ""])
def test_checksums_lead_nowhere_outside(copied, name):
    (copied.parent / "secret").write_text("", encoding="utf-8")
    edit_manifest(copied, lambda m: m.update(checksums={name: "0" * 64}))
    with pytest.raises(UserError, match="which is not a file inside it"):
        read_checkpoint(copied)


@pytest.mark.parametrize("checksums", [[], "x", 1, None])
def test_checksums_of_another_type(copied, checksums):
    edit_manifest(copied, lambda m: m.update(checksums=checksums))
    with pytest.raises(UserError, match="checksums must be an object of file names"):
        read_checkpoint(copied)


def test_the_manifest_itself_is_checked(copied):
    edit_manifest(copied, lambda m: m.update(exit_layer=2))
    with pytest.raises(UserError, match=r"MANIFEST\.json is damaged"):
        read_checkpoint(copied)


def test_a_manifest_without_checksums_is_believed(copied):
    """As written by earlier versions, and by who changes a file on purpose."""
    before = read_checkpoint(copied)
    edit_manifest(copied, lambda m: m.pop("checksums"))
    edit_manifest(copied, lambda m: m.update(exit_layer=2))
    after = read_checkpoint(copied)
    assert after.manifest.exit_layer == 2
    jax.tree.map(np.testing.assert_array_equal, after.base, before.base)


def test_a_full_disk_leaves_nothing(copied, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        UserError, match=r"cannot write .*/again: no space left: 0\.\d MiB are needed, 0\.0 MiB are free"
    ):
        rewrite_checkpoint(read_checkpoint(copied), tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"copied"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_neither_written_nor_used(byte_checkpoint, tmp_path, bad):
    whole, trained = read_checkpoint(byte_checkpoint), {"norm": np.array([1.0, bad], np.float32)}
    with pytest.raises(UserError, match="drafter/norm has numbers that are not finite"):
        rewrite_checkpoint(whole, tmp_path / "new", drafter=trained)
    assert not list(tmp_path.iterdir())
    params = from_checkpoint(whole).params
    drafter = jax.tree.map(lambda leaf: np.full(leaf.shape, bad, leaf.dtype), trained_parts(params)["drafter"])
    with pytest.raises(UserError, match=r"/drafter: .* has numbers that are not finite"):
        from_checkpoint(dataclasses.replace(whole, drafter=drafter))
