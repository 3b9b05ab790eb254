"""`python -m dvi_jax.distill` on a tiny model: from a log to a drafter, stopped and gone on with, and what it says."""

from __future__ import annotations

import json
import os
import re
import shutil

import jax
import numpy as np
import pytest

from dvi_jax import distill
from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.choosing import PlanChooser
from dvi_jax.decode.plan import PLAIN, Option, Plan
from dvi_jax.errors import UserError, run_cli
from dvi_jax.learn import self_distill
from dvi_jax.learn.packing import load_packed
from dvi_jax.loading import load


@pytest.fixture(scope="module")
def begun(byte_checkpoint, conversations, tmp_path_factory):
    """A directory whose recipe is chosen and shortened, and the arguments that go on in it; nothing is made yet."""
    out = tmp_path_factory.mktemp("distill") / "out"
    work = self_distill.SelfDistillation(str(byte_checkpoint), [str(conversations)], out)
    estimate = work.prepare(0.01, passes=2)
    assert not out.exists()
    assert estimate.prompts == work.recipe.prompts
    assert estimate.tokens == int(sum(len(ids) + 0.8 * 64 for ids in work.prompts(work.recipe, estimate.prompts)))
    assert estimate.training_memory > sum(leaf.nbytes for leaf in jax.tree.leaves(work.checkpoint.base))
    work.begin()
    return out, ["--model", str(byte_checkpoint), "--data", str(conversations), "--out", str(out)]


def test_the_command_that_it_ends_with_keeps_the_model_as_it_was():
    asked = ["--model", "a model", "--data", "log", "--out", "out", "--weights", "int4", "--kv", "int8"]
    command = distill.generate_command(distill._parser().parse_args(asked))
    assert command.startswith("dvi generate --checkpoint 'a model' --drafter-from out --weights int4 --kv int8 --plan")
    assert "--kv" not in distill.generate_command(distill._parser().parse_args(asked[:6]))


@pytest.fixture(scope="module")
def finished(begun, tmp_path_factory):
    """The same, carried through in one go."""
    out = tmp_path_factory.mktemp("finished") / "out"
    shutil.copytree(begun[0], out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "compare", lambda model, prompts: [f"{len(prompts)} prompts were kept apart"])
        assert distill.main([*begun[1][:-1], str(out)]) == 0
    return out


def test_replies_are_the_models_own(finished, byte_checkpoint):
    """Against a marked stretch of the packed text, decoded again from what stands before it."""
    packed = load_packed([finished / "replies.npz"])
    row, mask = packed.tokens[0].tolist(), packed.mask[0]
    begin = int(np.argmax(mask))
    reply = row[begin : begin + int(np.argmin(mask[begin:]))]
    settings = DecodeConfig(draft_steps=0, max_new_tokens=len(reply))
    (alone,), _ = generate_batch(load(byte_checkpoint), [row[:begin]], settings, plain=True)
    assert alone.new_ids == reply


