"""The optimiser of matrices, and what every update of this package wraps its optimiser in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

TABLES = ("markov_before", "markov_after", "places")  # whose rows are a token's or a place's, each for itself
ADAM_SIZE = 0.2  # root mean square of the steps that Adam makes, roughly (arXiv 2502.16982)


def muon(rate: optax.Schedule, *, weight_decay: float) -> optax.GradientTransformation:
    """Momentum whose steps have all singular values alike: of matrices that map a state to another.

    A gradient's few large singular values move no more than all the others (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). Steps are as large as AdamW's, so that its rates go for both.
    """

    def dimensions(weights: optax.Params) -> optax.Params:
        """Of a stack of matrices, those of each."""
        return jax.tree.map(lambda leaf: MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), weights)

    return optax_muon(
        rate, weight_decay=weight_decay, consistent_rms=ADAM_SIZE, muon_weight_dimension_numbers=dimensions
    )


def maps_apart(parts: dict[str, Any]) -> dict[str, Any]:
    """Labels for `optax.multi_transform`: of the drafter "maps" for matrices as above, else a part's own name."""

    def label(path: tuple[Any, ...], leaf: jax.Array) -> str:
        is_table = any(getattr(key, "key", None) in TABLES for key in path)
        return "maps" if leaf.ndim in (2, 3) and not is_table else "drafter"

    return {name: name for name in parts} | {"drafter": jax.tree.map_with_path(label, parts["drafter"])}


def guarded(optimizer: optax.GradientTransformation, clip_norm: float) -> optax.GradientTransformation:
    """`optimizer` clipped by global norm; an update that would leave anything non-finite is skipped and counted.

    However many there are in a row: `optax.apply_if_finite`, whose state this keeps, would apply one in the end, and
    looks at gradients alone.
    """
    inner = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)

    def init(params: optax.Params) -> optax.ApplyIfFiniteState:
        return optax.ApplyIfFiniteState(jnp.int32(0), jnp.array(True), jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        gradients: optax.Updates, state: optax.ApplyIfFiniteState, params: optax.Params
    ) -> tuple[optax.Updates, optax.ApplyIfFiniteState]:
        updates, inner_state = inner.update(gradients, state.inner_state, params)
        # A gradient that is not finite makes moments that are not, and so may a huge one.
        finite = all_finite((optax.apply_updates(params, updates), inner_state))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), inner_state, state.inner_state)
        updates = jax.tree.map(lambda new: jnp.where(finite, new, 0), updates)
        return updates, counted(state, finite)._replace(inner_state=kept)

    return optax.GradientTransformation(init, update)


def counted(state: optax.ApplyIfFiniteState, finite: jax.Array) -> optax.ApplyIfFiniteState:
    """The state behind another update, which was `finite` (bool scalar) or was not applied."""
    return state._replace(
        notfinite_count=jnp.where(finite, 0, optax.safe_increment(state.notfinite_count)),
        last_finite=finite,
        total_notfinite=state.total_notfinite + jnp.where(finite, 0, 1),
    )


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of every floating-point leaf is finite: bool scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
