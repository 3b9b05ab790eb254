"""A whole online run from the command line: what it reads, what it leaves, what it never learns from."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import matplotlib.image
import numpy as np
import pytest

from dvi_jax import train
from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.config import DataConfig, load_train_config
from dvi_jax.data import ConversationStream, PromptStream
from dvi_jax.decode.acceptance import Acceptance
from dvi_jax.errors import UserError
from dvi_jax.evaluate.curve import plot_learning_curve
from dvi_jax.learn import online, snapshot
from dvi_jax.loading import load
from dvi_jax.train import main


def read_records(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_file_cut_off_in_the_middle_trains_through(write_config, conversations, tmp_path, capsys):
    """As ShareGPT on the package index is: one JSON array that ends inside a string. All whole conversations count."""
    turns = [json.loads(line) for line in conversations.read_text(encoding="utf-8").splitlines()[:30]]
    whole = json.dumps(turns)
    (tmp_path / "cut.json").write_text(whole[:-10], encoding="utf-8")  # the last of the 30 is not whole
    config = write_config(eval_every=1000, save_every=1000)
    assert main(["--config", str(config), "--set", f"data.files=[{tmp_path / 'cut.json'}]"]) == 0
    assert "read: 29 conversations read, 1 skipped (cut off: 1); the data end early\n" in capsys.readouterr().out
    summary = read_records(tmp_path / "run")[-1]
    assert summary["kind"] == "summary"
    assert summary["stream"]["conversations"].endswith("the data end early")
    assert summary["prompts"] // 2 == (29 - summary["stream"]["counts"]["held out"]) // 2


@dataclass(frozen=True)
class Watched:
    """A run of 40 prompts, and every prompt of its rollouts that precede an update."""

    out: Path
    learned: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def watched(write_configs, tmp_path_factory) -> Watched:
    folder, learned = tmp_path_factory.mktemp("watched"), []
    original = online.OnlineRun._update

    def update(self, batches):
        learned.extend(prompt.ids for batch in batches for prompt in batch)
        return original(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online.OnlineRun, "_update", update)
        patch.setattr(train, "plot_learning_curve", plot_learning_curve)
        main(["--config", str(write_configs(folder, prompts=40, eval_every=10))])
    return Watched(folder / "run", learned)


def test_held_out_prompts_are_never_decoded_for_learning(watched, byte_checkpoint, conversations):
    """Against the prompts kept apart."""
    stream = PromptStream(
        ConversationStream(conversations),
        load(byte_checkpoint).tokenizer,
        DataConfig(max_prompt_tokens=48, held_out_fraction=0.1),
    )
    kept_apart = {prompt.ids for prompt in stream.held_out_prompts(1000)}
    assert len(watched.learned) == 40
    assert len(kept_apart) > 10
    assert not kept_apart & set(watched.learned)


def test_what_a_run_leaves(watched):
    out = watched.out
    assert {path.name for path in out.iterdir()} == {
        *("LOCK", "run.json", "metrics.jsonl", "snapshots", "checkpoint", "curve.png", "curve-dark.png")
    }
    brightness = [matplotlib.image.imread(out / name)[0, 0, 0] for name in ("curve.png", "curve-dark.png")]
    assert brightness == pytest.approx([1.0, 0.05], abs=0.01)  # of the background
    records = read_records(out)
    assert [record["step"] for record in records if record["kind"] == "eval"] == [0, 20, 40]
    train = [record for record in records if record["kind"] == "train"]
    assert [record["prompts"] for record in train] == list(range(2, 41, 2))
    assert {path.name for path in (out / "snapshots").iterdir()} == {"30", "40"}  # the newest two, and the best
    manifest = load(out / "checkpoint").manifest
    assert (manifest.training_step, manifest.draft_steps) == (40, 2)  # and how it drafted while it learned
    waited = [record["save_seconds"] for record in train]
    assert [index for index, seconds in enumerate(waited) if seconds] == [5, 10, 15]  # after rollouts 5, 10, 15
    assert records[-1]["save_seconds"] == sum(waited)


def test_updates_every_third_rollout(write_config, tmp_path, monkeypatch):
    """The newest rollout is fresh and on-policy, the two before it lie in the replay; what falls due waits for them."""
    rolled, updates = [], []
    roll_out, update = online.rollout, online.fast_update

    def watched_rollout(*arguments, **options):
        windows, generations = roll_out(*arguments, **options)
        rolled.append(np.asarray(windows.tokens))
        return windows, generations

    def watched_update(definition, params, state, fresh, is_current, **options):
        replay = np.asarray(state.replay.windows.tokens)[: int(state.replay.size)]
        new, values = update(definition, params, state, fresh, is_current, **options)
        updates.append((bool(is_current), replay, np.asarray(fresh.tokens), float(values["loss"])))
        return new, values

    monkeypatch.setattr(online, "rollout", watched_rollout)
    monkeypatch.setattr(online, "fast_update", watched_update)
    settings = {"update_every": 3, "prompts": 29, "eval_every": 4, "save_every": 5}
    main(["--config", str(write_config(**settings))])
    records = read_records(tmp_path / "run")
    train = [record for record in records if record["kind"] == "train"]
    assert [record["prompts"] for record in train] == list(range(2, 25, 2))  # 13 and 14 are left out
    assert [record["step"] for record in train] == [2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8, 8]
    assert ["kl" in record for record in train] == [False, False, True] * 4
    # Rollouts 4, 8 and 12 are followed by updates 4, 6 and 8; rollouts 5 and 10 by updates 4 and 8.
    assert [record["step"] for record in records if record["kind"] == "eval"] == [0, 4, 6, 8]
    assert {path.name for path in (tmp_path / "run" / "snapshots").iterdir()} == {"4", "8"}
    assert [is_current for is_current, *_ in updates] == [True, False] * 4
    # What is recorded is of the on-policy update.
    assert [record["loss"] for record in train if "loss" in record] == [
        loss for current, *_, loss in updates if current
    ]
    first, second, third = rolled[2:5]  # after the two of the evaluation
    np.testing.assert_array_equal(updates[0][1], np.concatenate([first, second]))
    np.testing.assert_array_equal(updates[0][2], third)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("update_every=0", "update_every must be at least 1, got 0"),
        ("fresh_windows=3", r"fresh_windows must be 0 \(all\) or above, at most rollout_batch=2, got 3"),
        ("fresh_windows=1 positions_per_update=56", "positions_per_update must be at most 55: fresh windows"),
        ("optimizer.warmup=-1", r"optimizer.warmup must be 0 \(none\) or above, of 32 bits, got -1"),
        ("optimizer.average=1.0", r"optimizer.average must be in \[0, 1\), got 1.0"),
        ("optimizer.average=0.9", "objective.pg_max must be 0, as optimizer.average is set, got 1.0"),
        ("optimizer.b2=1.0", r"optimizer.b2 must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_cannot_be(write_config, setting, message):
    with pytest.raises(UserError, match=message):
        load_train_config(write_config(), setting.split())


def test_the_best_snapshot_outlives_newer_ones(write_config, tmp_path, monkeypatch):
    """The evaluation at update 40 comes out best: that snapshot stays beside the newest two."""

    def measure(self):
        accepted = 9 if self.step == 40 else 5
        acceptance = Acceptance(rounds=10, drafted=10, judged=10, accepted=accepted, per_position=())
        values = {"accept_rate": acceptance.accept_rate, "tokens_per_round": acceptance.tokens_per_round}
        return acceptance, values | {"acceptance": asdict(acceptance)}

    monkeypatch.setattr(online.OnlineRun, "measure", measure)
    main(["--config", str(write_config(prompts=80, eval_every=10))])
    assert {path.name for path in (tmp_path / "run" / "snapshots").iterdir()} == {"40", "70", "80"}


def test_rows_that_fill_up_a_batch_are_not_evaluated():
    """Three held-out prompts, two decoded at once."""
    decoded = []

    def roll_out(model, batch):
        decoded.append(batch)
        return None, [SimpleNamespace(accept_lengths=[2] * prompt, drafted=[1] * prompt) for prompt in batch]

    run = SimpleNamespace(
        config=SimpleNamespace(rollout_batch=2), held_out=[1, 10, 100], model=None, _roll_out=roll_out
    )
    acceptance, values = online.OnlineRun.measure(run)
    assert decoded == [[1, 10], [100, 100]]
    assert (acceptance.rounds, values["acceptance"]["rounds"]) == (111, 111)


def test_a_full_disk_does_not_stop_learning(watched, write_config, tmp_path, capsys, monkeypatch):
    """Two saves are refused: each is one warning and one record, the snapshot before stays, the next one succeeds.

    It learns what the run with room for them did.
    """
    write = snapshot.write_arrays

    def refusing(path, arrays):
        write(path, arrays)
        if arrays["step"] in (20, 30):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshot, "write_arrays", refusing)
    main(["--config", str(write_config(prompts=40, eval_every=100))])
    failed = [record for record in read_records(tmp_path / "run") if record["kind"] == "failed_save"]
    assert [(record["snapshot"], record["count"], record["reason"]) for record in failed] == [
        (20, 1, "No space left on device"),
        (30, 2, "No space left on device"),
    ]
    printed = capsys.readouterr().out
    assert printed.count("warning: the snapshot of update") == 2
    assert {path.name for path in (tmp_path / "run" / "snapshots").iterdir()} == {"10", "40"}
    drafters = [read_checkpoint(out / "checkpoint").drafter for out in (watched.out, tmp_path / "run")]
    jax.tree.map(np.testing.assert_array_equal, *drafters)
