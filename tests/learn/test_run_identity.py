"""A run is what it was begun as: resumed as another it is refused, and no other run's result passes for its own."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from dvi_jax.checkpoint import MANIFEST, read_checkpoint, read_manifest, rewrite_checkpoint
from dvi_jax.config import DistillConfig, TrainConfig
from dvi_jax.directories import hash_files
from dvi_jax.errors import UserError
from dvi_jax.identity import hash_tree
from dvi_jax.learn.online import train_online
from dvi_jax.learn.run_directory import RunDirectory
from dvi_jax.learn.run_identity import DATA, MAY_CHANGE, RESOLVED, RUN, RunIdentity, identify, read_identity
from dvi_jax.learn.snapshot import CHECKSUMS, PROGRESS
from experiments.tiny import write_tiny_run


def records(out: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in lines if record["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> TrainConfig:
    """The settings of a run of four rollouts that came to its end, with snapshots of updates 4 and 8."""
    config = write_tiny_run(tmp_path_factory.mktemp("finished"), questions=200)
    data = replace(config.data, held_out_fraction=0.1)
    config = replace(config, prompts=8, save_every=2, data=data)
    train_online(config)
    return config


@pytest.fixture
def again(finished, tmp_path) -> TrainConfig:
    """The same run, in a copy of its directory."""
    shutil.copytree(finished.out, tmp_path / "run", symlinks=True)
    return replace(finished, out=str(tmp_path / "run"))


def content(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "LOCK"}


def test_it_is_written_everywhere(finished):
    out = Path(finished.out)
    begun = read_identity(out)
    assert begun is not None
    assert read_manifest(out / "checkpoint").run_digest == begun.digest
    for step in ("4", "8"):
        assert json.loads((out / "snapshots" / step / PROGRESS).read_text(encoding="utf-8"))["run"] == begun.digest
    assert begun.fixed["drafter_options.rank"] == 4
    assert begun.fixed["data.files"] == list(finished.data.files)
    assert begun.free["prompts"] == 8


def other_weights(config: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The same model but for one value of its embedding."""
    checkpoint = read_checkpoint(config.checkpoint)
    base = checkpoint.base | {"embed": np.array(checkpoint.base["embed"])}
    base["embed"][0, 0] += 1
    rewrite_checkpoint(replace(checkpoint, base=base), tmp_path / "other")
    return replace(config, checkpoint=str(tmp_path / "other"))


def moved_data(config: TrainConfig, tmp_path: Path) -> TrainConfig:
    shutil.copy(config.data.files[0], tmp_path / "other.jsonl")
    return replace(config, data=replace(config.data, files=(str(tmp_path / "other.jsonl"),)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, r"model\.weights [0-9a-f]{12}\.\.\., which cannot be resumed with [0-9a-f]{12}\.\.\."),
        (moved_data, r"data\.files \[.*questions\.jsonl\"\], which cannot be resumed with .*other\.jsonl"),
        (lambda config, _: replace(config, seed=1), "seed 0, which cannot be resumed with 1: set it back"),
        (lambda config, _: replace(config, exit_layer=2), "exit_layer 1, which cannot be resumed with 2"),
        (lambda config, _: replace(config, drafter_options={"rank": 2}), r"drafter_options\.\w+ 4(\.0)?, which cannot"),
        (
            lambda config, _: replace(config, data=replace(config.data, held_out_fraction=0.4)),
            r"data\.held_out_fraction 0\.1, which cannot be resumed with 0\.4",
        ),
    ],
)
def test_another_run_is_refused_by_name(again, tmp_path, change, message):
    """The snapshots would fit all of these: nothing else would tell. And nothing is touched."""
    before = content(Path(again.out))
    with pytest.raises(UserError, match=message):
        train_online(change(again, tmp_path), resume=True)
    assert content(Path(again.out)) == before


