"""Snapshots: exact, whole or not there, damage found and the one before used, saving off the training path."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import OptimizerConfig
from dvi_jax.directories import DamageError, hash_files
from dvi_jax.errors import UserError
from dvi_jax.learn import snapshot as snapshot_module
from dvi_jax.learn.fast_update import LearnerState, init_learner
from dvi_jax.learn.replay import Replay
from dvi_jax.learn.snapshot import ARRAYS, CHECKSUMS, PROGRESS, Snapshots

FLIPS = 500
PROGRESS_AT = {"prompts": 7, "seconds": 0.1}


@pytest.fixture(scope="module")
def learner(make_tiny) -> LearnerState:
    """A learner whose arrays are all different from a new one's."""
    state = init_learner(make_tiny().params, OptimizerConfig(average=0.5), Replay.empty(3, 5, 32), jax.random.key(0))
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(state)
    noisy = [
        leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.asarray(rng.integers(0, 2, leaf.shape), leaf.dtype)
        for leaf in leaves
    ]
    return jax.tree.unflatten(structure, noisy).replace(key=jax.random.key(7))


def test_a_snapshot_of_an_earlier_release_is_read(learner, blank, tmp_path):
    """The verifier's states had another name in it, and no taps; an average begins as the weights do."""
    learner = learner.replace(average=learner.trainable)
    with Snapshots(tmp_path, 2, 0) as snapshots:
        snapshots.save(learner, PROGRESS_AT)
    (path,) = (each for each in tmp_path.iterdir() if each.name.isdecimal())
    arrays = dict(np.load(path / ARRAYS))
    arrays["replay/windows/verifier_hidden"] = arrays.pop("replay/windows/features/final")
    arrays = {name: array for name, array in arrays.items() if not name.startswith("average/")}
    np.savez(path / ARRAYS, **arrays)
    (path / CHECKSUMS).write_text(
        json.dumps({name: digest for name, digest in hash_files(path).items() if name != CHECKSUMS}), encoding="utf-8"
    )
    with Snapshots(tmp_path, 2, 0) as snapshots:
        assert_same(snapshots.newest(blank).state, learner)


@pytest.fixture
def blank(learner) -> LearnerState:
    """The structure alone."""
    return jax.tree.map(lambda x: jax.random.key(0) if x is learner.key else jnp.zeros_like(x), learner)


def at(learner: LearnerState, step: int) -> LearnerState:
    return learner.replace(step=jnp.int32(step), baseline=jnp.float32(step))


def save_all(directory, learner, steps, scores=None, *, keep=10, keep_best=0):
    with Snapshots(directory, keep, keep_best) as snapshots:
        for step in steps:
            snapshots.save(at(learner, step), PROGRESS_AT | {"step": step}, score=(scores or {}).get(step))
    assert snapshots.failed == []
    return snapshots


def names(directory):
    return {path.name for path in directory.iterdir()}


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_comes_back_in_every_bit(learner, blank, tmp_path):
    snapshots = save_all(tmp_path, learner, [4, 8])
    found = snapshots.newest(blank)
    assert (found.step, found.progress, found.damaged) == (8, PROGRESS_AT | {"step": 8}, [])
    assert_same(found.state, at(learner, 8))
    with np.load(tmp_path / "8" / ARRAYS) as arrays:  # without this package
        np.testing.assert_array_equal(arrays["replay/windows/reward"], learner.replay.windows.reward)


def test_none_yet(blank, tmp_path):
    assert Snapshots(tmp_path / "none", 2, 0).newest(blank) is None


def test_the_newest_and_the_best_are_kept(learner, blank, tmp_path):
    scores = {2: 0.1, 6: 0.5, 8: 0.5, 10: 0.3}
    snapshots = save_all(tmp_path, learner, range(2, 17, 2), scores, keep=2, keep_best=1)
    assert names(tmp_path) == {"8", "14", "16"}
    assert snapshots.last_good(blank, lambda step: True, best=True).step == 8
    assert snapshots.last_good(blank, lambda step: True).step == 16
    assert snapshots.last_good(blank, lambda step: step < 16).step == 14
    assert snapshots.last_good(blank, lambda step: step < 8) is None


