"""Acceptance statistics against numbers counted by hand, and against identities that tie them together."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvi_jax.decode.acceptance import accept_length_histogram, consecutive_accept_rates, measure_acceptance


def generation(*rounds: tuple[int, int]) -> SimpleNamespace:
    """One generation from (drafted, accept_length) pairs."""
    return SimpleNamespace(drafted=[d for d, _ in rounds], accept_lengths=[a for _, a in rounds])


# Three drafts: all accepted; the second rejected; the first rejected; one draft only (near the limit), accepted.
BY_HAND = [generation((3, 4), (3, 2)), generation((3, 1), (1, 2))]


def test_counts_by_hand():
    acceptance = measure_acceptance(BY_HAND)
    assert (acceptance.rounds, acceptance.drafted) == (4, 10)
    assert acceptance.accepted == 3 + 1 + 0 + 1
    assert acceptance.judged == 3 + 2 + 1 + 1
    assert acceptance.accept_rate == pytest.approx(5 / 7)
    assert acceptance.tokens_per_round == pytest.approx((4 + 2 + 1 + 2) / 4)
    assert acceptance.per_position == pytest.approx((3 / 4, 1 / 2, 1 / 1))


def test_histogram_by_hand():
    assert accept_length_histogram(BY_HAND, 4) == [1, 2, 0, 1]


def test_consecutive_rates_count_only_rounds_that_drafted_enough():
    # w=1: 3 of 4 rounds; w=2: 1 of the 3 that drafted two; w=3: the same one; w=4: nobody drafted four.
    assert consecutive_accept_rates(BY_HAND, 4) == [
        pytest.approx(3 / 4),
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
        None,
    ]


def test_nothing_decoded_gives_no_rate():
    assert consecutive_accept_rates([generation()], 2) == [None, None]
    assert accept_length_histogram([], 2) == [0, 0]


full_rounds = st.lists(st.integers(1, 4).map(lambda length: (3, length)), min_size=1, max_size=40)


@given(full_rounds)
def test_accepts_in_a_row_add_up_to_the_mean_accept_length(rounds):
    """With every round drafting three tokens, E[accepted] = sum over w of P(accepted >= w)."""
    one = [generation(*rounds)]
    assert sum(consecutive_accept_rates(one, 3)) == pytest.approx(measure_acceptance(one).tokens_per_round - 1)


@given(full_rounds)
def test_accepts_in_a_row_are_products_of_the_rates_per_position(rounds):
    one = [generation(*rounds)]
    per_position = measure_acceptance(one).per_position
    for window, rate in enumerate(consecutive_accept_rates(one, 3), start=1):
        assert rate == pytest.approx(prod(per_position[:window]))
