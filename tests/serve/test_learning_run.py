"""A learning server's directory: what a kill leaves, what a restart goes on with, the drafter at the end."""

import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.errors import UserError, run_cli
from dvi_jax.learn.metrics import read_records
from dvi_jax.learn.snapshot import read_arrays
from dvi_jax.loading import enable_compilation_cache, from_checkpoint, load
from dvi_jax.serve.__main__ import main
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.learn_settings import LearnSettings
from dvi_jax.serve.learning_metrics import LearningCollector
from dvi_jax.serve.learning_run import LearningRun
from dvi_jax.serve.requests import Request
from tests.serve.server.live import until

ROOT = Path(__file__).parents[2]
SETTINGS = LearnSettings(
    window=64, fresh_windows=2, replayed_windows=2, positions=64, replay_capacity=8, save_seconds=0.0
)
SHAPE = {"slots": 2, "context": 96, "chunk": 16, "plan": "chain:2", "prefix_bytes": 0}
SECRET = (200, 201, 202, 203) * 8  # a prompt that must not be found in any file


def open_run(checkpoint: Path, out: Path, **options) -> LearningRun:
    read = read_checkpoint(checkpoint)
    return LearningRun(read, from_checkpoint(read), SETTINGS, out, context=96, **options)


def serve_until(run: LearningRun, condition) -> None:
    """Replies, one after the other, until it holds."""
    with Engine(run.model, **SHAPE, learner=run.learner, warm_up=True) as engine:
        while not condition():
            list(engine.submit(Request(SECRET, 60, eos_ids=())))


def learn_and_die(checkpoint: str, out: str) -> None:
    """What the killed process does: it learns and saves for ever."""
    enable_compilation_cache()
    with open_run(Path(checkpoint), Path(out)) as run:
        serve_until(run, lambda: False)


def weights(tree) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def test_a_killed_server_comes_back_with_what_it_learned(byte_checkpoint, tmp_path):
    out = tmp_path / "run"
    code = "import sys; from tests.serve.test_learning_run import learn_and_die; learn_and_die(*sys.argv[1:])"
    with subprocess.Popen([sys.executable, "-c", code, byte_checkpoint, out], cwd=ROOT) as process:
        until(lambda: list((out / "snapshots").glob("[0-9]*/CHECKSUMS.json")) or process.poll() is not None, 300)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="pass --resume"), open_run(byte_checkpoint, out):
        pass
    newest = max((path for path in (out / "snapshots").glob("[0-9]*")), key=lambda path: int(path.name))
    saved = {
        name.removeprefix("trainable/"): array
        for name, array in read_arrays(newest / "arrays.npz").items()
        if name.startswith("trainable/")
    }
    params = from_checkpoint(read_checkpoint(byte_checkpoint)).params
    with open_run(byte_checkpoint, out, resume=True) as run:
        live = weights({"drafter": run.model.params.drafter, "lora_s": run.model.params.lora_s})
        assert live.keys() == saved.keys()
        assert all(np.array_equal(live[name], saved[name]) for name in saved)
        begun = weights({"drafter": params.drafter, "lora_s": params.lora_s})
        # Not all: of an adapter's two factors the one behind zeros stands still in the first update.
        assert any(not np.array_equal(saved[name], begun[name]) for name in saved)
        assert run.learner.status.updates == int(newest.name) > 0
        digest = run.learner.status.digest
        metrics = {sample.name: sample for family in collected(run) for sample in family.samples}
        assert metrics["dvi_live_drafter_info"].labels == {"model_name": "tiny", "digest": digest}
        assert metrics["dvi_learning_updates_total"].value == int(newest.name)
        serve_until(run, lambda: run.learner.status.updates >= int(newest.name) + 2)
        assert run.section()["learned_positions"] == run.learner.status.learned_positions > 0
    # The end leaves a drafter for other servers, and another start goes on from there.
    assert run.drafter == out / "checkpoint"
    taken = load(byte_checkpoint, drafter_from=out).params.drafter
    learned = run.model.params.drafter
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype(leaf.dtype), learned)
    assert all(map(np.array_equal, jax.tree.leaves(taken), jax.tree.leaves(half)))
    with open_run(byte_checkpoint, out, resume=True) as again:
        assert all(map(np.array_equal, jax.tree.leaves(again.model.params.drafter), jax.tree.leaves(learned)))
    kinds = {record["kind"] for record in read_records(out / "metrics.jsonl")}
    assert {"update", "summary"} <= kinds
    text, ids = bytes(token - 2 for token in SECRET[:4]), np.array(SECRET[:4], np.int32).tobytes()
    for path in out.rglob("*"):
        assert not path.is_file() or not any(part in path.read_bytes() for part in (text, ids))


