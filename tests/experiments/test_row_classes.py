"""The experiments about rows and prefills, on a tiny model."""

import itertools
import json
import sys

import numpy as np
import pytest

from dvi_jax.decode.plan import PLAIN
from dvi_jax.errors import UserError
from dvi_jax.presets import TINY
from experiments import prefill_rate, row_classes


def test_passes_of_one_class_are_compared(monkeypatch, tmp_path):
    out = tmp_path / "rows.json"
    options = "--dtype float32 --layers 2 --passes 2x1 2x1 --new-tokens 6"
    monkeypatch.setattr(sys, "argv", ["row_classes", *options.split(), "--out", str(out)])
    assert row_classes.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["row_class"], row["positions"], row["equal"]) for row in rows] == [("1x2", 5, True)] * 2


def test_trees_are_compared_with_plain_decoding_of_as_many_rows(monkeypatch, tmp_path):
    out = tmp_path / "rows.json"
    options = "--dtype float32 --layers 2 --trees --passes 4x1 4x1 --new-tokens 6"
    monkeypatch.setattr(sys, "argv", ["row_classes", *options.split(), "--out", str(out)])
    assert row_classes.main() == 0
    assert [row["equal"] for row in json.loads(out.read_text())["rows"]] == [True] * 2


def test_sequences_are_the_same_one_by_one_and_side_by_side(make_tiny):
    """Each another one; of other row classes on a CPU, so not to the bit."""
    model = row_classes.scripted(make_tiny(layers=2))
    one_by_one, two_by_two = (row_classes.decoded(model, list(range(3, 19)), PLAIN, n, 6, 3) for n in (1, 2))
    assert one_by_one.shape == (3, 5, TINY.hidden_size)
    np.testing.assert_allclose(two_by_two.view(np.float32), one_by_one.view(np.float32), atol=1e-4)
    for a, b in itertools.combinations(one_by_one.view(np.float32), 2):
        assert np.abs(a - b).max(axis=1).min() > 0.1


def test_a_difference_of_any_sequence_is_reported(monkeypatch, capsys):
    """Where the first pass has fewer sequences than another, it is run for all of them."""
    counts, first = [], np.zeros((2, 5, 4), np.uint32)
    other = first.copy()
    other[1, 3:, 1] = 1
    states = iter([first, other])

    def decoded(*arguments):
        counts.append(arguments[-1])
        return next(states)

    monkeypatch.setattr(row_classes, "decoded", decoded)
    monkeypatch.setattr(row_classes, "row_class", lambda *_: "any")
    monkeypatch.setattr(sys, "argv", ["row_classes", "--layers", "2", "--passes", "1x1", "1x2"])
    assert row_classes.main() == 1
    assert counts == [2, 2]
    assert "'first_difference': {'sequence': 1, 'position': 3}" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["6", "0x1", "18x1", "1x0", "axb"])
def test_bad_passes(monkeypatch, text):
    monkeypatch.setattr(sys, "argv", ["row_classes", "--passes", text])
    with pytest.raises(UserError, match=f"--passes {text}: it must be rows by sequences"):
        row_classes.main()


def test_operations_of_a_prefill_by_hand():
    """Two for each weight of the layers and token; scores and sums of values over half of the square."""
    kv = TINY.num_kv_heads * TINY.head_dim
    weights = TINY.hidden_size * (2 * TINY.num_heads * TINY.head_dim + 2 * kv + 3 * TINY.intermediate_size)
    attention = 2 * 2 * TINY.num_heads * TINY.head_dim * 10 * 10 / 2
    assert prefill_rate.operations(TINY, 10) == TINY.num_layers * (2 * weights * 10 + attention)
