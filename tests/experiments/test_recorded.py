"""Learning from recorded traffic: the rounds that teacher forcing finds are those of decoding; sums by hand."""

import itertools
import json

import numpy as np
import pytest

from dvi_jax.config import load_train_config
from dvi_jax.errors import UserError
from experiments import recorded
from experiments.learning_cost import opened

QUIET = {"objective": {"warmup": 20, "ramp": 40, "pg_max": 0.0}, "updates_per_rollout": 1}


def test_its_rounds_are_those_of_the_run(write_config):
    """From the second token of every reply on, rounds that begin where the one before ended."""
    config = load_train_config(write_config(**QUIET))
    seen = set()
    with opened(recorded.Recorder, config) as run:
        for (batch,) in itertools.islice(run._cycles(), 4):
            windows, generations = run._roll_out(run.model, batch)
            model, served = run.model, run.state.served
            hits = np.asarray(recorded.right(model.definition, model.params, served, windows, drafts=2, reply=8))
            for of_reply, generation in zip(hits, generations, strict=True):
                begin = 1
                for length in generation.accept_lengths[:-1]:  # the last one may be cut off
                    assert length == 1 + np.cumprod(of_reply[begin]).sum()
                    begin += length
                    seen.add(length)
    assert len(seen) > 1


def test_variants_of_a_run(write_config, tmp_path, capsys):
    """A rate that moves nothing changes nothing; others do, each by itself."""
    out, config = tmp_path / "out.json", write_config(**QUIET, prompts=40)
    quick = ["optimizer.lora_lr=0.1", "optimizer.head_lr=0.1"]
    variants = [["optimizer.lora_lr=1e-30", "optimizer.head_lr=1e-30"], quick, [*quick, "optimizer.average=0.9"]]
    arguments = [argument for variant in variants for argument in ("--variant", *variant)]
    assert recorded.main(["--config", str(config), "--seeds", "2", "--out", str(out), *arguments]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [variant["set"] for variant in result["variants"]] == variants
    still, *moved = (variant["change"]["conversations"] for variant in result["variants"])
    assert still == [0, 0]
    assert all(error > 0 for _, error in moved)
    assert moved[0] != moved[1]
    assert result["prompts"] == 40
    assert "frozen: conversations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("decode.draft_steps=1", "a variant may set update_every, "),
        ("objective.pg_max=1", "a variant needs objective.pg_max=0"),
        ("updates_per_rollout=0", "and updates to make"),
    ],
)
def test_what_is_no_variant(write_config, tmp_path, variant, message):
    arguments = ["--config", str(write_config(**QUIET)), "--out", str(tmp_path / "out.json"), "--variant", variant]
    with pytest.raises(UserError, match=message):
        recorded.main(arguments)


def test_counts_by_hand():
    """Two drafts a round, begun at tokens 1 and 2 of a reply of 4, at token 1 of one of 3: what follows is beyond."""
    hits = np.zeros((2, 5, 2), bool)
    hits[0, 1], hits[0, 2], hits[1, 1] = (True, False), (False, True), (True, True)
    hits[:, [0, 3, 4]] = True
    assert recorded.count(hits, np.array([4, 3])).tolist() == [[1, 3], [2, 2]]


def test_a_change_and_its_error_by_hand():
    """Two prompts of four drafts, of which one gained one: by 1/4 and 0, on average 1/8, deviating as much, of two."""
    frozen, learned = np.array([[1, 4], [2, 4]]), np.array([[2, 4], [2, 4]])
    assert recorded.change([learned, learned], frozen) == pytest.approx((1 / 8, 1 / 8 / np.sqrt(2)))
    assert recorded.change([frozen], frozen) == (0, 0)
