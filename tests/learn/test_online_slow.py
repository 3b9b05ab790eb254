"""The slow update inside an online run: on the log's answers, at its times, kept by checkpoints."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from dvi_jax.config import load_train_config
from dvi_jax.errors import UserError
from dvi_jax.learn.online import train_online
from dvi_jax.loading import load
from experiments.tiny import write_tiny_model


@pytest.fixture
def answered(tmp_path):
    """120 conversations with an answer of their own."""
    path = tmp_path / "answered.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(120):
            question, answer = {"role": "user", "content": f"say {index}"}, {"role": "assistant", "content": "yes yes"}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    return path


def test_verifier_learns_from_the_log(write_config, answered, tmp_path, rollout_ids):
    """With four layers: what two can learn in ten updates changes no token."""
    write_tiny_model(tmp_path / "deep")
    config = load_train_config(
        write_config(
            checkpoint=str(tmp_path / "deep"),
            prompts=80,
            eval_every=1000,
            save_every=1000,
            slow={"every": 8, "rank_d": 2, "rows": 2, "lr": 3e-3},
        ),
        [f"data.files=[{answered}]"],
    )
    result = train_online(config)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    slow = [record for record in records if "slow_ce" in record]
    # 40 rollouts of two fast updates: every eighth update is every fourth rollout.
    assert [record["step"] for record in slow] == list(range(8, 81, 8))
    assert slow[-1]["slow_ce"] < slow[0]["slow_ce"]
    model = load(result.checkpoint)
    assert model.manifest.verifier == "base + 10 slow updates"
    batches = [[list(prompt.ids) for prompt in result.held_out[begin : begin + 2]] for begin in (0, 2)]

    def decoded(model, *, plain=False):
        options = {"longest_prompt": config.data.max_prompt_tokens, "plain": plain}
        return [rollout_ids(model, prompts, config.decode, **options) for prompts in batches]

    unlearned = model.params._replace(lora_d=jax.tree.map(jnp.zeros_like, model.params.lora_d))
    fast = decoded(model)
    assert fast == decoded(model, plain=True)
    assert fast != decoded(model.with_params(unlearned))


def test_slow_updates_are_counted_in_fast_ones(write_config, answered, tmp_path):
    """With two fast updates every third rollout, every eighth update is every twelfth rollout."""
    slow = {"every": 8, "rank_d": 2, "rows": 2, "lr": 3e-3}
    config = write_config(prompts=48, update_every=3, eval_every=1000, save_every=1000, slow=slow)
    train_online(load_train_config(config, [f"data.files=[{answered}]"]))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["prompts"]) for r in records if "slow_ce" in r] == [(8, 24), (16, 48)]


def test_slow_updates_need_a_lora_d(write_config):
    config = load_train_config(write_config(slow={"every": 8}))
    with pytest.raises(UserError, match=r"slow\.every needs a verifier with a lora_D: set slow\.rank_d"):
        train_online(config)
