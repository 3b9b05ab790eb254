"""The directory of a run: one owner, and where its checkpoint goes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dvi_jax.config import DistillConfig, load_train_config
from dvi_jax.errors import UserError
from dvi_jax.learn.offline import train_offline
from dvi_jax.learn.online import train_online
from dvi_jax.learn.run_directory import RunDirectory, lock

ROOT = Path(__file__).parents[2]
HOLD = "import sys, pathlib; from dvi_jax.learn.run_directory import lock; file = lock(pathlib.Path(sys.argv[1]))"


def run_directory(out, **options):
    defaults = {"keep": 2, "keep_best": 0, "resume": False, "report": lambda kind, record: None}
    return RunDirectory(out, **defaults | options)


def test_a_second_trainer_is_refused(write_config, tmp_path):
    """Whichever trainer it is, and whether it resumes or not; the owner is named."""
    out = tmp_path / "run"
    owner = rf"{out} is in use by process {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\dT"
    with run_directory(out):
        for resume in (False, True):
            with pytest.raises(UserError, match=owner):
                train_online(load_train_config(write_config()), resume=resume)
            with pytest.raises(UserError, match=owner):
                train_offline(DistillConfig("none", str(out), ("none.npz",)), resume=resume)
    with pytest.raises(UserError, match="no checkpoint at none"):  # the directory is free again
        train_offline(DistillConfig("none", str(out), ("none.npz",)))


def test_a_failed_start_leaves_no_folder(tmp_path):
    """Nor its parents; what was there before stays, and so does a folder in which somebody else put something."""
    (tmp_path / "runs").mkdir()
    for out in (tmp_path / "new" / "er" / "run", tmp_path / "runs" / "run"):
        with pytest.raises(UserError, match="no checkpoint at none"):
            train_offline(DistillConfig("none", str(out), ("none.npz",)))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert not list((tmp_path / "runs").iterdir())
    out = tmp_path / "mine"

    def fail():
        with run_directory(out):
            (out / "notes.txt").write_text("keep", encoding="utf-8")
            raise UserError("a reason")

    with pytest.raises(UserError, match="a reason"):
        fail()
    assert (out / "notes.txt").read_text(encoding="utf-8") == "keep"


def test_a_killed_owner_blocks_nobody(tmp_path):
    """The owner is another process, which SIGKILL ends without a chance to clean up."""
    command = [sys.executable, "-c", f"{HOLD}; print('held', flush=True); sys.stdin.read()", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {owner.pid} on "):
            lock(tmp_path)
        os.kill(owner.pid, signal.SIGKILL)
    assert f"process {owner.pid} " in (tmp_path / "LOCK").read_text(encoding="utf-8")
    lock(tmp_path).close()


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    for folder in (tmp_path / ".checkpoint.1a2b.partial" / "base", tmp_path / "snapshots" / ".40.3c4d.partial"):
        folder.mkdir(parents=True)
    with run_directory(tmp_path):
        assert not list(tmp_path.rglob("*.partial"))


def test_checkpoint_path(tmp_path):
    """What is not this very checkpoint is left, whatever it is, and the next name taken."""
    mine: list[Path] = []
    with run_directory(tmp_path) as directory:
        for name in ("checkpoint", "checkpoint-40", "checkpoint-40-2"):
            assert directory.checkpoint_path(40, mine.__contains__) == (tmp_path / name, False)
            (tmp_path / name).symlink_to("nowhere")
        mine.append(tmp_path / "checkpoint-40")
        assert directory.checkpoint_path(40, mine.__contains__) == (tmp_path / "checkpoint-40", True)
