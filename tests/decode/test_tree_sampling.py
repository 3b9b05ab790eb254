"""Sampling with several drafts of a position: one position without a model, and whole trees."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.decode import sampling as sampling_module
from dvi_jax.decode.plan import Growth
from dvi_jax.decode.sampling import Purpose
from dvi_jax.decode.state import Knobs
from dvi_jax.decode.tree import grow
from tests.decode.distributions import ALARM, DRAFTERS, DRAWS, ERROR, P, make_rows, p_value, total_variation


@partial(jax.jit, static_argnums=3)
def tried(log_q, sampling, position, drafts):
    """The drafts of one position, and the token that comes out: [DRAWS, drafts] and [DRAWS]."""
    q = jnp.broadcast_to(jax.nn.log_softmax(log_q), (DRAWS, 1, 5))
    noise = sampling_module.gumbel(sampling, position[:, None], 5, Purpose.DRAFT)
    best, tokens = jax.lax.top_k(q + noise, drafts)
    tokens = jnp.where(best > -jnp.inf, tokens, -1)
    log_p = jnp.broadcast_to(jax.nn.log_softmax(jnp.asarray(P, jnp.float32)), (DRAWS, 1, 5))
    return tokens[:, 0], sampling_module.reject(log_p, q, tokens, sampling, position[:, None])[:, 0]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("drafts", [2, 3])
def test_several_drafts_of_one_position(drafter, drafts):
    """Drawn from q, none twice, and tried in that order: what comes out is p.

    And one of them more often than of a single draft, unless p lies nowhere else than one would reach in any case.
    """
    sampling, position = make_rows(coupled=False)
    drawn, tokens = map(np.asarray, tried(jnp.asarray(DRAFTERS[drafter], jnp.float32), sampling, position, drafts))
    assert p_value(np.bincount(tokens, minlength=5), np.exp(P)) > ALARM
    kept = (drawn == tokens[:, None]).any(axis=1).mean()
    assert kept > 1 - total_variation(DRAFTERS[drafter]) + (ERROR if drafter in ("close", "opposite") else -ERROR)


@pytest.mark.parametrize("coupled", [True, False])
def test_a_position_drafted_again_in_a_tree(coupled):
    """As in a chain: the second draft of a round, and the first of the next round, at one position."""
    sampling, position = make_rows(coupled=coupled)
    zeros = jnp.zeros((DRAWS, 4), jnp.int32)

    @jax.jit
    def drafts(sampling, length):
        state = SimpleNamespace(
            tokens=jnp.full((DRAWS, 12), 2),
            length=length,
            limit=length + 9,
            done=jnp.zeros(DRAWS, bool),
            accept_lengths=zeros,
            drafted=zeros,
            sampling=sampling,
        )
        model = SimpleNamespace(over_vocabulary=lambda logits: logits)
        flat = jnp.zeros((DRAWS, 1, 5))
        knobs = Knobs.make(2, 0.0, ())
        return grow(model, state, knobs, 3, Growth(2, 1, 1), lambda level, frontier: flat).tokens[:, 1:]

    agree = np.asarray(drafts(sampling, position)[:, 1] == drafts(sampling, position + 1)[:, 0]).mean()
    assert agree == 1 if coupled else abs(agree - 1 / 5) < ERROR


@pytest.mark.parametrize(
    ("name", "stops"), [("opposite", (0.0, 0.0)), pytest.param("untrained", (0.3, 0.1), marks=pytest.mark.full)]
)
def test_distribution_with_a_tree(five_tokens, name, stops):
    """Several drafts of each position, which are tried one after the other."""
    ids, kept = five_tokens.sampled(name, coupled=False, stops=stops, plan="tree:8")
    assert (five_tokens.p_values(name, ids) > ALARM).all()
    assert kept > five_tokens.sampled(name, coupled=False, stops=stops)[1]


def test_a_coupled_tree_of_a_right_drafter_is_right(five_tokens):
    """Drafts are ranked with the noise of their positions, so the first choice is the verifier's token."""
    ids, kept = five_tokens.sampled("right", coupled=True, plan="tree:8", rows=250)  # as many say whether it is so
    np.testing.assert_array_equal(ids, five_tokens.plain("right")[:, :250])
    assert kept > 0.999  # the draft pass has other shapes: its rounding may decide a tie the other way
