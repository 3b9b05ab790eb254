"""On a GPU no sum of a verifying pass is left to the compiler, which would order it by how many rows there are."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dvi_jax.config import SamplingConfig
from dvi_jax.decode.sampling import Sampling, draw_coupled
from dvi_jax.model import tree_cache
from dvi_jax.model.speculative_llama import join
from dvi_jax.model.tree_attention import Tree
from dvi_jax.presets import SHAPES
from dvi_jax.quantisation import chosen_storage
from experiments.measure import random_model

SUMS = {"reduce_sum", "dot_general", "cumsum", "reduce", "reduce_window", "scatter-add", "psum"}
CONFIG = replace(SHAPES["smollm2"], num_layers=2, vocab_size=4096)  # sums are split into three and four parts


def primitives(jaxpr: Any) -> Iterator[str]:
    """Whose results are floating-point numbers; not what is inside kernels of our own."""
    for equation in jaxpr.eqns:
        if any(jnp.issubdtype(getattr(out.aval, "dtype", int), jnp.floating) for out in equation.outvars):
            yield equation.primitive.name
        inner = [] if equation.primitive.name == "pallas_call" else jax.tree.leaves(list(equation.params.values()))
        for each in (getattr(value, "jaxpr", value) for value in inner):
            if hasattr(each, "eqns"):
                yield from primitives(each)


@pytest.mark.parametrize(
    ("weights", "kv", "slots", "trees"),
    [("bfloat16", "dtype", 512, False), ("int4", "int8", 4096, True)],  # caches of one chunk, and of several
)
def test_sums_are_made_by_kernels_alone(monkeypatch, weights, kv, slots, trees):
    model = random_model(CONFIG, "bfloat16", 1, quantisation=chosen_storage(weights, None)[1]).with_kv(kv)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def run(params, tokens):
        verifier = join(model.definition, params).llama
        below, above = verifier.init_caches(len(tokens), slots)
        positions = 100 + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if trees:
            path = jnp.broadcast_to(jnp.arange(tokens.shape[1]), (*tokens.shape, tokens.shape[1]))
            tree = Tree(path, positions[:, 0], room=tokens.shape[1])
            below, above = (tree_cache.branching(caches, tree) for caches in (below, above))
        hidden, _, below = verifier.shallow(tokens, below, positions)
        final, _, above = verifier.deep(hidden, above, positions)
        kept = tree_cache.keep_path((*below, *above), path[:, 0], positions[:, 0]) if trees else (below, above)
        return verifier.round_logits(final), kept

    found = set(primitives(jax.make_jaxpr(run)(model.params, jnp.zeros((3, 4), jnp.int32)).jaxpr))
    assert "pallas_call" in found
    assert not found & SUMS


def test_a_coupled_token_depends_on_no_sum_of_the_compilers(monkeypatch):
    """`cumsum` is a scan that jax writes out for a GPU: its order is that of the vocabulary."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    settings = SamplingConfig(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=1)
    sampling = Sampling.make([settings] * 3, [[1, 2]] * 3, 4096)

    def run(logits, before, position):
        return draw_coupled(logits, sampling, before, position)

    shapes = jnp.zeros((3, 4, 4096)), jnp.zeros((3, 4, 2), jnp.int32), jnp.zeros((3, 4), jnp.int32)
    found = set(primitives(jax.make_jaxpr(run)(*shapes).jaxpr))
    assert found & SUMS == {"cumsum"}