def test_an_irregular_one_is_kept_while_it_is_the_newest(learner, blank, tmp_path):
    """A run that was stopped and one that was not go back to the same snapshots."""
    save_all(tmp_path, learner, [2, 4, 6], keep=2)
    with Snapshots(tmp_path, 2, 0) as snapshots:
        snapshots.save(at(learner, 7), {}, regular=False)
        assert snapshots.last_good(blank, lambda step: True).step == 6
        assert snapshots.newest(blank).step == 7
        assert names(tmp_path) == {"4", "6", "7"}
        snapshots.save(at(learner, 8), {})
    assert names(tmp_path) == {"6", "8"}


def test_a_state_is_saved_once(learner, tmp_path):
    save_all(tmp_path, learner, [2])
    before = (tmp_path / "2" / ARRAYS).stat().st_ino
    save_all(tmp_path, learner, [2])
    assert (tmp_path / "2" / ARRAYS).stat().st_ino == before


def cut_off(directory):
    os.truncate(directory / ARRAYS, (directory / ARRAYS).stat().st_size - 1)


def flip(directory):
    path = directory / ARRAYS
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def lose_file(directory):
    (directory / ARRAYS).unlink()


def lose_progress(directory):
    (directory / PROGRESS).unlink()


def lose_checksums(directory):
    (directory / CHECKSUMS).unlink()


def forget_a_checksum(directory):
    checksums = json.loads((directory / CHECKSUMS).read_text(encoding="utf-8"))
    (directory / CHECKSUMS).write_text(json.dumps({ARRAYS: checksums[ARRAYS]}), encoding="utf-8")


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


DAMAGES = [cut_off, flip, lose_file, lose_progress, lose_checksums, forget_a_checksum, empty]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(learner, blank, tmp_path, damage):
    snapshots = save_all(tmp_path, learner, [4, 8])
    damage(tmp_path / "8")
    found = snapshots.newest(blank)
    assert_same(found.state, at(learner, 4))
    assert len(found.damaged) == 1
    assert f"{tmp_path}/8/" in found.damaged[0]
    assert "\n" not in found.damaged[0]
    assert names(tmp_path) == {"4", "8.damaged"}
    save_all(tmp_path, learner, [8])  # the run gets there again
    assert snapshots.newest(blank).step == 8


def test_an_empty_directory_is_no_snapshot(learner, blank, tmp_path):
    snapshots = save_all(tmp_path, learner, [4])
    (tmp_path / "99").mkdir()
    assert snapshots.newest(blank).step == 4


