"""Sampling: its distribution against an enumerated one, and what seeds and drafters may change.

Of trees and several drafts of a position: test_tree_sampling.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import SamplingConfig
from dvi_jax.decode import sampling as sampling_module
from dvi_jax.decode import speculative
from dvi_jax.decode.sampling import Purpose, Sampling, draw_draft, draw_verified, log_probs
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.errors import UserError
from tests.decode.distributions import (
    ALARM,
    DRAFTERS,
    DRAWS,
    ERROR,
    SETTINGS,
    P,
    by_transformers,
    make_rows,
    p_value,
    sample,
    total_variation,
)

# The distribution of one token.


def test_log_probs_equal_transformers():
    """Random logits, settings and tokens seen before, three rows of logits for each setting."""
    rng = np.random.default_rng(0)
    vocabulary, rows = 50, 3
    settings = [
        *SETTINGS,
        *(
            SamplingConfig(
                temperature=float(rng.uniform(0.2, 2)),
                top_k=int(rng.integers(0, 60)),
                top_p=float(rng.uniform(0.05, 1)),
                min_p=float(rng.choice([0, rng.uniform(0, 0.3)])),
                repetition_penalty=float(rng.uniform(0.7, 2)),
            )
            for _ in range(40)
        ),
    ]
    logits = rng.normal(scale=3, size=(len(settings), rows, vocabulary)).astype(np.float32)
    ids = rng.integers(0, vocabulary, (len(settings), rows, 9))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=-1)
    sampling = Sampling.make(settings, ids[:, 0], vocabulary)
    np.testing.assert_array_equal(sampling.seen, seen[:, 0])
    actual = np.exp(log_probs_compiled(logits, sampling, seen))
    for index, setting in enumerate(settings):
        expected = by_transformers(ids[index], logits[index], setting)
        np.testing.assert_array_equal(actual[index] > 0, expected > 0)
        np.testing.assert_allclose(actual[index], expected, rtol=1e-4, atol=1e-7)


log_probs_compiled = jax.jit(log_probs)


def one_row(logits, **setting):
    sampling = Sampling.make([SamplingConfig(**setting)], [[0]], len(logits))
    return np.asarray(log_probs_compiled(np.array([[logits]], np.float32), sampling, sampling.seen[:, None]))[0, 0]


def test_extreme_settings_stay_finite():
    """The best token always stays, and a top_p of 1 cuts nothing, however little the tail holds."""
    logits = [30.0, 1.0, 0.0, 30.0]
    only_best = [0, -np.inf, -np.inf, -np.inf]
    np.testing.assert_array_equal(one_row(logits, temperature=0), only_best)  # the first of the best, as argmax
    np.testing.assert_array_equal(one_row([3.0, 2.9, 2.0, -9.0], top_p=1e-50), only_best)
    np.testing.assert_array_equal(one_row([3.0, 2.9, 2.0, -9.0], temperature=1e-40), only_best)
    np.testing.assert_array_equal(one_row([3.0, 2.9, 2.0, -9.0], min_p=1), only_best)
    np.testing.assert_allclose(one_row(logits), np.array([0, -29, -30, 0]) - np.log(2), rtol=1e-6)
    drafted = one_row([-np.inf, 1.0, -np.inf, 0.0], top_k=3, repetition_penalty=1.3)  # a draft vocabulary of 1 and 3
    np.testing.assert_allclose(drafted, [-np.inf, -np.log1p(np.exp(-1)), -np.inf, -np.log1p(np.exp(1))], rtol=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 1), (0.75, 2), (0.875, 4)])
def test_top_p_at_exact_equality(top_p, kept):
    """Halves: the tokens before one hold exactly top_p, which is not less; the last two are tied."""
    probabilities = one_row(np.log2([2, 1, 0.5, 0.5]) * np.float32(np.log(2)), top_p=top_p)
    assert np.isfinite(probabilities).tolist() == [index < kept for index in range(4)]


# One draft and its verification, without a model.


def draft_and_verify(log_q, sampling, position):
    """One draft of each row and what the verifier makes of it: tokens [DRAWS], twice."""
    pending = jnp.tile(jnp.array([2, -1]), (DRAWS, 1))
    draft, q = draw_draft(jnp.tile(log_q, (DRAWS, 1)), sampling, position, pending)
    logits = jnp.tile(jnp.asarray(P, jnp.float32), (DRAWS, 2, 1))
    q = None if sampling.coupled else jnp.stack([q, jnp.zeros_like(q)], axis=1)
    return draft, draw_verified(logits, sampling, position, pending.at[:, 1].set(draft), q)[:, 0]


compiled_once = jax.jit(draft_and_verify)


def first_tokens(log_q, *, coupled, program=compiled_once):
    """The token that a round of each row commits first, and whether it was the draft."""
    draft, verified = map(np.asarray, program(jnp.asarray(log_q, jnp.float32), *make_rows(coupled=coupled)))
    return verified, verified == draft


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_first_token_and_how_often_the_draft_is_it(drafter):
    """The verifier's distribution in both modes; accepted with 1 - TV, coupled at least (1 - TV) / (1 + TV)."""
    distance = total_variation(DRAFTERS[drafter])
    accepted = {}
    for coupled in (True, False):
        tokens, is_draft = first_tokens(DRAFTERS[drafter], coupled=coupled)
        assert p_value(np.bincount(tokens, minlength=5), np.exp(P)) > ALARM
        accepted[coupled] = is_draft.mean()
    assert abs(accepted[False] - (1 - distance)) < ERROR
    assert (1 - distance) / (1 + distance) - ERROR < accepted[True] < 1 - distance + ERROR
    assert drafter != "right" or accepted == {True: 1, False: 1}