def test_an_averaged_drafter_comes_back(byte_checkpoint, tmp_path):
    """A trained drafter drafts by an average of its weights: after a restart by the same, not by the newest."""
    read = read_checkpoint(byte_checkpoint)
    model = replace(from_checkpoint(read), drafter_is_trained=True)

    def opened(**options) -> LearningRun:
        return LearningRun(read, model, SETTINGS, tmp_path / "run", context=96, **options)

    with opened() as run:
        serve_until(run, lambda: run.learner.status.swaps)
    state, progress = run.learner.finish()
    served = weights(state.served)
    assert any(not np.array_equal(array, weights(state.trainable)[name]) for name, array in served.items())
    with opened(resume=True) as again:
        live = {"drafter": again.model.params.drafter, "lora_s": again.model.params.lora_s}
        assert all(np.array_equal(array, served[name]) for name, array in weights(live).items())
        assert again.learner.status.digest == progress["digest"]
        assert all(np.array_equal(array, served[name]) for name, array in weights(again.learner._live.served).items())
        serve_until(again, lambda: again.learner.status.swaps > progress["swaps"])  # and it goes on learning


def test_a_run_of_a_release_that_knew_adam_alone_goes_on_so(byte_checkpoint, tmp_path):
    """Its snapshots have other moments than a new run's."""
    read, out = read_checkpoint(byte_checkpoint), tmp_path / "run"
    model = replace(from_checkpoint(read), drafter_is_trained=False)

    def opened(settings: LearnSettings, **options) -> LearningRun:
        return LearningRun(read, model, settings, out, context=96, **options)

    with opened(replace(SETTINGS, matrices="adamw")) as run:
        serve_until(run, lambda: run.learner.status.updates >= 2)
    state, _ = run.learner.finish()
    recorded = json.loads((out / "run.json").read_text())
    for name in ("matrices", "optimizer.matrices"):
        del recorded["fixed"][name]
    (out / "run.json").write_text(json.dumps(recorded))
    for _ in range(2):
        with opened(SETTINGS, resume=True) as again:
            assert again.learner.status.updates == run.learner.status.updates
        found = again.learner.finish()[0].optimizer
        assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(state.optimizer)))


def collected(run: LearningRun):
    return list(LearningCollector("tiny", lambda: run.learner.status).collect())


def test_another_model_cannot_resume(byte_checkpoint, tmp_path):
    """Nor can two servers share a directory."""
    out = tmp_path / "run"
    with open_run(byte_checkpoint, out) as run:
        with pytest.raises(UserError, match="is in use by"), open_run(byte_checkpoint, out):
            pass
        run._directory.save(run.learner.template, run.learner.finish()[1])
    assert run.drafter is None  # nothing was learned
    other = read_checkpoint(byte_checkpoint)
    other = replace(other, manifest=replace(other.manifest, base_sha256="f" * 64))
    with pytest.raises(UserError, match=r"holds a run with model\.weights"):
        LearningRun(other, from_checkpoint(other), SETTINGS, out, context=96, resume=True).__enter__()
    read = read_checkpoint(byte_checkpoint)
    with LearningRun(read, from_checkpoint(read, kv="int8"), SETTINGS, out, context=96, resume=True):
        pass  # what it learned from rows kept otherwise is still of use, and it is recorded
    (changed,) = (record for record in read_records(out / "metrics.jsonl") if record["kind"] == "changed_setting")
    assert (changed["setting"], changed["before"], changed["now"]) == ("kv", "dtype", "int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learn"], "--learn needs --out DIR"),
        (["--learn", "--out", "runs/x", "--mesh", "data=2"], "--learn takes one device"),
        (["--out", "runs/x"], "--out is of a server that learns: add --learn"),
        (["--resume"], "--resume is of a server that learns"),
        (["--learn", "--out", "runs/x", "--learn-share", "1.5"], "--learn-share must be above 0 and below 1, got 1.5"),
    ],
)
def test_bad_options_are_one_line(byte_checkpoint, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["command", "--checkpoint", str(byte_checkpoint), "--port", "0", *options])
    assert run_cli(main) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1


def test_a_full_disk_stops_neither_serving_nor_learning(byte_checkpoint, tmp_path):
    """The operating system refuses all files beyond some bytes; when it no longer does, all is written."""
    told = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def is_told() -> bool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # the engine is there, and its programs are compiled
        return "failed_save" in told

    with open_run(byte_checkpoint, tmp_path / "run", report=lambda kind, record: told.append(kind)) as run:
        try:
            serve_until(run, is_told)
            until(lambda: not run._directory.snapshots.is_saving)  # what was begun is refused, too
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (run.learner.status.state, run.learner.status.updates > 0) == ("learning", True)
        assert not list((tmp_path / "run" / "snapshots").glob("[0-9]*"))
    # There is room again, though the last record was refused: the last snapshot is written, with what waited.
    (last,) = (tmp_path / "run" / "snapshots").glob("[0-9]*")
    assert (last / "CHECKSUMS.json").exists()
    kinds = {record["kind"] for record in read_records(tmp_path / "run" / "metrics.jsonl")}
    assert {"update", "failed_save", "summary"} <= kinds
    assert run.drafter == tmp_path / "run" / "checkpoint"
