"""The arithmetic of the comparison, on values worked out by hand."""

import numpy as np
import pytest

from conversion.parity.compare import (
    ACCEPT_LENGTHS,
    IDS,
    TOLERANCE,
    Comparison,
    Mismatch,
    Row,
    first_id_mismatch,
    first_round_mismatch,
    largest_difference,
    round_of,
    stop_at_first_token,
)
from conversion.parity.runs import Decoded


def test_largest_difference_and_where_it_is():
    expected = np.array([[1.0, -4.0], [100.0, 2.0]], np.float32)
    found = np.array([[1.5, -4.0], [99.0, 2.0]], np.float32)
    # Row 1 holds the largest absolute difference, row 0 the largest one for its magnitude: 0.5 of 4.
    assert largest_difference(expected, found) == (1.0, 0.125, 1, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_differ(bad):
    expected = np.zeros((2, 3), np.float32)
    found = expected.copy()
    found[1, 2] = bad
    absolute, _, position, index = largest_difference(expected, found)
    assert (absolute, position, index) == (np.inf, 1, 2)


def test_another_shape_differs():
    row = Row("logits", "jax", "kangaroo_ref")
    row.add_tensors(1, np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32))
    assert not row.agrees


def test_a_row_keeps_the_worst_prompt_and_agrees_up_to_the_tolerance():
    row, zeros = Row("logits", "jax", "kangaroo_ref"), np.zeros((3, 2), np.float32)
    for prompt, size in ((1, 0.5), (2, 0.9), (3, 0.25)):
        found = zeros.copy()
        found[prompt - 1, 1] = size * TOLERANCE
        row.add_tensors(prompt, zeros, found)
    assert (row.place.prompt, row.place.position, row.place.index) == (2, 1, 1)
    assert row.agrees
    row.add_tensors(4, zeros, zeros + np.float32(1.1 * TOLERANCE))
    assert not row.agrees
    assert (row.equal, row.prompts, row.place.prompt) == (3, 4, 4)


@pytest.mark.parametrize(("position", "number"), [(4, 0), (5, 1), (6, 1), (7, 2), (8, 3), (10, 3), (11, 4)])
def test_the_round_that_commits_a_position(position, number):
    """Prompt of 4: the prefill commits position 4, the rounds 5-6, 7 and 8-10."""
    assert round_of(position, 4, [2, 1, 3]) == number


EXPECTED = Decoded([9, 9, 1, 2, 3, 4], [2, 1], [3, 3])  # prompt of 2, prefill 1, rounds 2-3 and 4


def test_the_first_id_that_differs_is_named():
    found = Decoded([9, 9, 1, 2, 3, 5, 6], [2, 2], [3, 3])
    assert first_id_mismatch(1, 2, EXPECTED, found, same_end=False) == Mismatch(1, 2, 5, IDS, 4, 5)


@pytest.mark.parametrize("same_end", [True, False])
def test_an_early_end_is_a_difference(same_end):
    found = Decoded(EXPECTED.output_ids[:5], [2])
    assert first_id_mismatch(3, 2, EXPECTED, found, same_end=same_end) == Mismatch(3, 2, 5, IDS, 4, None)


def test_a_later_end_is_one_only_where_both_should_end_together():
    found = Decoded([*EXPECTED.output_ids, 7], [2, 2])
    assert first_id_mismatch(1, 2, EXPECTED, found, same_end=False) is None
    assert first_id_mismatch(1, 2, EXPECTED, found, same_end=True) == Mismatch(1, 3, 6, IDS, None, 7)


def test_the_first_round_that_differs_is_named_with_its_position():
    rounds = {"accept_lengths": [2, 1], "expected": [2, 1], "same_end": False}
    found = first_round_mismatch(1, 2, ACCEPT_LENGTHS, found=[2, 3, 1], **rounds)
    assert found == Mismatch(1, 2, 5, ACCEPT_LENGTHS, 1, 3)
    assert first_round_mismatch(1, 2, ACCEPT_LENGTHS, found=[2, 1, 4], **rounds) is None
    assert first_round_mismatch(1, 2, ACCEPT_LENGTHS, found=[2], **rounds) == Mismatch(1, 2, 5, ACCEPT_LENGTHS, 1, None)


def test_the_report_names_the_earliest_difference():
    comparison = Comparison()
    comparison.row(IDS, "hf", "kangaroo_ref").add_mismatch(Mismatch(2, 1, 4, IDS, 0, 1))
    comparison.row(ACCEPT_LENGTHS, "jax", "kangaroo_ref").add_mismatch(Mismatch(1, 5, 9, ACCEPT_LENGTHS, 1, 2))
    comparison.row(IDS, "jax", "kangaroo_ref").add_mismatch(Mismatch(1, 4, 8, IDS, 0, 1))
    row, mismatch = comparison.first_mismatch
    assert (row.name, mismatch.prompt, mismatch.round) == ("jax", 1, 4)
    assert not comparison.agrees


def test_stopping_at_the_first_token_leaves_jax_as_it_is():
    cut = stop_at_first_token(2, {"kangaroo_ref": EXPECTED, "hf": Decoded([9, 9, 1, 2]), "jax": Decoded([9, 9, 1, 7])})
    assert cut["kangaroo_ref"] == Decoded([9, 9, 1], [], [])
    assert cut["hf"] == Decoded([9, 9, 1])
    assert cut["jax"].output_ids == [9, 9, 1, 7]
