"""SIGTERM and SIGINT: the running update ends, a snapshot is taken; a second one ends the process at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.config import load_train_config
from dvi_jax.learn import online, run
from dvi_jax.learn.online import train_online
from dvi_jax.learn.snapshot import PROGRESS
from dvi_jax.train import main, notice

ROOT = Path(__file__).parents[2]
SHORT = {"prompts": 40, "eval_every": 10, "save_every": 5}

KILLED = "lambda: os.kill(os.getpid(), signal.NUMBER) or signal.pause()"
TWICE = """
import os, signal
from dvi_jax.learn.stopping import StopSignals
with StopSignals() as signals, signals.held():
    os.kill(os.getpid(), signal.SIGTERM)
    print(signals.received, flush=True)
    os.kill(os.getpid(), signal.{second})
    print("still here", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.full)]
)
def test_a_stopped_run_goes_on_bit_for_bit(write_config, tmp_path, number, status):
    """Stopped twice: in the first update, and between two snapshots."""
    stopped, told = tmp_path / "stopped", []
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def stop_at(step):
        def report(kind, record):
            if kind == "train" and record["step"] == step:
                os.kill(os.getpid(), number)
            if kind == "stopped":
                told.append(record)

        return report

    config = load_train_config(write_config(out=str(stopped), **SHORT))
    for resume, step in ((False, 2), (True, 26)):
        with pytest.raises(SystemExit) as ended:
            train_online(config, resume=resume, report=stop_at(step))
        assert ended.value.code == status
        assert told[-1] == {"step": step, "signal": number.name, "snapshot": step}
        document = json.loads((stopped / "snapshots" / str(step) / PROGRESS).read_text(encoding="utf-8"))
        assert document["regular"] is False  # a run that was not stopped has none to go back to here
        assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not (stopped / "checkpoint").exists()
    resumed = train_online(config, resume=True)
    whole = train_online(load_train_config(write_config(out=str(tmp_path / "whole"), **SHORT)))
    assert resumed.updates == whole.updates == 40
    for part in ("drafter", "lora"):
        mine, theirs = (getattr(read_checkpoint(result.checkpoint), part) for result in (resumed, whole))
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    assert {path.name for path in (stopped / "snapshots").iterdir()} == {"30", "40"}


def test_the_command_line_says_so(write_config, tmp_path, capsys, monkeypatch):
    update = online.OnlineRun._update

    def update_and_signal(self, batch):
        update(self, batch)
        if int(self.state.step) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(online.OnlineRun, "_update", update_and_signal)
    with pytest.raises(SystemExit):
        main(["--config", str(write_config(**SHORT))])
    line = "stopped by SIGTERM after update 6; newest snapshot: update 6; --resume goes on\n"
    assert capsys.readouterr().out.endswith(line)


@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_process_at_once(second):
    command = [sys.executable, "-c", TWICE.format(second=second)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout == f"{int(signal.SIGTERM)}\n"
    assert ended.returncode == -getattr(signal, second)


@pytest.mark.parametrize("place", ["open_checkpoint", "rewrite_checkpoint"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_loading_or_finishing_ends_at_once(write_config, tmp_path, monkeypatch, place, number, status):
    """In one line; what there is to resume then goes on to the same end."""
    out, told = tmp_path / "run", []
    module = online if place == "open_checkpoint" else run
    original = getattr(module, place)

    def stopped(*arguments, **options):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did not stop it")

    def report(kind, record):
        told.append((kind, record))

    config = load_train_config(write_config(**SHORT | {"prompts": 4}))
    monkeypatch.setattr(module, place, stopped)
    with pytest.raises(SystemExit) as ended:
        train_online(config, report=report)
    assert ended.value.code == status
    newest = None if place == "open_checkpoint" else 4
    assert told[-1] == ("stopped", {"step": newest or 0, "signal": number.name, "snapshot": newest})
    line = "before the first snapshot; --resume begins again" if newest is None else "newest snapshot: update 4"
    assert line in notice(*told[-1])
    assert not list(out.glob("checkpoint*"))
    assert not list(out.glob(".*.partial"))
    monkeypatch.setattr(module, place, original)
    assert train_online(config, resume=True).updates == 4


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_to_any_command_is_one_line(number, status):
    # Where the tests run in the background, a shell may have had SIGINT ignored.
    heard = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from dvi_jax.errors import run_cli; raise SystemExit(run_cli({KILLED}))"
    command = [sys.executable, "-c", code.replace("NUMBER", number)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", "stopped\n")
