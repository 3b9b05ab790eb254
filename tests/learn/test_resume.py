"""A training run killed in the middle and resumed ends where the run that was never killed ends, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.errors import UserError
from dvi_jax.learn import online
from dvi_jax.learn.snapshot import ARRAYS, read_arrays
from dvi_jax.train import main

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120


def records(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock gave."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines]


def kill_after(config: Path, out: Path, rollouts: int) -> None:
    """Train in another process and SIGKILL it once its metrics show `rollouts` rollouts."""
    process = subprocess.Popen([sys.executable, "-m", "dvi_jax.train", "--config", str(config)], cwd=ROOT)
    metrics, patience = out / "metrics.jsonl", time.monotonic() + PATIENCE_SECONDS
    try:
        while not metrics.exists() or metrics.read_text(encoding="utf-8").count('"train"') < rollouts:
            assert process.poll() is None, "training ended before it could be killed"
            assert time.monotonic() < patience
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_a_killed_run_resumes_bit_for_bit(write_config, tmp_path, capsys):
    """Killed while the learning rate still rises; an average of the weights drafts, and is what is left."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    optimizer = {"lora_lr": 1e-2, "head_lr": 1e-2, "warmup": 150, "average": 0.5}
    settings = {"optimizer": optimizer, "objective": {"pg_max": 0.0}, "prompts": 80}
    config = write_config(out=str(killed), **settings)
    kill_after(config, killed, 23)
    assert not (killed / "checkpoint").exists()
    assert main(["--config", str(config), "--resume"]) == 0
    assert "resumed at update" in capsys.readouterr().out
    assert main(["--config", str(write_config(out=str(whole), **settings))]) == 0

    resumed, expected = records(killed), records(whole)
    assert len(expected) == 40 + 3 + 1  # rollouts, evaluations at 0, 20 and 40, the summary
    assert resumed == expected
    assert resumed[-1]["stream"] == expected[-1]["stream"]
    assert resumed[-1]["prompts"] == 80
    snapshots = [read_arrays(out / "snapshots" / "80" / ARRAYS) for out in (killed, whole)]
    jax.tree.map(np.testing.assert_array_equal, *snapshots)  # optimiser, replay, baseline and rng among them
    assert {"key", "baseline", "replay/cursor", "optimizer/notfinite_count"} < snapshots[0].keys()
    mine, theirs = (read_checkpoint(out / "checkpoint") for out in (killed, whole))
    assert mine.manifest == theirs.manifest
    assert mine.manifest.training_step == 80
    for part in ("drafter", "lora", "base"):
        jax.tree.map(np.testing.assert_array_equal, getattr(mine, part), getattr(theirs, part))
    for name, weights in mine.drafter.items():
        np.testing.assert_array_equal(weights, snapshots[0][f"average/drafter/drafter/{name}"])
        assert np.any(weights != snapshots[0][f"trainable/drafter/drafter/{name}"])


