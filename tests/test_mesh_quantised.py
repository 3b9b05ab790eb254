"""Weights in fewer bits over several devices, made up on the CPU: every part of a matrix is cut as the matrix is."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dvi_jax.checkpoint import Checkpoint, Manifest
from dvi_jax.config import DecodeConfig, MeshConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.errors import UserError
from dvi_jax.importing.rounding import rounded
from dvi_jax.loading import from_checkpoint
from dvi_jax.mesh import make_mesh, specs_of
from dvi_jax.model.llama import random_base
from dvi_jax.presets import TINY
from dvi_jax.quantisation import Quantisation

WIDE = replace(
    TINY, num_layers=2, hidden_size=256, intermediate_size=256, head_dim=64
)  # words are blocks of 128 inputs
PROMPTS = [[5, 9, 2], [7, 7, 1, 30]]
SETTINGS = DecodeConfig(draft_steps=3, max_new_tokens=12)


def checkpoint(config, weights):
    how = Quantisation(weights=weights, group=32)
    base = jax.tree.map(np.asarray, random_base(config, jax.random.key(0), std=0.15))
    for layer in base["layers"].values():
        for name in filter(lambda name: how.includes((name,)), layer):
            layer[name] = rounded(layer[name], how).parts()
    options = {"drafter": "exit_head", "drafter_config": {"rank": 4, "alpha": 4.0}}
    manifest = Manifest(source="random", source_sha256="", dtype="float32", exit_layer=1, quantisation=how, **options)
    return Checkpoint(Path("random"), config, manifest, base)


@pytest.mark.parametrize(("weights", "kv"), [pytest.param("int8", "dtype", marks=pytest.mark.full), ("int4", "int8")])
def test_two_devices_decode_what_one_does(weights, kv):
    """Speculatively and plainly; a row of `qkv` on a wrong device, or a scale of another's inputs, would be seen."""
    meshes = (None, make_mesh(MeshConfig(1, 2)))
    one, two = (from_checkpoint(checkpoint(WIDE, weights), kv=kv, mesh=mesh) for mesh in meshes)
    expected = generate_batch(one, PROMPTS, SETTINGS)[0]
    for plain in (False, True):
        found = generate_batch(two, PROMPTS, SETTINGS, plain=plain)[0]
        assert [g.output_ids for g in found] == [g.output_ids for g in expected]
    specs = jax.tree.map(lambda spec: NamedSharding(make_mesh(MeshConfig(1, 2)), spec), specs_of(two.params))
    for leaf, sharding in zip(jax.tree.leaves(two.params.base), jax.tree.leaves(specs.base), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)  # scales too, which the model has transposed
    integers = [leaf for leaf in jax.tree.leaves(two.params.base) if leaf.dtype in (np.int8, np.uint16)]
    assert len(integers) == 2 * 4  # four matrices of each layer
    assert all(shard.data.nbytes == leaf.nbytes // 2 for leaf in integers for shard in leaf.addressable_shards)


def test_blocks_that_do_not_divide_are_refused():
    narrow = replace(WIDE, hidden_size=128, head_dim=32)
    with pytest.raises(
        UserError, match=r"^mesh model=2: the 128 inputs of out are kept in blocks of 128, which do not"
    ):
        from_checkpoint(checkpoint(narrow, "int4"), mesh=make_mesh(MeshConfig(1, 2)))
