"""Injected faults: non-finite updates and a collapse are rolled back, changed traffic is not, nothing loops."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.config import RollbackConfig, load_train_config
from dvi_jax.errors import UserError
from dvi_jax.learn import online
from dvi_jax.learn.fast_update import LearnerState
from dvi_jax.learn.online import train_online
from dvi_jax.learn.optimizer import guarded
from dvi_jax.learn.replay import Replay
from dvi_jax.learn.rollback import QUICK, Watch, go_on_from
from dvi_jax.learn.run import Run
from dvi_jax.learn.snapshot import ARRAYS, read_arrays
from dvi_jax.model.features import Features

SHORT = {"prompts": 80, "save_every": 5}  # 40 rollouts of two updates, snapshots at 10, 20, ... 80


def records(out, kind):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in lines if record["kind"] == kind]


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): the rollouts of these updates give the learner verifier states that are not numbers."""

    def inject(steps):
        roll_out = online.OnlineRun._roll_out

        def poisoned(self, model, batch):
            windows, generations = roll_out(self, model, batch)
            if int(self.state.step) in steps:
                windows = windows.replace(features=Features(jnp.full_like(windows.features.final, jnp.nan)))
            return windows, generations

        monkeypatch.setattr(online.OnlineRun, "_roll_out", poisoned)

    return inject


@pytest.fixture
def rolled_back(monkeypatch):
    """The trainable arrays right after each rollback, named as in a snapshot."""
    seen = []
    roll_back = online.OnlineRun.roll_back

    def watched(self, *arguments):
        roll_back(self, *arguments)
        assert_equal(self.model.params.drafter, self.state.trainable["drafter"])  # it decodes with the snapshot's
        leaves, _ = jax.tree.flatten_with_path(self.state.trainable)
        name = jax.tree_util.keystr
        seen.append({f"trainable/{name(path, simple=True, separator='/')}": np.asarray(leaf) for path, leaf in leaves})

    monkeypatch.setattr(online.OnlineRun, "roll_back", watched)
    return seen


def test_non_finite_updates_go_back_to_the_last_snapshot(write_config, tmp_path, poison, rolled_back):
    """Two poisoned rollouts: four updates skipped, and windows in the replay that would poison every later one."""
    poison({24, 26})
    config = load_train_config(write_config(**SHORT, keep_checkpoints=10))
    result = train_online(config)
    out = tmp_path / "run"
    (rollback,) = records(out, "rollback")
    assert rollback == {
        "kind": "rollback",
        "step": 28,
        "reason": "4 non-finite updates in a row",
        "snapshot": 20,
        "rollbacks": 1,
    }
    kept = read_arrays(out / "snapshots" / "20" / ARRAYS)
    assert rolled_back[0]
    assert_equal(rolled_back[0], {name: kept[name] for name in rolled_back[0]})
    # Nothing is skipped any more: the replay went back, too. The stream and the count of updates went on.
    assert {record["skipped_updates"] for record in records(out, "train") if record["step"] > 28} == {4}
    assert (result.updates, result.progress.prompts) == (80, 80)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(read_checkpoint(result.checkpoint).drafter))


@pytest.mark.parametrize("killed_at", [26, 34])
def test_a_run_killed_around_a_rollback_resumes_bit_for_bit(write_config, tmp_path, poison, killed_at):
    """Before it, the rollback is repeated to the same snapshot; after it, it is part of what is resumed."""

    class Killed(Exception):  # noqa: N818
        pass

    def report(kind, record):
        if kind == "train" and record["step"] == killed_at:
            raise Killed

    poison({24, 26})
    killed = load_train_config(write_config(out=str(tmp_path / "killed"), **SHORT))
    with pytest.raises(Killed):
        train_online(killed, report=report)
    resumed = train_online(killed, resume=True)
    whole = train_online(load_train_config(write_config(out=str(tmp_path / "whole"), **SHORT)))
    assert records(tmp_path / "killed", "rollback") == records(tmp_path / "whole", "rollback")
    assert len(records(tmp_path / "whole", "rollback")) == 1
    mine, theirs = (read_checkpoint(result.checkpoint) for result in (resumed, whole))
    assert_equal((mine.drafter, mine.lora), (theirs.drafter, theirs.lora))


def test_before_the_first_snapshot_it_starts_again(write_config, tmp_path, poison, rolled_back):
    poison({2, 4})
    config = load_train_config(write_config(**SHORT | {"prompts": 20}))
    initial = online.kept_or_new_drafter(
        read_checkpoint(config.checkpoint), config.drafter, config.drafter_options, config.exit_layer
    )
    train_online(config)
    (rollback,) = records(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["snapshot"]) == (6, None)
    params = online.from_checkpoint(initial, seed=config.seed).params
    fresh = jax.tree.leaves({"drafter": params.drafter, "lora_s": params.lora_s})
    assert_equal(list(rolled_back[0].values()), [np.asarray(leaf) for leaf in fresh])


def test_what_no_rollback_heals_ends_the_run(write_config, tmp_path, poison):
    """Each goes further back than the one before; the snapshots stay, and it does not loop."""
    poison(range(44, 10000))
    config = load_train_config(write_config(**SHORT, rollback={"at_most": 3}))
    with pytest.raises(
        UserError, match=r"learning does not hold: after 3 rollbacks in quick succession update 60 asks"
    ):
        train_online(config)
    out = tmp_path / "run"
    assert [r["snapshot"] for r in records(out, "rollback")] == [40, 30, None]  # the newest two are kept
    assert {path.name for path in (out / "snapshots").iterdir()} == {"40", "52"}  # 52 holds what 30 held


