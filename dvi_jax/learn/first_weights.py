"""First weights of a new drafter, worked out from a few dozen replies at once, without a gradient.

A token's embedding and the verifier's final hidden state before it foretell the next such state. A linear map of the
two, by least squares, is right about as many first drafts as random weights are after many updates. The targets are
whole states, not choices of one token, so a few thousand rows tell all its weights. Texts may come one by one: sums of
products are all that is kept of them. Letters: N windows, T positions, D hidden, I inputs of the map.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dvi_jax.learn.replay import Windows
from dvi_jax.loading import LoadedModel
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import Definition, Params, Tree, join, split

RIDGE = 200.0  # added to the Gram matrix, as if so many rows said that an input tells nothing: 100 to 300 is as good


class NormalEquations(struct.PyTreeNode):
    """All that least squares need to know of the rows so far."""

    gram: jax.Array  # float32 [I, I], products of the inputs with one another
    cross: jax.Array  # float32 [I, D], and with the verifier's next final hidden states

    @classmethod
    def empty(cls, model: LoadedModel) -> NormalEquations | None:
        """Of no rows; None where the drafter has no such beginning (`Drafter.foretells`)."""
        if not join(model.definition, model.params).drafter.foretells:
            return None
        width = model.config.hidden_size

        def inputs(params: Params) -> jax.Array:
            rows = Features.zeros((1, 1, width), len(model.taps), jnp.float32)
            return join(model.definition, params).drafter.foretelling(rows.final, rows)

        count = jax.eval_shape(inputs, model.params).shape[-1]
        return cls(jnp.zeros((count, count), jnp.float32), jnp.zeros((count, width), jnp.float32))


def added(definition: Definition, params: Params, equations: NormalEquations, windows: Windows) -> NormalEquations:
    """`equations` and the rows of more texts; under `jax.jit`, on one device."""
    model = join(definition, params)
    tokens, length = windows.tokens, windows.length[:, None]
    rows = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, _ = model.llama.shallow(tokens, None, rows, adapted=model.separate_trunk)
    # What predicts position p was computed at row p - 1. Row 0 has no state before it.
    features = jax.tree.map(lambda x: x[:, 1:].astype(jnp.float32), windows.features)
    known = ((rows[:, :-1] > 0) & (rows[:, 1:] < length))[..., None]
    inputs = model.drafter.foretelling(hidden[:, :-1].astype(jnp.float32), features)
    inputs, target = (jnp.where(known, x, 0.0).reshape(-1, x.shape[-1]) for x in (inputs, features.final))
    # A few thousand rows are too near singular for the fewer bits that a GPU would multiply with.
    return NormalEquations(
        equations.gram + jnp.matmul(inputs.T, inputs, precision="highest"),
        equations.cross + jnp.matmul(inputs.T, target, precision="highest"),
    )


def solved(definition: Definition, params: Params, equations: NormalEquations) -> Tree:
    """The drafter's part of `params` with the weights that suit these rows best; as `added`."""
    gram = equations.gram + RIDGE * jnp.eye(len(equations.gram))
    weights = jax.scipy.linalg.solve(gram, equations.cross, assume_a="pos").T
    module = join(definition, params)
    module.drafter.foretell(weights)
    return split(module, definition.mesh)[1].drafter
