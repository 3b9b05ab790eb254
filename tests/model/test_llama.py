"""The Llama against the original's recorded numbers, and against itself split elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.errors import UserError
from dvi_jax.model.llama import Llama, base_shapes
from dvi_jax.model.speculative_llama import join
from dvi_jax.presets import TINY


def test_golden_stages(golden):
    """Prompts padded on the right to one length, so that one compilation serves all."""
    llama = join(golden.model.definition, golden.model.params).llama
    longest = max(len(run["prompt"]) for run in golden.runs)
    positions = jnp.arange(longest)[None]

    @jax.jit
    def stages(tokens):
        hidden, _, _ = llama.shallow(tokens, None, positions)
        final, _, _ = llama.deep(hidden, None, positions)
        return {"hidden_exit": hidden, "hidden_last": final, "logits": llama.logits(final)}

    for index, run in enumerate(golden.runs):
        count = len(run["prompt"])
        padded = jnp.array([run["prompt"] + [0] * (longest - count)])
        for name, found in jax.device_get(stages(padded)).items():
            np.testing.assert_allclose(found[0, :count], golden.stages[f"{name}_{index}"], atol=2e-4, rtol=0)


def test_cached_rows_equal_one_pass(make_tiny):
    """Row by row through the caches gives what one causal pass gives."""
    model = make_tiny()
    llama = join(model.definition, model.params).llama
    tokens = jnp.array([[5, 9, 2, 7, 1, 3], [8, 8, 4, 0, 6, 2]])
    positions = jnp.broadcast_to(jnp.arange(6), tokens.shape)

    @jax.jit
    def forward(tokens, caches, positions):
        hidden, _, shallow = llama.shallow(tokens, caches[0], positions)
        final, _, deep = llama.deep(hidden, caches[1], positions)
        return final, (shallow, deep)

    whole = np.asarray(forward(tokens, (None, None), positions)[0])
    caches = llama.init_caches(2, 16)
    for t in range(6):
        final, caches = forward(tokens[:, t : t + 1], caches, positions[:, t : t + 1])
        np.testing.assert_allclose(final[:, 0], whole[:, t], atol=2e-5)


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_exit_layer_does_not_change_the_model(make_tiny, exit_layer):
    model = make_tiny()
    base = join(model.definition, model.params).llama
    tokens, positions = jnp.array([[3, 1, 4, 1, 5]]), jnp.arange(5)[None]
    expected = base.deep(base.shallow(tokens, None, positions)[0], None, positions)[0]
    tree = {name: value for name, value in model.params.base["llama"].items() if name != "layers"}
    tree["layers"] = {str(i): layer for i, layer in model.params.base["llama"]["layers"].items()}
    other = Llama(TINY, tree, exit_layer)
    found = other.deep(other.shallow(tokens, None, positions)[0], None, positions)[0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("exit_layer", [4, -1])
def test_exit_layer_out_of_range(exit_layer):
    with pytest.raises(UserError, match="exit_layer must be between 1 and 3"):
        Llama(TINY, {}, exit_layer)


@pytest.mark.parametrize("taps", [(0,), (4,), (2, 1), (1, 1)])
def test_taps_out_of_range(taps):
    with pytest.raises(UserError, match="taps must be ascending layer numbers between 1 and 3"):
        Llama(TINY, {}, 1, taps=taps)


def test_base_shapes_tie():
    assert "head" in base_shapes(TINY)
    assert base_shapes(TINY)["layers"]["3"]["qkv"] == (64, 32)