def test_a_collapsed_drafter_goes_back_to_the_best(write_config, tmp_path, monkeypatch, rolled_back):
    """From update 60 on every update ruins the drafter, until it is rolled back."""
    update = online.fast_update

    def ruin(definition, params, state, *rest, **options):
        new, values = update(definition, params, state, *rest, **options)
        if int(new.step) >= 60 and not rolled_back:
            new = new.replace(trainable=jax.tree.map(lambda x: -jnp.ones_like(x), new.trainable))
        return new, values

    monkeypatch.setattr(online, "fast_update", ruin)
    train_online(load_train_config(write_config(keep_checkpoints=1)))
    out = tmp_path / "run"
    (rollback,) = records(out, "rollback")
    evaluations = {r["step"]: r["accept_rate"] for r in records(out, "eval") if 0 < r["step"] < rollback["step"]}
    best = max(evaluations, key=lambda step: (evaluations[step], step))
    assert rollback["reason"] == "the drafter has collapsed"
    assert 60 < rollback["step"] < 100
    assert (rollback["snapshot"], best) == (40, 40)
    assert rollback["accept_rate"] < 0.5 * rollback["good_accept_rate"]
    after = [record["accept_rate"] for record in records(out, "train") if record["step"] > rollback["step"]]
    assert np.mean(after) > 0.5


def test_changed_traffic_is_no_collapse(write_config, tmp_path, monkeypatch):
    """Prompts on which any drafter is rejected: the best snapshot's is no better, so the run goes on untouched."""
    config = load_train_config(write_config())
    whole = train_online(replace(config, out=str(tmp_path / "whole")))
    roll_out = online.OnlineRun._roll_out

    def rejecting(self, model, batch):
        windows, generations = roll_out(self, model, batch)
        if int(self.state.step) >= 60:
            generations = [replace(each, accept_lengths=[1] * each.rounds) for each in generations]
        return windows, generations

    monkeypatch.setattr(online.OnlineRun, "_roll_out", rejecting)
    shifted = train_online(config)
    changed = records(tmp_path / "run", "traffic_changed")
    assert changed
    assert all(record["good_accept_rate"] == 0 for record in changed)
    assert records(tmp_path / "run", "rollback") == []
    mine, theirs = (read_checkpoint(result.checkpoint) for result in (shifted, whole))
    assert_equal((mine.drafter, mine.lora), (theirs.drafter, theirs.lora))


def learner(bad=0, step=0, key=0):
    """A learner that has skipped `bad` updates in a row, at update `step`."""
    state = guarded(optax.identity(), 1.0).init({})
    state = state._replace(notfinite_count=jnp.int32(bad), total_notfinite=jnp.int32(bad))
    return LearnerState({}, state, Replay.empty(1, 2, 2), jnp.float32(0), jnp.int32(step), jax.random.key(key))


@pytest.mark.parametrize(("after", "back"), [(0, []), (1, [1, 2, 3, 5]), (3, [3, 5]), (5, [5])])
def test_it_goes_back_at_exactly_as_many_as_allowed(after, back):
    gone = []
    for bad in (0, 1, 2, 3, 5):
        run = SimpleNamespace(state=learner(bad), rollback=RollbackConfig(after=after), last_good=lambda: (None, None))
        run.roll_back = lambda good, step, values, bad=bad: gone.append(bad)
        assert Run.has_non_finite_updates(run) == (bad in back)
    assert gone == back


def test_what_goes_on_after_a_rollback():
    """Updates and their faults are counted on, and no window is drawn twice by the same key."""
    good, now = learner(step=20, key=1), learner(bad=4, step=28, key=2)
    state = go_on_from(good, now)
    assert int(state.step) == 28
    assert (int(state.optimizer.total_notfinite), int(state.optimizer.notfinite_count)) == (4, 0)
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(now.key))


def test_watch_by_hand():
    watch, config = Watch(), RollbackConfig(settle=3, collapse=0.5, at_most=2)
    assert [watch.observe(rate, config) for rate in (0.9, 0.1, 0.8)] == [False, False, False]
    assert watch.accept_rate == pytest.approx(0.9 * (0.9 * 0.9 + 0.1 * 0.1) + 0.1 * 0.8)
    assert watch.best == watch.accept_rate  # the rollouts before `settle` set no record
    suspected = [watch.observe(0.0, config) for _ in range(8)]
    assert suspected == [False] * 6 + [True] * 2  # 0.9**7 is the first power under a half
    watch.acquit(0.4)
    assert watch.best == pytest.approx(0.4)


def test_where_a_rollback_may_go():
    watch, config = Watch(), RollbackConfig(at_most=2)
    assert watch.is_good(0)
    watch.roll_back(at=50, to=30, config=config)
    assert [step for step in (20, 30, 40, 50, 60) if watch.is_good(step)] == [20, 60]
    watch.checks = QUICK  # 30 has held for long
    assert [step for step in (20, 30, 40, 50, 60) if watch.is_good(step)] == [20, 30, 60]
    watch.roll_back(at=400, to=30, config=config)
    watch.roll_back(at=410, to=20, config=config)
    with pytest.raises(UserError, match="learning does not hold"):
        watch.roll_back(at=420, to=None, config=config)
    assert watch.rollbacks == 3
