"""The passes that fill a tree: a node is drafted as the end of a chain of its ancestors; what is kept is a chain's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import make_knobs, start
from dvi_jax.decode.plan import Growth, Plan
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.tree import Frontier
from dvi_jax.decode.tree_drafting import StepPasses
from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import join, split

PROMPTS, SETTINGS = [[7, 40, 3, 9], [5, 2]], DecodeConfig(draft_steps=7, max_new_tokens=24)
# By level: the tokens of the nodes that are drafted from, and which node of the level before each comes from.
TOKENS = ([[11, 12], [13, 14]], [[21, 22], [23, 24]])
PARENTS = ([[0, 0], [0, 0]], [[1, 0], [1, 1]])


def model_with(tiny, drafter, *, lora=None, is_right=False):
    """A random model in float32 with this drafter; if `is_right` its deep layers add nothing, so exit_head is right."""
    options = {"rank": 4, "alpha": 4.0} if drafter == "exit_head" else {}
    manifest = replace(tiny.manifest, drafter=drafter, drafter_config=options, lora=lora or {})
    base = random_base(tiny.config, jax.random.key(0), jnp.dtype("float32"), std=0.3)
    for number, layer in base["layers"].items():
        if is_right and int(number) >= manifest.exit_layer:
            layer |= {"out": 0 * layer["out"], "down": 0 * layer["down"]}
    return LoadedModel(tiny.config, manifest, *split(build_model(tiny.config, manifest, base, seed=0)))


@pytest.mark.parametrize("drafter", ["fused", "kangaroo"])
def test_a_node_is_drafted_as_the_end_of_a_chain(make_tiny, drafter):
    model = model_with(make_tiny(layers=2), drafter)
    module = join(model.definition, model.decode_params)
    state = start(model, PROMPTS, SETTINGS, make_knobs(SETTINGS, ()))
    level_of = [(jnp.array(tokens), jnp.array(parents)) for tokens, parents in zip(TOKENS, PARENTS, strict=True)]

    @jax.jit
    def by_tree(state):
        passes = StepPasses(module, module.drafter, state, Growth(3, 2, 2))
        root = jnp.zeros((2, 1), jnp.int32)
        found = []
        for level in range(3):
            tokens, parent = (root, root) if level == 0 else level_of[level - 1]
            path = tokens[..., None]
            nothing = jnp.zeros(tokens.shape)
            found.append(passes.expand(level, Frontier(tokens, parent, path, nothing, nothing > 0)))
        return found

    @jax.jit
    def by_chain(state, tokens):
        """Draft logits behind the pending token and behind each of `tokens` [B, T], one after the other."""
        caches, drafter_state, at = state.shallow, state.drafter, state.length - 1
        pending = jnp.take_along_axis(state.tokens, at[:, None], axis=1)
        logits = []
        for step, token in enumerate([pending, *jnp.split(tokens, tokens.shape[1], axis=1)]):
            hidden, _, caches = module.llama.shallow(token, caches, (at + step)[:, None])
            if step == 0:
                new, drafter_state = module.drafter.first(drafter_state, state.committed, hidden, at)
            else:
                new, drafter_state = module.drafter.next(drafter_state, new, hidden, (at + step)[:, None])
            logits.append(module.drafter.logits(new, module.draft_head())[:, 0])
        return logits

    found = jax.device_get(by_tree(state))
    for node in range(2):
        parent = np.array(PARENTS[1])[:, node]
        first = np.array(TOKENS[0])[np.arange(2), parent]
        chain = jax.device_get(by_chain(state, jnp.stack([first, np.array(TOKENS[1])[:, node]], axis=1)))
        np.testing.assert_allclose(found[0][:, 0], chain[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[1][np.arange(2), parent], chain[1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[2][:, node], chain[2], rtol=1e-4, atol=1e-4)


def test_what_was_cached_along_the_path_is_kept(make_tiny):
    """kangaroo's cache holds what it would hold had every token been drafted in a chain."""
    model = model_with(make_tiny(layers=2), "kangaroo")
    knobs = make_knobs(SETTINGS, ())
    begun = start(model, PROMPTS, SETTINGS, knobs)
    program = (model.definition, model.decode_params)
    ended = {
        plan: decode_rounds(*program, jax.tree.map(jnp.copy, begun), knobs, Plan(*plan))
        for plan in (("tree", 8), ("chain", 2))
    }
    tree, chain = ended["tree", 8], ended["chain", 2]
    assert int(jnp.sum(tree.accept_lengths > 2)) > 0
    for a, b in zip(tree.drafter, chain.drafter, strict=True):
        for sequence, prompt in enumerate(PROMPTS):
            # The row of the last committed token but one may belong to the round that is still to come.
            filled = len(prompt) + SETTINGS.max_new_tokens - 2 - 3
            np.testing.assert_allclose(a[sequence, :, :filled], b[sequence, :, :filled], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", [Plan("chain", 2), Plan("tree", 8)], ids=str)
def test_a_separate_trunk_has_seen_all_of_the_path(make_tiny, plan):
    """lora_S starts as nothing and the drafter is right, so every draft of every round is: no row may be missing."""
    model = model_with(make_tiny(layers=2), "exit_head", lora={"rank_s": 3, "rank_d": 2}, is_right=True)
    knobs = make_knobs(SETTINGS, ())
    state = start(model, PROMPTS, SETTINGS, knobs)
    assert len(state.trunk) == 1
    state = decode_rounds(model.definition, model.decode_params, state, knobs, plan)
    new = SETTINGS.max_new_tokens - 1
    expected = [3] * (new // 3) + [new % 3] * (new % 3 > 0)
    for lengths in np.asarray(state.accept_lengths):
        assert lengths[lengths > 0].tolist() == expected