def test_what_may_change_is_reported_and_recorded(again):
    told = []
    faster = replace(again, prompts=12, optimizer=replace(again.optimizer, head_lr=2e-2))
    train_online(faster, resume=True, report=lambda kind, record: told.append((kind, record)))
    out = Path(again.out)
    changes = {r["setting"]: (r["before"], r["now"]) for kind, r in told if kind == "changed_setting"}
    assert changes == {"prompts": (8, 12), "optimizer.head_lr": (1e-2, 2e-2)}
    assert [record["step"] for record in records(out, "changed_setting")] == [8, 8]
    assert len(records(out, "summary")) == 1
    assert read_identity(out).free["prompts"] == 12
    assert {read_manifest(out / name).training_step for name in ("checkpoint", "checkpoint-12")} == {8, 12}
    assert len({read_manifest(out / name).run_digest for name in ("checkpoint", "checkpoint-12")}) == 1


def test_another_result_of_the_same_update_is_not_taken_for_this_one(again):
    """Update 8 once more, from update 4 on at another rate: the first checkpoint of update 8 stays what it is."""
    out = Path(again.out)
    first = content(out / "checkpoint")
    shutil.rmtree(out / "snapshots" / "8")
    result = train_online(replace(again, optimizer=replace(again.optimizer, head_lr=2e-2)), resume=True)
    assert result.checkpoint == out / "checkpoint-8"
    assert content(out / "checkpoint") == first
    mine, other = (hash_tree(read_checkpoint(path).drafter) for path in (result.checkpoint, out / "checkpoint"))
    assert mine != other


def test_snapshots_of_another_run_are_refused(again, tmp_path):
    """As copied from one directory to another by hand."""
    path = Path(again.out) / "snapshots" / "8" / PROGRESS
    document = json.loads(path.read_text(encoding="utf-8")) | {"run": "0" * 64}
    path.write_text(json.dumps(document), encoding="utf-8")
    checksums = json.loads((path.parent / CHECKSUMS).read_text(encoding="utf-8"))
    (path.parent / CHECKSUMS).write_text(json.dumps(checksums | {PROGRESS: hash_files(path.parent)[PROGRESS]}))
    with pytest.raises(UserError, match="8 is a snapshot of another run"):
        train_online(again, resume=True)


