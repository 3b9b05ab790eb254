"""An engine whose model is split over devices, made up on the CPU: its replies are those of a generation there."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dvi_jax.checkpoint import Checkpoint, Manifest
from dvi_jax.config import DecodeConfig, MeshConfig, SamplingConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.errors import UserError
from dvi_jax.loading import from_checkpoint
from dvi_jax.mesh import make_mesh
from dvi_jax.model.llama import random_base
from dvi_jax.presets import TINY
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.many import decode_many
from dvi_jax.serve.requests import Request

SAMPLED, GREEDY = SamplingConfig(temperature=0.9, seed=5), SamplingConfig(temperature=0.0)
ASKED = [
    Request((5, 9, 2), 12, eos_ids=()),
    Request((7, 7, 1, 30), 9, SAMPLED, eos_ids=()),
    Request(tuple(range(1, 17)), 7, eos_ids=()),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Over two devices for the model, times two for the slots."""
    config = replace(TINY, num_layers=2)
    base = jax.tree.map(np.array, random_base(config, jax.random.key(0), std=0.3))
    for name in ("out", "down"):
        base["layers"]["1"][name] *= 0.4
    options = {"drafter": "exit_head", "drafter_config": {"rank": 4, "alpha": 4.0}}
    manifest = Manifest(source="random", source_sha256="", dtype="float32", exit_layer=1, **options)
    checkpoint = Checkpoint(tmp_path_factory.mktemp("split"), config, manifest, base)
    return from_checkpoint(checkpoint, mesh=make_mesh(MeshConfig(2, 2)))


@pytest.mark.parametrize("ahead", [False, True])
def test_replies_are_generations(model, ahead):
    with Engine(model, slots=2, context=64, plan="chain:2", ahead=ahead) as engine:
        found = [generation for generation, *_ in decode_many(engine, ASKED)]
    for request, generation in zip(ASKED, found, strict=True):
        settings = DecodeConfig(draft_steps=2, plan="chain:2", max_new_tokens=request.max_new_tokens)
        prompts = [list(request.prompt_ids)] * 2  # a batch that divides
        sampling = request.sampling or GREEDY  # one program for all three
        alone, _ = generate_batch(model, prompts, settings, eos_ids=(), sampling=sampling)
        assert generation.output_ids == alone[0].output_ids
        assert generation.accept_lengths == alone[0].accept_lengths


def test_slots_that_do_not_divide_are_refused(model):
    with pytest.raises(UserError, match="mesh data=2: slots of 3 does not divide among 2 devices"):
        Engine(model, slots=3, context=64, plan="plain")


def test_who_learns_takes_one_device(model):
    with pytest.raises(UserError, match="a learner takes one device"):
        Engine(model, slots=2, context=64, plan="plain", learner=object())
