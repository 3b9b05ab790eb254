"""The two adapter sets: separate, silent until trained, counted, merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.checkpoint import string_keys
from dvi_jax.model.lora import count_lora, inject_dual_lora, merge_lora
from dvi_jax.model.speculative_llama import join, split

TOKENS, POSITIONS = jnp.array([[5, 9, 2, 7]]), jnp.arange(4)[None]


@pytest.fixture
def injected(make_tiny):
    model = make_tiny()
    module = inject_dual_lora(join(model.definition, model.params), rank_s=3, rank_d=2, key=jax.random.key(7))
    return model, module


def final(module, adapted=False):
    hidden, _, _ = module.llama.shallow(TOKENS, None, POSITIONS, adapted=adapted)
    return module.llama.deep(hidden, None, POSITIONS)[0]


def test_fresh_sets_change_nothing(injected):
    model, module = injected
    np.testing.assert_array_equal(final(module, adapted=True), final(join(model.definition, model.params)))
    assert module.separate_trunk


def test_sets_are_separate_and_counted(injected):
    _, module = injected
    _, params = split(module)
    # qkv [64, 32], out [32, 32], gate_up [96, 32], down [32, 48]: in + out of each, two layers a set.
    sides = (64 + 32) + (32 + 32) + (96 + 32) + (32 + 48)
    exit_head = 4 * (32 + 32)
    assert count_lora(module) == (2 * 3 * sides + exit_head, 2 * 2 * sides)
    assert set(params.lora_s["llama"]["layers"]) == {0, 1}
    assert set(params.lora_d["llama"]["layers"]) == {2, 3}


def test_lora_s_acts_in_the_draft_pass_alone(injected, train_noise):
    _, module = injected
    definition, params = split(module)
    before = final(module)
    moved = join(definition, train_noise(params, "lora_s"))
    np.testing.assert_array_equal(final(moved), before)
    assert np.abs(final(moved, adapted=True) - before).max() > 1e-3
    deep = join(definition, train_noise(params, "lora_d"))
    assert np.abs(final(deep) - before).max() > 1e-3


def test_merge_equals_adapted(injected, train_noise, make_tiny):
    """Folding a trained lora_D into the base weights gives the adapted model's output."""
    model, module = injected
    definition, params = split(module)
    params = train_noise(params, "lora_d")
    expected = final(join(definition, params))
    base = model.params.base["llama"]
    tree = string_keys(base)
    merged = merge_lora(jax.tree.map(np.asarray, tree), params.lora_d["llama"], scale=1.0)
    assert merged["layers"]["0"]["qkv"] is not None
    layers = {i: jax.tree.map(jnp.asarray, merged["layers"][str(i)]) for i in range(4)}
    plain = model.params._replace(base={"llama": {**base, "layers": layers}})
    np.testing.assert_allclose(final(join(model.definition, plain)), expected, atol=2e-4)
