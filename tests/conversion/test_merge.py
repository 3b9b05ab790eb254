"""A trained lora_D folded into the weights on export: another program, the same verifier."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion.exporting import export_checkpoint
from conversion.importing import import_model
from dvi_jax.checkpoint import string_keys, write_checkpoint
from dvi_jax.errors import UserError
from dvi_jax.learn.slow_update import verifier_logits
from dvi_jax.loading import load, trained_parts
from dvi_jax.model.speculative_llama import join

TOKENS = jnp.array([[5, 9, 2, 7, 1, 60]])


def logits_of(path):
    model = load(path)
    return jax.jit(lambda params: verifier_logits(join(model.definition, params), TOKENS))(model.params)


def test_merged_export_is_the_adapted_verifier(make_tiny, train_noise, tmp_path):
    model = make_tiny(lora={"rank_s": 0, "rank_d": 2})
    params = train_noise(model.params, "lora_d")
    base = model.params.base["llama"]
    tree = string_keys(base)
    tree = jax.tree.map(np.asarray, tree)
    write_checkpoint(tmp_path / "adapted", model.config, model.manifest, tree, **trained_parts(params))
    write_checkpoint(tmp_path / "base", model.config, make_tiny().manifest, tree)
    export_checkpoint(tmp_path / "adapted", tmp_path / "hf", "hf", merge=True)
    import_model(tmp_path / "hf", tmp_path / "again")
    adapted = logits_of(tmp_path / "adapted")
    np.testing.assert_allclose(logits_of(tmp_path / "again"), adapted, atol=2e-3)
    assert np.abs(logits_of(tmp_path / "base") - adapted).max() > 0.1
    with pytest.raises(UserError, match="has no lora_D to merge"):
        export_checkpoint(tmp_path / "base", tmp_path / "hf2", "hf", merge=True)