def test_stopped_and_gone_on_with(begun, finished, monkeypatch):
    """Ctrl-C after the second batch, and again after the first update that is logged: the end is the same."""
    out, arguments = begun
    monkeypatch.setattr(distill, "compare", lambda model, prompts: [])
    for where, after in (("reply", 2), ("train", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(self_distill.SelfDistillation, where, interrupted(where, after))
            with pytest.raises(KeyboardInterrupt):
                distill.main(arguments)
    assert distill.main(arguments) == 0
    assert not list(out.glob("*.batches"))
    theirs, ours = (read_checkpoint(path / "checkpoint") for path in (finished, out))
    jax.tree.map(np.testing.assert_array_equal, ours.drafter, theirs.drafter)
    assert ours.manifest.drafter == "fused"


def interrupted(where, after):
    """The method `where`, whose reports raise at the `after`th."""
    original, seen = getattr(self_distill.SelfDistillation, where), []

    def method(self, report):
        def until(*arguments):
            seen.append(arguments)
            if len(seen) == after:
                raise KeyboardInterrupt
            report(*arguments)

        return original(self, until)

    return method


def test_the_run_lends_its_drafter(finished, byte_checkpoint):
    """`--drafter-from` takes the directory as it is; the base weights are links to those of the model."""
    model = load(byte_checkpoint, drafter_from=finished)
    assert (model.manifest.drafter, model.manifest.training_step) == ("fused", model.manifest.training_step)
    assert model.manifest.training_step > 0
    shared = [path for path in (byte_checkpoint / "base").rglob("*") if path.is_file()]
    for path in shared:
        assert os.path.samefile(path, finished / "checkpoint" / "base" / path.relative_to(byte_checkpoint / "base"))
    assert shared


def test_too_little_time_is_said(begun):
    """9 minutes of work: no surprise where 8 were asked for, one where 2 were."""
    recipe = self_distill.SelfDistillation(begun[1][1], [begun[1][3]], begun[0]).recipe
    estimate = self_distill.Estimate(10, 1000, 60.0, 480.0, 2**20, 2**21, 2**30, 2**20, 2**30)
    lines = distill.describe_estimate(estimate, recipe, 8)
    assert lines[:2] == [
        "replies   to 10 prompts of the log, 1,000 tokens in all: about 60 s",
        "training  2 passes over them: about 8 minutes",
    ]
    assert len(lines) == 4
    assert distill.describe_estimate(estimate, recipe, 2)[4].startswith("--minutes 2 is too little on this device")


def test_what_it_brings_is_measured(finished, monkeypatch):
    """The costs are given, so that what is measured is what the lines say and no more."""
    costs = {Option(PLAIN, 1): 1.0, Option(Plan("early-exit", 1), 2): 0.9}
    monkeypatch.setattr(distill, "AUTO_DRAFTS", 1)
    monkeypatch.setattr(distill.PlanChooser, "measured", lambda model, settings, prompt: PlanChooser(model, costs))
    model = load(finished / "checkpoint")
    measured, plan = distill.compare(model, [[5, 6, 7], [8, 9, 10, 11]])
    found = re.fullmatch(
        r"measured  on 2 held-out prompts: fastest plain ([\d,]+) tokens/s, --plan auto ([\d,]+) \(([\d.]+) times\),"
        r" ([\d.]+) tokens a round",
        measured,
    )
    plain, fast, times, per_round = (float(number.replace(",", "")) for number in found.groups())
    assert times == pytest.approx(fast / plain, abs=0.01)  # two digits are shown
    assert 1 <= per_round <= 2
    assert ("plain" in plan) or fast > plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--data": "nowhere.json"}, "cannot read conversations from nowhere.json"),
        ({"--model": "nowhere"}, "no checkpoint at nowhere"),
        ({"--minutes": "0"}, "--minutes must be a number above 0, got 0"),
        ({"--minutes": "nan"}, "--minutes must be a number above 0, got nan"),
        ({"--minutes": "inf"}, "--minutes must be a number above 0, got inf"),
        ({"--out": "{byte_checkpoint}"}, "already exists and is no distillation"),
        ({"--dtype": "bfloat16"}, "holds float32 weights"),
    ],
)
def test_what_cannot_be_is_said_first(begun, byte_checkpoint, tmp_path, changes, message):
    out = tmp_path / "new"
    pairs = dict(zip(begun[1][::2], begun[1][1::2], strict=True)) | {"--out": str(out)} | changes
    pairs = {name: value.format(byte_checkpoint=byte_checkpoint) for name, value in pairs.items()}
    with pytest.raises(UserError, match=message):
        distill.main([part for pair in pairs.items() for part in pair])
    assert not out.exists()


def test_another_log_or_cache_is_another_distillation(begun, conversations, tmp_path, capsys, monkeypatch):
    other = shutil.copy(conversations, tmp_path / "other.jsonl")
    monkeypatch.setattr("sys.argv", ["distill", *begun[1][:3], str(other), *begun[1][4:]])
    assert run_cli(distill.main) == 2
    assert "was begun with other data: name the same, or choose another --out" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["distill", *begun[1], "--kv", "int8"])
    assert run_cli(distill.main) == 2
    assert "was begun with another --kv" in capsys.readouterr().err


def test_too_little_memory_is_said_before_anything_is_written(byte_checkpoint, conversations, tmp_path, monkeypatch):
    monkeypatch.setattr(self_distill, "available_bytes", lambda: 10_000)
    monkeypatch.setattr(
        self_distill.SelfDistillation,
        "_measure",
        lambda self, recipe: self_distill.Rates(1.0, 1.0, 1.0, 2**30, 2**31, 0),
    )
    work = self_distill.SelfDistillation(str(byte_checkpoint), [str(conversations)], tmp_path / "out")
    with pytest.raises(UserError, match=r"2\.0 GiB of memory are needed, 0\.0 are free"):
        work.prepare(1.0)
    assert json.dumps(list(map(str, tmp_path.iterdir()))) == "[]"


def test_a_log_without_questions_is_said_before_anything_is_measured(byte_checkpoint, tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    log.write_text('{"messages": [{"role": "user", "content": "%s"}]}\n' % ("long " * 10_000), encoding="utf-8")
    monkeypatch.setattr(self_distill.SelfDistillation, "_measure", None)
    work = self_distill.SelfDistillation(str(byte_checkpoint), [str(log)], tmp_path / "out")
    with pytest.raises(
        UserError, match=r"no prompt of at most \d+ tokens in 1 conversations read \(prompt too long: 1\)"
    ):
        work.prepare(1.0)
