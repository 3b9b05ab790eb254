"""A display that cannot write, or a picture, ends no run: one line on stderr, and the work goes on."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dvi_jax import train
from dvi_jax.config import TrainConfig
from dvi_jax.display import UnfailingStream
from dvi_jax.evaluate import curve

ROOT = Path(__file__).parents[1]


class Full(io.StringIO):
    """Takes one line, then nothing more."""

    def write(self, text):
        if self.tell():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


def test_what_a_stream_does_not_take_is_dropped_and_told_once(capsys):
    full = Full()
    console = Console(file=UnfailingStream(full))
    for number in range(3):
        console.print(f"line {number}")
    assert full.getvalue() == "line 0\n"
    told = "note: the output cannot be written (No space left on device): the work goes on without it\n"
    assert capsys.readouterr().err == told


SHOW = """
import sys
from dvi_jax.display import unfailing_console
from dvi_jax.errors import run_cli
def work():
    console = unfailing_console()
    for number in range(3):
        console.print("line")
    open(sys.argv[1], "w").close()
sys.exit(run_cli(work))
"""


@pytest.mark.parametrize("where", [">/dev/full", "| true"])
@pytest.mark.parametrize("errors", ["", "2>/dev/full"])
def test_work_goes_on_without_readers_or_room(tmp_path, where, errors):
    """Whether stderr can take the one line or not, and the status is that of the work."""
    script = f'"$@" {errors} {where}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", script, "bash", sys.executable, "-c", f"import time; time.sleep(0.2)\n{SHOW}"]
    ended = subprocess.run([*command, str(tmp_path / "done")], cwd=ROOT, capture_output=True, check=False)
    assert (tmp_path / "done").exists()
    assert ended.returncode == 0
    assert len(ended.stderr.splitlines()) == (0 if errors else 1)


@pytest.mark.parametrize("fault", [OSError(errno.EACCES, "Permission denied"), MemoryError()])
def test_a_picture_that_cannot_be_drawn_is_one_line(tmp_path, capsys, monkeypatch, fault):
    """The result of the run is given back all the same."""

    def fail(path):
        raise fault

    monkeypatch.setattr(train, "plot_learning_curve", curve.plot_learning_curve)
    monkeypatch.setattr(curve, "read_records", fail)
    monkeypatch.setattr(train, "train_online", lambda config, **_: "result")
    assert train.run(TrainConfig("c", str(tmp_path)), resume=False, console=Console()) == "result"
    reason = "out of memory" if isinstance(fault, MemoryError) else "[Errno 13] Permission denied"
    assert capsys.readouterr().out == f"no curve: {reason}\n"
