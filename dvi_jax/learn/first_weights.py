"""First weights of a new drafter, worked out from what the verifier makes of a few texts, without a gradient.

A token's embedding and the verifier's final hidden state before it foretell the next such state. A linear map of the
two, by least squares, is right about as many first drafts as random weights are after 30 to 40 updates (SmolLM2). The
targets are whole states, not choices of one token, so a few thousand rows tell all its weights, at once.

The texts may be the model's own, written behind random tokens: nothing has to be served first. Letters: N windows, T
positions, D hidden, I inputs of the map.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import DecodeConfig
from dvi_jax.learn.replay import Windows
from dvi_jax.learn.rollout import rollout
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import WHOLE
from dvi_jax.model.speculative_llama import Definition, Params, join, split

RIDGE = 0.1  # what a weight's square costs, as a share of its input's: from 0.03 to 0.3 all is as good
BESIDE = 16  # texts that are written side by side


def from_own_texts(model: LoadedModel, *, texts: int = 48, length: int = 96, seed: int = 0) -> LoadedModel:
    """`model` whose drafter has the weights that suit texts of its own, so many of `length` tokens.

    Its own object where the drafter has no such beginning (`Drafter.foretelling`): then nothing is written.
    """
    if not can_begin(model):
        return model
    rng = np.random.default_rng(seed)
    begin = () if model.config.bos_token_id is None else (model.config.bos_token_id,)
    room = model.config.context_length - len(begin) - 1
    settings = DecodeConfig(draft_steps=1, plan="plain", max_new_tokens=min(length, room))
    written = []
    for _ in range(-(-texts // BESIDE)):
        prompts = [[*begin, int(token)] for token in rng.integers(model.config.vocab_size, size=BESIDE)]
        written.append(rollout(model, prompts, settings, longest_prompt=len(prompts[0]))[0])
    return from_windows(model, jax.tree.map(lambda *parts: jnp.concatenate(parts)[:texts], *written))


def from_windows(model: LoadedModel, windows: Windows) -> LoadedModel:
    """The same from windows of texts that were decoded already, in whatever way."""
    if not can_begin(model):
        return model
    weights = _least_squares(model.definition, model.params, windows.replace(branches=None))
    module = join(model.definition, model.params)
    module.drafter.foretell(weights)
    drafter = split(module, model.definition.mesh)[1].drafter
    drafter = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), drafter, model.params.drafter)
    return replace(model, params=model.params._replace(drafter=drafter))


def can_begin(model: LoadedModel) -> bool:
    """Whether the model's drafter can be given such weights."""
    return join(model.definition, model.params).drafter.foretells


@partial(jax.jit, static_argnames="definition")
def _least_squares(definition: Definition, params: Params, windows: Windows) -> jax.Array:
    """float32 [D, I]: the map from `Drafter.foretelling` of a row to the verifier's final hidden state of that row."""

    def solve(params: Params, windows: Windows) -> jax.Array:
        model = join(definition, params)
        tokens, length = windows.tokens, windows.length[:, None]
        rows = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _, _ = model.llama.shallow(tokens, None, rows, adapted=model.separate_trunk)
        # What predicts position p was computed at row p - 1. Row 0 has no state before it.
        features = jax.tree.map(lambda x: x[:, 1:].astype(jnp.float32), windows.features)
        known = ((rows[:, :-1] > 0) & (rows[:, 1:] < length))[..., None]
        inputs = model.drafter.foretelling(hidden[:, :-1].astype(jnp.float32), features)
        inputs, target = (jnp.where(known, x, 0.0).reshape(-1, x.shape[-1]) for x in (inputs, features.final))
        # The sums of a few thousand rows are too near singular for the fewer bits that a GPU would multiply with.
        of_inputs = jnp.matmul(inputs.T, inputs, precision="highest")
        of_both = jnp.matmul(inputs.T, target, precision="highest")
        cost = RIDGE * jnp.mean(jnp.diagonal(of_inputs)) + jnp.finfo(jnp.float32).tiny  # texts may all be empty
        solved = jax.scipy.linalg.solve(of_inputs + cost * jnp.eye(len(of_inputs)), of_both, assume_a="pos")
        return solved.T

    return definition.sharded(solve, params, (WHOLE,), WHOLE)(params, windows)
