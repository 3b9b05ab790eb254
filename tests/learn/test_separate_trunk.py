"""lora_S inside the shallow layers: it gets gradients, the verifier does not notice, output stays lossless."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig, ObjectiveConfig, OptimizerConfig
from dvi_jax.learn.fast_update import Batch, fast_update, init_learner, with_trainable
from dvi_jax.learn.replay import Replay
from dvi_jax.learn.rollout import rollout, window_length

SETTINGS, PROMPTS = DecodeConfig(draft_steps=3, max_new_tokens=24), [[5, 9, 2], [7, 7, 1, 30, 4]]
OPTIMIZER = OptimizerConfig(lora_lr=5e-3, head_lr=5e-3, warmup=0)


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny(seed=3, lora={"rank_s": 3, "rank_d": 2})


def learned(model, updates):
    learner = init_learner(model.params, OPTIMIZER, Replay.empty(4, window_length(SETTINGS, 8), 32), jax.random.key(0))
    for _ in range(updates):
        windows, _ = rollout(model, PROMPTS, SETTINGS, longest_prompt=8)
        learner, metrics = fast_update(
            model.definition, model.params, learner, windows, jnp.array(True),
            objective=ObjectiveConfig(warmup=1000), optimizer=OPTIMIZER, size=Batch(0, 0, 40),
        )  # fmt: skip
        model = model.with_params(with_trainable(model.params, learner.trainable))
    return model, metrics


def test_every_lora_s_matrix_moves_and_lora_d_and_base_do_not(model):
    after, _ = learned(model, 2)  # A gets a gradient once B is no longer zero
    shallow = after.params.lora_s["llama"]["layers"]
    assert set(shallow) == {0}
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), model.params.lora_s, after.params.lora_s)
    assert len(jax.tree.leaves(moved)) == 2 * 4 + 2
    assert all(jax.tree.leaves(moved))
    for part in ("base", "lora_d"):
        jax.tree.map(np.testing.assert_array_equal, getattr(model.params, part), getattr(after.params, part))


def test_learns_and_stays_lossless(model, rollout_ids):
    before = rollout_ids(model, PROMPTS, SETTINGS, longest_prompt=8, plain=True)
    after, metrics = learned(model, 40)
    assert float(metrics["kl"]) < 1.0
    fast, plain = (rollout_ids(after, PROMPTS, SETTINGS, longest_prompt=8, plain=p) for p in (False, True))
    assert fast == plain == before
