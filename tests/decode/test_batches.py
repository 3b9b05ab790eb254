"""Rows of one batch: each has its own prompt length, accept lengths, budget, end and sampling; none sees another."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.decode.batch import generate_batch, start
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import Knobs
from dvi_jax.errors import UserError

pytestmark = pytest.mark.optimized
PROMPTS = [[5, 9, 2], [40] * 9, [7]]
SAMPLED = (
    SamplingConfig(temperature=0.8, top_p=0.9, seed=5),
    SamplingConfig(temperature=1.3, top_k=20, repetition_penalty=1.2, seed=6),
    SamplingConfig(temperature=0.0, seed=7),
)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def ids_of(generations):
    return [generation.new_ids for generation in generations]


@DTYPES
def test_rows_equal_their_plain_batch(make_close, train_noise, run_rows, dtype):
    """Rows of different prompts, budgets and accept lengths, one of which meets an eos id."""
    model = make_close(dtype)
    model = model.with_params(train_noise(model.params, "drafter", "lora_s", std=0.1))
    budgets = (12, 30, 21)
    free = run_rows(model, PROMPTS, draft_steps=0, budgets=budgets)
    assert [len(ids) for ids in ids_of(free)] == list(budgets)
    eos = free[1].new_ids[17]
    ends = [ids.index(eos) + 1 if eos in ids else len(ids) for ids in ids_of(free)]
    fast = run_rows(model, PROMPTS, eos_ids=(eos,), budgets=budgets)
    assert ids_of(fast) == [ids[:end] for ids, end in zip(ids_of(free), ends, strict=True)]
    assert [row.finish_reason for row in fast] == ["eos" if row.new_ids[-1] == eos else "length" for row in fast]
    assert fast[1].finish_reason == "eos"
    assert len({tuple(row.accept_lengths[:5]) for row in fast}) == 3
    assert len({length for row in fast for length in row.accept_lengths}) >= 3


def test_coupled_sampling(make_close, train_noise, run_rows):
    """Sampled ids, too, are the plain ones of that seed, whatever drafts, how much, and when it stops.

    In bfloat16: tests/contract, a chain behind a prefix.
    """
    settings = [*SAMPLED[:2], SamplingConfig(temperature=1.0, min_p=0.05, seed=7)]
    model = make_close()
    plain = ids_of(run_rows(model, PROMPTS, settings, draft_steps=0))
    lengths = set()
    for std in (0.0, 0.05, 2.0):
        drafting = model.with_params(train_noise(model.params, "drafter", "lora_s", std=std))
        for knobs in ({}, {"draft_steps": 1}, {"threshold": 0.6}, {"draft_cost": 0.2}):
            rows = run_rows(drafting, PROMPTS, settings, **knobs)
            assert ids_of(rows) == plain
            lengths |= {length for row in rows for length in row.accept_lengths}
    assert lengths == {1, 2, 3, 4}


def test_temperature_zero_is_greedy(make_close, run_rows):
    model = make_close()
    greedy = ids_of(run_rows(model, PROMPTS))
    for coupled in (True, False):
        rows = run_rows(model, PROMPTS, SamplingConfig(temperature=0, top_p=0.5, coupled=coupled))
        assert ids_of(rows) == greedy


@DTYPES
def test_greedy_neighbours_do_not_matter(make_close, run_rows, dtype):
    """Neither what the neighbours are, nor how long, nor when they end, nor where the row stands."""
    model = make_close(dtype)
    first = run_rows(model, PROMPTS)
    for others, budgets in (([[1], [2, 2]], (30, 30)), ([[63] * 9, [17, 5]], (2, 30)), ([[40] * 9, [8]], (30, 5))):
        changed = run_rows(model, [PROMPTS[0], *others], budgets=(30, *budgets))
        assert changed[0] == first[0]
        assert changed[2] != first[2]
        moved = run_rows(model, [others[1], others[0], PROMPTS[0]], budgets=(*budgets[::-1], 30))
        assert moved[2] == first[0]


@pytest.mark.parametrize("coupled", [True, False])
def test_seeds_and_sampled_neighbours(make_close, run_rows, coupled):
    """A row's tokens, and how they were drafted, are those of its prompt, setting and seed, wherever it stands."""
    model = make_close()
    settings = [replace(setting, coupled=coupled) for setting in SAMPLED]
    first = run_rows(model, PROMPTS, settings)
    assert run_rows(model, PROMPTS, settings) == first
    others = [replace(setting, seed=setting.seed + 100) for setting in settings]
    for row in range(3):
        changed = run_rows(model, PROMPTS, [*settings[:row], others[row], *settings[row + 1 :]])
        same = [old == new for old, new in zip(first, changed, strict=True)]
        assert same == [index != row or settings[row].temperature == 0 for index in range(3)]
    moved = run_rows(model, [PROMPTS[1], [3, 3], PROMPTS[0]], [settings[1], others[2], settings[0]])
    assert [moved[2], moved[0]] == first[:2]