def test_a_directory_of_an_earlier_release_is_believed(again):
    """No run.json, no digest in snapshots or manifest."""
    out = Path(again.out)
    (out / RUN).unlink()
    for step in ("4", "8"):
        folder = out / "snapshots" / step
        document = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        del document["run"]
        (folder / PROGRESS).write_text(json.dumps(document), encoding="utf-8")
        (folder / CHECKSUMS).unlink()
        (folder / CHECKSUMS).write_text(json.dumps(hash_files(folder)), encoding="utf-8")
    manifest = json.loads((out / "checkpoint" / MANIFEST).read_text(encoding="utf-8"))
    for name in ("run_digest", "held_out_fraction", "checksums"):
        del manifest[name]
    (out / "checkpoint" / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert train_online(again, resume=True).checkpoint == out / "checkpoint-8"
    assert read_identity(out).digest == read_manifest(out / "checkpoint-8").run_digest


@pytest.mark.parametrize("text", ["", "[]", '{"fixed": {}}', '{"fixed": [], "free": {}, "digest": ""}', "[" * 99999])
def test_a_damaged_record_is_one_line(again, text):
    (Path(again.out) / RUN).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json is (damaged|not valid JSON)"):
        read_identity(Path(again.out))


def test_held_out_questions_stay_held_out_in_the_next_run(finished, tmp_path):
    """Its checkpoint learned from the questions beyond a tenth."""
    checkpoint = str(Path(finished.out) / "checkpoint")
    data = replace(finished.data, held_out_fraction=0.4)
    nothing = {"drafter_options": {}, "out": str(tmp_path / "next")}
    with pytest.raises(UserError, match=r"data\.held_out_fraction must be at most 0\.1, got 0\.4"):
        train_online(replace(finished, checkpoint=checkpoint, data=data, **nothing))


def leave_results(out: Path, name: str) -> None:
    path = out / name
    match name:
        case "checkpoint":
            path.mkdir()
        case "checkpoint-8":
            path.write_text("", encoding="utf-8")
        case "checkpoint-old":
            path.symlink_to(out / "nowhere")
        case "metrics.jsonl":
            path.write_text('{"kind": "summary", "step": 8}\n', encoding="utf-8")
        case _:
            path.write_bytes(b"")


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-8", "checkpoint-old", "metrics.jsonl", "curve.png"])
def test_a_new_run_is_refused_where_there_are_results(tmp_path, name):
    """Before anything is loaded: an empty directory, a file and a link that leads nowhere, too."""
    leave_results(tmp_path, name)
    with pytest.raises(UserError, match=rf"holds an earlier run \({name}\): pass --resume"):
        train_online(TrainConfig(checkpoint="none", out=str(tmp_path)))


def test_nothing_to_resume_and_a_result_is_refused(finished, again):
    """With the snapshots gone it would begin again, and end at the old result."""
    shutil.rmtree(Path(again.out) / "snapshots")
    with pytest.raises(UserError, match="is the result of a run whose snapshots are gone"):
        train_online(again, resume=True)
    with pytest.raises(UserError, match=r"holds an earlier run \(checkpoint\)"):
        train_online(again)


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-8", "checkpoint-old"])
def test_what_is_in_the_way_is_said_before_hours_of_learning(tmp_path, name):
    leave_results(tmp_path, name)
    (tmp_path / "snapshots" / "4").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{name} is in the way of the run's checkpoint and is none: move it away"):
        train_online(TrainConfig(checkpoint="none", out=str(tmp_path)), resume=True)


def test_every_setting_is_of_one_kind():
    """A name that no trainer has would silently be fixed, or free."""
    names = set()
    for config in (TrainConfig("c", "o"), DistillConfig("c", "o", ("d",))):
        for name, value in asdict(config).items():
            names |= {f"{name}.{part}" for part in value} if isinstance(value, dict) and value else {name}
    assert names >= MAY_CHANGE | (RESOLVED | DATA) - {"data"}
    assert not MAY_CHANGE & (RESOLVED | DATA)


def test_by_hand(tmp_path):
    begun = RunIdentity.of({"seed": 0, "of an older release": 1}, {"prompts": 8, "lr": 0.1})
    now = RunIdentity.of({"seed": 0, "of a newer release": 1}, {"prompts": 8, "lr": 0.2})
    assert begun.digest != now.digest
    resumed, changes = now.resuming(begun, tmp_path)
    assert changes == [{"setting": "lr", "before": 0.1, "now": 0.2}]
    assert (resumed.digest, resumed.free) == (begun.digest, now.free)
    begun.write(tmp_path)
    assert read_identity(tmp_path) == begun
    with pytest.raises(UserError, match=f"{tmp_path} holds a run with seed 0, which cannot be resumed with 1"):
        RunIdentity.of({"seed": 1}, {}).resuming(begun, tmp_path)


def test_temperatures_of_the_drafter_belong_to_it(finished, tmp_path):
    """With a threshold they decide where a rollout stops drafting, and so what is learned from."""
    checkpoint = read_checkpoint(finished.checkpoint)
    calibrated = replace(checkpoint.manifest, calibration=(0.8, 1.1))
    begun, now = (identify(finished, checkpoint, manifest, {}) for manifest in (checkpoint.manifest, calibrated))
    assert begun.digest != now.digest
    with pytest.raises(UserError, match=r"calibration \[\], which cannot be resumed with \[0\.8, 1\.1\]"):
        now.resuming(begun, tmp_path)


def test_others_may_write_beside_a_run(tmp_path):
    """A directory that several share: what another writer has half written is not this run's to remove."""
    mine, theirs = tmp_path / ".checkpoint-8.1a2b.partial", tmp_path / ".model.1a2b.partial"
    for folder in (mine, theirs):
        folder.mkdir()
    with RunDirectory(tmp_path, keep=1, keep_best=0, resume=False, report=lambda kind, record: None):
        assert sorted(path.name for path in tmp_path.glob(".*")) == [theirs.name]
    assert os.listdir(theirs) == []
