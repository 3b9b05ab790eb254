"""TensorBoard's own reader finds in a run's events what its metrics.jsonl holds, also after a kill."""

from __future__ import annotations

import json
import resource
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dvi_jax.errors import UserError
from dvi_jax.learn import online
from dvi_jax.learn.run_directory import RunDirectory
from dvi_jax.learn.run_identity import RunIdentity
from dvi_jax.learn.tensorboard import Events
from dvi_jax.train import main


def curves(folder):
    """Name -> [(step, value)], as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def write(folder, begin, records):
    events = Events(folder)
    events.begin(begin)
    for record in records:
        events.append(record)
    events.close()
    assert events.refusal is None


def test_the_finite_numbers_of_a_record_are_its_curves(tmp_path):
    lists = {"agreement": [0.5, float("nan"), 0.25], "acceptance": {"rounds": 9}, "name": "x", "flag": True}
    write(tmp_path, 0, [{"kind": "eval", "step": 2} | lists, {"kind": "train", "step": 3, "kl": 1.5, "pg": None}])
    assert curves(tmp_path) == {
        "eval/agreement/1": [(2, 0.5)],
        "eval/agreement/3": [(2, 0.25)],
        "train/kl": [(3, 1.5)],
    }


def test_what_is_done_again_takes_the_place_of_what_was_lost(tmp_path):
    """As after a kill: the run goes on at update 3, within the same second even."""
    write(tmp_path, 0, [{"kind": "train", "step": step, "kl": float(step)} for step in range(5)])
    write(tmp_path, 3, [{"kind": "train", "step": step, "kl": 10.0 * step} for step in (3, 4)])
    assert curves(tmp_path)["train/kl"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def test_a_killed_run_and_its_resumption_have_the_curves_of_the_metrics(write_config, tmp_path, monkeypatch):
    roll_out = online.OnlineRun._roll_out

    class Killed(Exception):  # noqa: N818
        pass

    def killed_in_rollout_13(self, model, batch):
        if self.progress.prompts == 2 * 12:
            raise Killed
        return roll_out(self, model, batch)

    config = write_config(prompts=40, eval_every=10, save_every=5)
    monkeypatch.setattr(online.OnlineRun, "_roll_out", killed_in_rollout_13)
    with pytest.raises(Killed):
        main(["--config", str(config), "--tensorboard"])
    monkeypatch.undo()
    assert main(["--config", str(config), "--resume", "--set", "tensorboard=true"]) == 0

    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    expected = {}
    for record in map(json.loads, lines):
        for name, value in record.items():
            if record["kind"] in ("train", "eval") and name != "step" and isinstance(value, float | int):
                expected.setdefault(f"{record['kind']}/{name}", []).append((record["step"], pytest.approx(value)))
    assert {"train/kl", "train/accept_rate", "eval/tokens_per_round"} < expected.keys()
    assert curves(tmp_path / "run") == expected


def test_a_disk_that_takes_no_events_ends_nothing(tmp_path):
    """It is told once, and the metrics go on."""
    told = []
    directory = RunDirectory(
        tmp_path, keep=1, keep_best=0, resume=False, report=lambda kind, record: told.append(kind), tensorboard=True
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with directory:
        directory.identify(RunIdentity.of({}, {}))
        directory.restore({})
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the metrics stay below it
        try:
            for step in range(120):
                directory.log("train", step, {"a": float(step), "b": 1.0, "c": 2.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert told.count("train") == 120
        assert told.count("no_events") == 1
        assert len(directory.metrics.records("train")) == 120
        (refusal,) = directory.metrics.records("no_events")
        assert refusal["reason"] == "File too large"
    kept = curves(tmp_path)["train/a"]
    assert kept == [(step, float(step)) for step in range(len(kept))]
    assert 5 < len(kept) < 120


def test_without_the_library_it_is_one_line_and_leaves_nothing(write_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"tensorboard needs tensorboardX: pip install 'dvi-jax\[tensorboard\]'"):
        main(["--config", str(write_config()), "--tensorboard"])
    assert not (tmp_path / "run").exists()