def test_if_all_are_damaged_nothing_is_touched(learner, blank, tmp_path):
    snapshots = save_all(tmp_path, learner, [4, 8])
    flip(tmp_path / "4")
    empty(tmp_path / "8")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError, match=rf"no snapshot under {tmp_path} is whole .*/8/.*/4/.*nothing was deleted"
    ) as told:
        snapshots.newest(blank)
    assert "\n" not in str(told.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert snapshots.last_good(blank, lambda step: True) is None


def test_every_flipped_bit_is_found(learner, blank, tmp_path):
    """A bit at `FLIPS` places of a snapshot: spread over the bytes, and every tenth in one of the small files."""
    snapshots, rng = save_all(tmp_path, learner, [4]), np.random.default_rng(1)
    files = [tmp_path / "4" / name for name in (ARRAYS, PROGRESS, CHECKSUMS)]
    harmless = 0
    for number in range(FLIPS):
        path = files[0] if number % 10 else files[1 + number // 10 % 2]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert_same(snapshots._read(4, blank)[0], at(learner, 4))
            harmless += 1
        except DamageError:
            pass
        path.write_bytes(whole)
    assert harmless < 3  # a blank between the checksums


def test_other_settings_are_an_error_not_damage(learner, blank, tmp_path):
    snapshots = save_all(tmp_path, learner, [4])
    larger = blank.replace(replay=Replay.empty(4, 5, 32))
    with pytest.raises(
        UserError, match=r"does not fit these settings: replay/windows/tokens is int32 \(3, 5\)"
    ) as told:
        snapshots.newest(larger)
    assert not isinstance(told.value, DamageError)
    with pytest.raises(UserError, match="does not fit these settings: it has baseline"):
        snapshots.newest(blank.replace(baseline=None))
    assert names(tmp_path) == {"4"}


def test_learning_does_not_wait_for_a_save(learner, blank, tmp_path, monkeypatch):
    """Only the second save waits for the first; and the arrays may be given away meanwhile."""
    returned, write = threading.Event(), snapshot_module.write_arrays
    waited = []

    def slow(path, arrays):
        waited.append(returned.wait(60))
        write(path, arrays)

    monkeypatch.setattr(snapshot_module, "write_arrays", slow)
    state = jax.tree.map(jnp.copy, at(learner, 4))
    with Snapshots(tmp_path, 2, 0) as snapshots:
        snapshots.save(state, {})
        jax.tree.map(lambda x: x.delete(), state)
        returned.set()
        snapshots.save(at(learner, 6), {})
        assert "4" in names(tmp_path)
    assert waited == [True, True]
    assert_same(snapshots.last_good(blank, lambda step: step == 4).state, at(learner, 4))


def test_a_disk_that_refuses_leaves_the_snapshots_before(learner, blank, tmp_path):
    """The operating system itself refuses, at a limit to the size of files."""
    with Snapshots(tmp_path, 2, 0) as snapshots:
        snapshots.save(at(learner, 2), {})
        snapshots.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            snapshots.save(at(learner, 4), {})
            snapshots.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [(failed.step, failed.reason) for failed in snapshots.failed] == [(4, os.strerror(errno.EFBIG))]
        assert names(tmp_path) == {"2"}
        assert_same(snapshots.newest(blank).state, at(learner, 2))
        snapshots.save(at(learner, 6), {})
    assert names(tmp_path) == {"2", "6"}


def test_metrics_that_cannot_be_written_fail_the_save(learner, tmp_path):
    def refuse():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Snapshots(tmp_path, 2, 0) as snapshots:
        snapshots.save(at(learner, 2), {}, before=refuse)
    assert [failed.reason for failed in snapshots.failed] == ["No space left on device"]
    assert names(tmp_path) == set()


def test_what_is_not_finite_is_never_written(learner, blank, tmp_path):
    """Neither a weight nor a moment; the snapshot before stays the newest."""
    with Snapshots(tmp_path, 2, 0) as snapshots:
        snapshots.save(at(learner, 2), {})
        for step, bad in ((4, np.nan), (6, np.inf)):
            snapshots.save(at(learner, step).replace(baseline=jnp.float32(bad)), {})
    assert [(failed.step, failed.reason) for failed in snapshots.failed] == [
        (4, "baseline has numbers that are not finite"),
        (6, "baseline has numbers that are not finite"),
    ]
    assert names(tmp_path) == {"2"}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (MemoryError(), "out of memory"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no\nmemory"), "RESOURCE_EXHAUSTED: no memory"),
    ],
)
def test_a_save_without_memory_is_a_failed_one(learner, tmp_path, monkeypatch, fault, reason):
    """In the thread, and where the arrays are copied for it."""

    def fail(*_):
        raise fault

    with Snapshots(tmp_path, 2, 0) as snapshots:
        for name, module in (("write_arrays", snapshot_module), ("copy", jnp)):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, fail)
                snapshots.save(at(learner, 2), {})
                snapshots.wait()
    assert [(failed.step, failed.reason) for failed in snapshots.failed] == [(2, reason)] * 2
    assert names(tmp_path) == set()
