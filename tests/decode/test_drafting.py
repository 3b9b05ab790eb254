"""How many drafts a round may make, by hand."""

from types import SimpleNamespace

import jax.numpy as jnp

from dvi_jax.decode.drafting import bounds_of
from dvi_jax.decode.state import Knobs


def test_a_round_commits_no_more_than_the_sequence_may_still_get():
    """Ten, two and one more tokens, of which one is the verifier's own; a finished sequence gets none."""
    nothing = jnp.zeros((4, 1), jnp.int32)
    state = SimpleNamespace(
        done=jnp.array([False, False, False, True]),
        length=jnp.array([10, 18, 19, 10]),
        limit=jnp.array([20, 20, 20, 20]),
        accept_lengths=nothing,
        drafted=nothing,
    )
    assert bounds_of(state, Knobs.make(3, 0.0, ()), 6).most.tolist() == [3, 1, 0, 0]
    assert bounds_of(state, Knobs.make(9, 0.0, ()), 6).most.tolist() == [5, 1, 0, 0]