def test_a_run_killed_between_two_updates_resumes_bit_for_bit(write_config, tmp_path, monkeypatch):
    """An update every third rollout: the rollouts before the kill that no update followed are made again."""
    settings = {"update_every": 3, "fresh_windows": 1, "prompts": 60, "eval_every": 10}
    roll_out = online.OnlineRun._roll_out

    class Killed(Exception):  # noqa: N818
        pass

    def killed_in_rollout_20(self, model, batch):
        if self.progress.prompts == 2 * 19:
            raise Killed
        return roll_out(self, model, batch)

    killed = write_config(out=str(tmp_path / "killed"), **settings)
    monkeypatch.setattr(online.OnlineRun, "_roll_out", killed_in_rollout_20)
    with pytest.raises(Killed):
        main(["--config", str(killed)])
    monkeypatch.undo()
    assert records(tmp_path / "killed")[-1]["prompts"] == 36
    main(["--config", str(killed), "--resume"])
    main(["--config", str(write_config(out=str(tmp_path / "whole"), **settings))])
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert len([record for record in records(tmp_path / "whole") if record["kind"] == "train"]) == 30
    snapshots = [read_arrays(tmp_path / run / "snapshots" / "20" / ARRAYS) for run in ("killed", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *snapshots)


def test_a_damaged_snapshot_is_told_of_and_the_one_before_used(write_config, tmp_path, capsys):
    """The run goes on from the snapshot before and ends where it would have ended."""
    short = {"prompts": 40, "eval_every": 100}
    whole, out = tmp_path / "whole", tmp_path / "run"
    main(["--config", str(write_config(out=str(whole), **short))])
    main(["--config", str(write_config(**short | {"prompts": 30}))])
    os.truncate(out / "snapshots" / "30" / ARRAYS, 1000)
    capsys.readouterr()
    main(["--config", str(write_config(**short)), "--resume"])
    line = (
        f"{out}/snapshots/30/{ARRAYS} is damaged: it differs from its checksum; going on from the snapshot of update 20"
    )
    assert f"{line}\nprompts is now 40, it was 30\nresumed at update 20\n" in capsys.readouterr().out
    told = [record for record in records(out) if record["kind"] == "damaged_snapshot"]
    assert [record["step"] for record in told] == [20]
    told += [record for record in records(out) if record["kind"] == "changed_setting"]
    assert [record for record in records(out) if record not in told] == records(whole)
    assert (out / "snapshots" / "30.damaged").is_dir()
    drafters = [read_checkpoint(path).drafter for path in (out / "checkpoint-40", whole / "checkpoint")]
    jax.tree.map(np.testing.assert_array_equal, *drafters)


def test_a_run_killed_before_its_first_snapshot_starts_again(write_config, tmp_path, monkeypatch):
    """What it had written to its metrics is dropped."""
    out, roll_out = tmp_path / "killed", online.OnlineRun._roll_out

    def copied_in_rollout_2(self, model, batch):
        """A kill leaves what there is of the directory now."""
        if self.progress.prompts == 2 * 2:
            shutil.copytree(tmp_path / "run", out)
        return roll_out(self, model, batch)

    short = {"prompts": 8, "save_every": 1000, "eval_every": 1000}
    with monkeypatch.context() as patch:
        patch.setattr(online.OnlineRun, "_roll_out", copied_in_rollout_2)
        main(["--config", str(write_config(**short))])
    assert [record["step"] for record in records(out)] == [0, 2, 4]
    main(["--config", str(write_config(out=str(out), **short)), "--resume"])
    assert [record["step"] for record in records(out)] == [0, 2, 4, 6, 8, 8, 8]


def test_a_run_that_could_not_start_leaves_nothing_to_resume(write_config, tmp_path):
    """Neither does one killed before its first snapshot: the next one starts afresh, with metrics of its own."""
    short = {"prompts": 4, "save_every": 1000, "eval_every": 1000}
    with pytest.raises(UserError, match="exit_layer must be between 1 and 1"):
        main(["--config", str(write_config(**short | {"exit_layer": 4}))])
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 2}\n', encoding="utf-8")
    assert main(["--config", str(write_config(**short))]) == 0
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 2, 4, 4, 4]


def test_a_finished_run_is_not_overwritten(write_config, tmp_path):
    """Resumed with more prompts, it writes a second checkpoint beside the first; with as many, it is done."""
    out = tmp_path / "run"
    short = {"prompts": 4, "save_every": 50, "eval_every": 50}
    main(["--config", str(write_config(**short))])
    first = read_checkpoint(out / "checkpoint")
    for _ in range(2):
        main(["--config", str(write_config(**short | {"prompts": 8})), "--resume"])
    assert {path.name for path in out.glob("checkpoint*")} == {"checkpoint", "checkpoint-8"}
    assert first.manifest.training_step == 4
    assert read_checkpoint(out / "checkpoint-8").manifest.training_step == 8
    for part in ("drafter", "lora"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(first, part), getattr(read_checkpoint(out / "checkpoint"), part)
        )
