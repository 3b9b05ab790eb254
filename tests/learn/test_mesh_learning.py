"""Learning on several devices, made up on the CPU: the gradient of one, and runs that go on."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dvi_jax.checkpoint import Checkpoint, Manifest, read_checkpoint
from dvi_jax.config import DistillConfig, MeshConfig, load_train_config
from dvi_jax.errors import UserError
from dvi_jax.identity import hash_tree
from dvi_jax.learn.distill import distill_gradient, distill_metrics
from dvi_jax.learn.offline import train_offline
from dvi_jax.learn.online import train_online
from dvi_jax.loading import from_checkpoint
from dvi_jax.mesh import make_mesh, to_host
from dvi_jax.model.llama import random_base
from dvi_jax.presets import TINY

CONFIG = replace(TINY, num_layers=2)
SHAPE = (4, 16)


def gradient_of(checkpoint: Checkpoint, mesh: MeshConfig):
    """The gradient and the metrics of rows with unequal shares of what is learned from."""
    model = from_checkpoint(checkpoint, mesh=make_mesh(mesh))
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, CONFIG.vocab_size, SHAPE).astype(np.int32), rng.random(SHAPE) < 0.7
    mask[0, 3:] = False
    trainable = {"drafter": model.params.drafter, "lora_s": model.params.lora_s}
    config = DistillConfig(checkpoint="c", out="o", data=(), unroll_steps=2)

    @jax.jit
    def run(params, trainable):
        gradient = distill_gradient(model.definition, params, trainable, tokens, mask, config)
        return gradient, distill_metrics(model.definition, params, tokens, mask, config=config)

    return to_host(run(model.params, trainable))


@pytest.mark.parametrize(
    ("drafter", "options"),
    [
        pytest.param("exit_head", {"rank": 4, "alpha": 4.0}, marks=pytest.mark.full),
        ("medusa", {"markov_rank": 4}),
    ],
)
def test_gradient_is_that_of_one_device(drafter, options):
    """Of drafters with weights before the vocabulary's logits and behind them (a scale, a bigram term)."""
    exit_layer = 0 if drafter == "medusa" else 1
    manifest = Manifest(
        source="r", source_sha256="", dtype="float32", exit_layer=exit_layer, drafter=drafter, drafter_config=options
    )
    base = jax.tree.map(np.asarray, random_base(CONFIG, jax.random.key(0), std=0.3))
    checkpoint = Checkpoint("random", CONFIG, manifest, base)
    one, four = (gradient_of(checkpoint, mesh) for mesh in (MeshConfig(), MeshConfig(2, 2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), one, four)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(one[0][0])) > 1e-3


def test_online_runs_go_on_bit_for_bit(write_config, tmp_path):
    """Rollouts over the devices, and Muon; a run that was stopped halfway ends as one that was not."""
    optimizer = {"matrices": "muon", "lora_lr": 1e-2, "head_lr": 1e-2}
    changes = {"drafter": "fused", "drafter_options": {}, "optimizer": optimizer}
    changes |= {"mesh": {"data": 2, "model": 2}, "prompts": 12, "rollout_batch": 4, "eval_every": 100, "save_every": 1}
    ends = []
    for name, stops in (("whole", [12]), ("halves", [4, 12])):
        for index, prompts in enumerate(stops):
            path = write_config(**changes | {"out": str(tmp_path / name), "prompts": prompts})
            result = train_online(load_train_config(path, []), resume=index > 0)
        read = read_checkpoint(result.checkpoint)
        ends.append(hash_tree(read.drafter))
    assert ends[0] == ends[1]


@pytest.mark.full
def test_an_online_run_goes_on_under_another_mesh(write_config):
    """With other roundings."""
    changes = {"rollout_batch": 4, "eval_every": 100, "save_every": 1}
    for prompts, mesh in ((4, {"data": 2, "model": 2}), (8, {"data": 2})):
        path = write_config(**changes | {"prompts": prompts, "mesh": mesh})
        assert train_online(load_train_config(path, []), resume=prompts > 4).updates == prompts // 2


def test_distillation_on_several_devices(byte_checkpoint, conversations, tmp_path):
    config = DistillConfig(
        checkpoint=str(byte_checkpoint),
        out=str(tmp_path / "run"),
        data=(str(conversations),),
        drafter="fused",
        matrices="muon",
        mesh=MeshConfig(2, 2),
        tokens=12 * 4 * 64,
        row_length=64,
        batch_rows=4,
        learn_from="all",
        unroll_steps=1,
        warmup=1,
        lr=2e-2,
        eval_rows=4,
    )
    result = train_offline(config)
    assert result.after[0] > result.before[0]
    assert read_checkpoint(result.checkpoint).manifest.training_step == 12


def test_settings_that_do_not_fit(write_config):
    for change, said in (
        ({"rollout_batch": 3, "mesh": {"data": 2}}, r"rollout_batch must be a multiple of mesh\.data=2, got 3"),
        ({"mesh": {"data": 0}}, r"mesh\.data must be 1 or more, got 0"),
    ):
        with pytest.raises(UserError, match=said):
            load_train_config(write_config(**change), [])
    slow = {"slow": {"every": 1, "rank_d": 2}, "mesh": {"model": 2}}
    with pytest.raises(UserError, match=r"slow\.every needs a whole model on every device"):
        train_online(load_train_config(write_config(**slow), []))