def test_one_setting_for_all_rows_counts_up_its_seed(make_close, run_rows):
    model, setting = make_close(), SamplingConfig(seed=2**32 - 1)
    together = run_rows(model, [[7]] * 3, setting)
    assert together == run_rows(model, [[7]] * 3, [replace(setting, seed=seed) for seed in (2**32 - 1, 0, 1)])
    assert len({tuple(ids) for ids in ids_of(together)}) == 3


def test_a_finished_row_stays_as_it_is(make_close):
    """Round by round, beside rows that go on: committed tokens, their cache slots, its counts."""
    model, new_tokens = make_close(), (4, 30, 30)
    knobs = Knobs.make(3, 0.0, ())
    state = start(model, PROMPTS, DecodeConfig(draft_steps=3, max_new_tokens=30), knobs, longest_prompt=9)
    state = state.replace(
        limit=jnp.array([len(p) + new for p, new in zip(PROMPTS, new_tokens, strict=True)], jnp.int32)
    )
    end, seen = len(PROMPTS[0]) + 4, []
    while not bool(state.done.all()):
        state = decode_rounds(model.definition, model.decode_params, state, knobs._replace(until=state.rounds + 1))
        if bool(state.done[0]):
            caches = [np.asarray(array[0, :, : end - 1]) for array in jax.tree.leaves((state.shallow, state.deep))]
            counts = [np.asarray(x[0]) for x in (state.length, state.accept_lengths, state.drafted)]
            seen.append([np.asarray(state.tokens[0, :end]), *counts, *caches])
    assert len(seen) > 5
    assert int(state.length[0]) == end
    for later in seen[1:]:
        jax.tree.map(np.testing.assert_array_equal, later, seen[0])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], [2]], {"sampling": [SamplingConfig(), SamplingConfig(coupled=False)]}, "agree on `coupled`"),
        ([[1], [2]], {"sampling": [SamplingConfig()]}, "1 sampling settings for 2 prompts"),
        ([[1]], {"sampling": []}, "0 sampling settings for 1 prompts"),
        ([], {"sampling": SamplingConfig()}, "at least one prompt"),
        ([], {"sampling": []}, "at least one prompt"),
        ([], {}, "at least one prompt"),
        ([[1], []], {"sampling": SamplingConfig()}, "at least one token"),
        ([[1, 64]], {"sampling": SamplingConfig()}, "between 0 and 63"),
        ([[1]], {"eos_ids": tuple(range(9))}, "at most 8 end-of-sequence ids, got 9"),
        ([[1] * 200], {}, "context holds 256"),
    ],
)
def test_bad_batches(make_tiny, prompts, options, message):
    with pytest.raises(UserError, match=message) as caught:
        generate_batch(make_tiny(layers=2), prompts, DecodeConfig(draft_steps=3, max_new_tokens=64), **options)
    assert "\n" not in str(caught.value)
