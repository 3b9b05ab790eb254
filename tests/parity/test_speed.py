"""The speed script: equal rounds on both sides, honest arithmetic, and what it writes."""

import json

import pytest

from experiments.kangaroo_speed import DRAFTED_WRONGLY, SHAPES, Measurement, Timing, main, random_weights


@pytest.mark.full
def test_measures_both_sides_on_equal_rounds(tmp_path, capsys):
    out = tmp_path / "speed.json"
    arguments = ["--shapes", "tiny", "--max-new-tokens", "20", "--repeats", "2", "--prompt-length", "9"]
    assert main([*arguments, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert 1 <= result["torch_threads"] <= result["cores"]
    free, capped = result["thresholds"]
    assert (free["threshold"], capped["threshold"]) == (0.0, 1.1)
    for entry in (free, capped):
        assert entry["accept_lengths_equal"]
        assert entry["torch"]["accept_lengths"] == entry["jax"]["accept_lengths"]
        assert sum(entry["jax"]["accept_lengths"][0]) == 19  # the prefill committed the first
        assert len(entry["torch"]["seconds"]) == len(entry["jax"]["seconds"]) == 2
    assert max(capped["jax"]["accept_lengths"][0]) == 2  # one draft at most
    assert max(free["jax"]["accept_lengths"][0]) > 2
    assert "JAX compiled and prefilled in" in capsys.readouterr().out


def test_figures_are_medians_over_all_rounds():
    timing = Timing([4.0, 1.0, 2.0], [[3, 1], [2, 2]])
    assert timing.ms_per_round == 500.0
    assert timing.tokens_per_second == 4.0


@pytest.mark.parametrize(
    ("found", "where"),
    [([[3, 1], [2]], None), ([[3, 1], [1]], "prompt 2, round 1"), ([[3, 1, 1], [2]], "prompt 1, round 3")],
)
def test_differing_accept_lengths_are_named(found, where):
    measurement = Measurement(0.5, Timing([1.0], [[3, 1], [2]]), Timing([1.0], found), 0.0)
    assert measurement.difference == (where and f"threshold 0.5, {where}")


def test_random_weights_draft_wrongly_where_they_say():
    """By the embedding and the head alone: the whole row finds the successor, half of it errs after the hard tokens."""
    import torch

    config = SHAPES["tiny"]
    base, drafter = random_weights(config, torch.float32, "cpu")
    successor = (base["embed"] @ base["head"].T).argmax(dim=1)
    assert sorted(successor.tolist()) == list(range(config.vocab_size))
    drafted = ((base["embed"] * drafter["norm"]) @ base["head"].T).argmax(dim=1)
    hard = int(DRAFTED_WRONGLY * config.vocab_size)
    wrong = drafted != successor
    assert wrong[:hard].all()
    assert not wrong[hard:].any()