def test_a_wrong_residual_is_noticed(monkeypatch):
    """Rejected drafts replaced by a draw from p instead of the positive part of p - q: the test above must fail."""
    original = sampling_module.draw

    def from_p(log_p, sampling, position, purpose=Purpose.TOKEN):
        by_row = isinstance(purpose, jax.Array)  # the verifier's own token, where a draft was rejected or not
        return original(jnp.broadcast_to(P, log_p.shape) if by_row else log_p, sampling, position, purpose)

    monkeypatch.setattr(sampling_module, "draw", from_p)
    anew = jax.jit(lambda *rows: draft_and_verify(*rows))
    tokens, _ = first_tokens(DRAFTERS["close"], coupled=False, program=anew)
    assert p_value(np.bincount(tokens, minlength=5), np.exp(P)) < ALARM


def test_a_rejected_draft_of_the_right_distribution():
    """Where p exceeds q nowhere, as rounding may leave it, a rejected draft is replaced by a token that p allows."""
    logits = jnp.tile(jnp.array([-jnp.inf, 0.0, 0.0, 0.0, 0.0]), (DRAWS, 2, 1))
    log_q = jax.nn.log_softmax(logits) + 0.05
    rows = jnp.tile(jnp.array([1, 2]), (DRAWS, 1))
    tokens = jax.jit(draw_verified)(logits, *make_rows(coupled=False), rows, log_q)[:, 0]
    assert set(np.asarray(tokens).tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("coupled", [True, False])
def test_a_position_drafted_again(coupled):
    """Coupled: the same noise and token. Else: fresh noise, as the first draft may have set how far is drafted."""
    sampling, position = make_rows(coupled=coupled)
    draw_jitted = jax.jit(draw_draft)
    second, first = (
        draw_jitted(jnp.zeros((DRAWS, 5)), sampling, position, jnp.tile(jnp.array(tokens), (DRAWS, 1)))[0]
        for tokens in ([2, 1], [1, -1])
    )
    agree = np.asarray(first == second).mean()
    assert agree == 1 if coupled else abs(agree - 1 / 5) < ERROR


# Whole generations of a model whose distribution is enumerated.


@pytest.mark.parametrize("name", ["untrained", "right"])
def test_plain_distribution(five_tokens, name):
    assert (five_tokens.p_values(name, five_tokens.plain(name)) > ALARM).all()


@pytest.mark.parametrize(
    ("name", "stops", "least", "most"),
    [("opposite", (0.0, 0.0), 0, 0.3), ("untrained", (0.5, 0.1), 0.5, 0.9), ("right", (0.0, 0.0), 1, 1)],
)
def test_speculative_distribution(five_tokens, name, stops, least, most):
    """Rejection has plain sampling's distribution; coupled has its very tokens."""
    ids, kept = five_tokens.sampled(name, coupled=False, stops=stops)
    assert (five_tokens.p_values(name, ids) > ALARM).all()
    assert least <= kept <= most
    ids, kept_coupled = five_tokens.sampled(name, coupled=True, stops=stops)
    np.testing.assert_array_equal(ids, five_tokens.plain("right" if name == "right" else "untrained"))
    assert kept_coupled <= kept


def test_distribution_with_a_draft_vocabulary(five_tokens):
    """Two of five tokens are ever drafted; all are sampled as often as they should be."""
    ids, kept = five_tokens.sampled("restricted", coupled=False)
    assert (five_tokens.p_values("restricted", ids) > ALARM).all()
    assert kept > 0.1


def test_a_wrong_acceptance_is_noticed(five_tokens, monkeypatch):
    """Every draft accepted; no other test meets the program that is traced here."""
    original = speculative.draw_verified

    def accept_all(logits, sampling, position, rows, log_q):
        drafts = jnp.pad(rows[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        return jnp.where(drafts < 0, original(logits, sampling, position, rows, log_q), drafts)

    monkeypatch.setattr(speculative, "draw_verified", accept_all)
    decode_rounds.clear_cache()
    ids, kept = sample(five_tokens.models["untrained"], coupled=False)
    decode_rounds.clear_cache()
    assert kept == 1
    assert (five_tokens.p_values("untrained", ids) < ALARM).all()


# Bad input.


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_bad_settings(setting):
    (name,) = setting
    with pytest.raises(UserError, match=f"^{name} must be .*, got [^\n]*$"):
        SamplingConfig(**setting)
