"""Draft lengths that pay: output as ever, drafts where they are right, and the numbers the choice rests on."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.decode import cost
from dvi_jax.decode.batch import generate_batch, make_knobs, make_sampling, read_generations, start
from dvi_jax.decode.cost import measure_draft_cost
from dvi_jax.decode.drafting import least_reach
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.errors import UserError

NEW = 48


def recite(model, draft_cost, *, plain=False):
    """Two rows, from two places of the text, endlessly."""
    prompts = [model.tokenizer.encode(text) for text in ("a", " b")]
    settings = DecodeConfig(draft_steps=3, max_new_tokens=NEW, draft_cost=draft_cost)
    return generate_batch(model, prompts, settings, plain=plain, eos_ids=())[0]


def test_drafts_stay_with_a_good_drafter_and_fall_with_a_bad_one(reciter, mumbler):
    """Both are sure of every draft, so confidence tells nothing: only what the row has seen does."""
    plain = [row.new_ids for row in recite(reciter, 0.0, plain=True)]
    for draft_cost in (0.0, 0.1, 1.0):
        good, bad = recite(reciter, draft_cost), recite(mumbler, draft_cost)
        assert [row.new_ids for row in good] == [row.new_ids for row in bad] == plain
        for row in bad:
            assert set(row.accept_lengths) == {1}
            if draft_cost == 0:
                assert set(row.drafted[:-3]) == {3}
            else:
                assert set(row.drafted[12:-1]) == {1}  # one draft a round goes on, to notice if it gets better
        if draft_cost < 1:
            assert {count for row in good for count in row.drafted[:-1]} == {3}


def test_rows_choose_for_themselves(make_close, run_rows, train_noise):
    """Drafts cost nothing of the output, and fewer of them are made in vain."""
    model, prompts = make_close(), [[5, 9, 2], [40] * 9, [7]]
    model = model.with_params(train_noise(model.params, "drafter", "lora_s", std=0.1))
    fixed, chosen = run_rows(model, prompts), run_rows(model, prompts, draft_cost=0.2)
    assert [row.new_ids for row in chosen] == [row.new_ids for row in fixed]
    in_vain = [sum(sum(row.drafted) - row.accepted for row in rows) for rows in (fixed, chosen)]
    assert in_vain[1] < 0.7 * in_vain[0]
    assert len({tuple(row.drafted) for row in chosen}) == 3


def test_least_reach_by_hand():
    """tokens / (rounds + cost * drafts) * cost / accept rate, counting one more round of one right and one wrong draft.

    Fresh: 2 tokens, 1 round, 2 drafts, rate 1/2. After rounds of 2, 1, 3 tokens with 3 drafts each: 8 tokens, 4 rounds,
    11 drafts, 4 of them right, and a wrong one in each round. After 4 rounds with all 3 right: 18 tokens, 5 rounds, 14
    drafts, 13 right and the one wrong. After 5 rounds of one wrong draft: 7 tokens, 6 rounds, 7 drafts, 1 right, 6
    wrong.
    """
    accept_lengths = [[0, 0, 0, 0, 0], [2, 1, 3, 0, 0], [4, 4, 4, 4, 0], [1, 1, 1, 1, 1]]
    drafted = [[0, 0, 0, 0, 0], [3, 3, 3, 0, 0], [3, 3, 3, 3, 0], [1, 1, 1, 1, 1]]
    state = SimpleNamespace(accept_lengths=jnp.array(accept_lengths), drafted=jnp.array(drafted))
    expected = [
        0.1 * 2 / (1 + 0.1 * 2) / (1 / 2),
        0.1 * 8 / (4 + 0.1 * 11) / (4 / 8),
        0.1 * 18 / (5 + 0.1 * 14) / (13 / 14),
        0.1 * 7 / (6 + 0.1 * 7) / (1 / 7),
    ]
    np.testing.assert_allclose(least_reach(state, jnp.float32(0.1)), expected, rtol=1e-6)
    np.testing.assert_array_equal(least_reach(state, jnp.float32(0)), np.zeros(4))


@pytest.mark.parametrize("sampled", [False, True])
def test_measuring_leaves_the_state_usable(make_close, run_rows, sampled):
    model, prompts, settings = make_close(), [[5, 9, 2], [40] * 9, [7]], DecodeConfig(draft_steps=3, max_new_tokens=30)
    sampling = SamplingConfig(seed=3) if sampled else None
    knobs = make_knobs(settings, ())
    state = start(model, prompts, settings, knobs, sampling=make_sampling(model, prompts, sampling))
    assert 0 <= measure_draft_cost(model, state, settings) <= 1
    assert measure_draft_cost(model, state.replace(limit=state.length), settings) == 0  # no room for a draft
    assert int(state.rounds) == 0
    state = decode_rounds(model.definition, model.decode_params, state, knobs)
    assert read_generations(state, [3, 9, 1], ()) == run_rows(model, prompts, sampling)


@pytest.mark.parametrize(
    ("plain", "drafting", "drafts", "expected"),
    [(2.0, 3.0, 2.0, 0.25), (2.0, 2.6, 3.0, 0.1), (2.0, 1.9, 3.0, 0.0), (1.0, 9.0, 2.0, 1.0), (1.0, 2.0, 0.0, 0.0)],
)
def test_cost_by_hand(make_tiny, monkeypatch, plain, drafting, drafts, expected):
    """Seconds of a plain round, of a drafting one, and drafts in it -> a draft in plain rounds, within 0 and 1."""
    monkeypatch.setattr(cost, "round_seconds", lambda *args: (drafting, drafts) if args[-1] else (plain, 0.0))
    assert measure_draft_cost(make_tiny(layers=2), None, DecodeConfig(draft_steps=3)) == pytest.approx(expected)


@pytest.mark.parametrize("draft_cost", [-0.1, 1.1, float("nan")])
def test_bad_cost(draft_cost):
    with pytest.raises(UserError, match="draft_cost must be between 0 "):
        DecodeConfig(draft_cost=draft_cost)
