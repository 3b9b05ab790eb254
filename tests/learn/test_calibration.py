"""Calibrated confidences: the error by hand, temperatures found again, and what decoding makes of them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.checkpoint import Manifest
from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.errors import UserError
from dvi_jax.learn.calibration import (
    GRID,
    Judged,
    _lowest,
    error_by_chance,
    error_interval,
    expected_calibration_error,
    fit_temperatures,
    judge,
)
from dvi_jax.learn.packing import Packed
from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import join, split

PROMPTS = [[5, 9, 2], [7, 7, 1, 30, 4]]
SETTINGS = DecodeConfig(draft_steps=2, plan="early-exit:2", max_new_tokens=24)


@pytest.fixture(scope="module")
def model(make_tiny) -> LoadedModel:
    return make_tiny(layers=4)


@pytest.fixture(scope="module")
def text(model) -> Packed:
    """The model's own replies, as `experiments.calibration` packs them."""
    found, _ = generate_batch(model, PROMPTS, SETTINGS, plain=True, eos_ids=())
    tokens, mask = np.zeros((2, 32), np.int32), np.zeros((2, 32), bool)
    for row, (prompt, reply) in enumerate(zip(PROMPTS, found, strict=True)):
        length = len(reply.output_ids)
        tokens[row, :length], mask[row, len(prompt) : length] = reply.output_ids, True
    return Packed(tokens, mask)


def test_the_error_by_hand():
    """Bins of a fifteenth: 0.5 and 0.52 share one, half of it right; 0.9 is right; 1.0 is in the last, and wrong."""
    confidence, right = np.array([0.5, 0.52, 0.9, 1.0]), np.array([True, False, True, False])
    by_hand = abs(0.5 - 0.51) * 2 / 4 + abs(1 - 0.9) / 4 + abs(0 - 1) / 4
    assert expected_calibration_error(confidence, right) == pytest.approx(by_hand)
    assert expected_calibration_error(np.array([]), np.array([], bool)) == 0


def test_what_chance_alone_makes():
    """Against drafts that are drawn: right just as often as they say, and all of them independent."""
    rng = np.random.default_rng(0)
    confidence = rng.beta(2, 1, 900)
    drawn = [expected_calibration_error(confidence, rng.random(900) < confidence) for _ in range(400)]
    assert error_by_chance(confidence) == pytest.approx(np.mean(drawn), rel=0.03)


def test_an_interval_takes_rows_as_they_come():
    """Drafts that are right row by row say less than as many that are so each by itself."""
    confidence, row = np.full(1600, 0.5), np.repeat(np.arange(40), 40)
    alone = np.arange(1600) % 2 == 0
    together = row % 2 == 0
    assert error_interval(confidence, alone, row) == (0, 0)  # every row has its share
    _, high = error_interval(confidence, together, row)
    # 2.5% of the means of 40 fair coins are further than 2.24 standard errors from a half.
    assert high == pytest.approx(2.24 * 0.5 / np.sqrt(40), rel=0.15)


@pytest.mark.parametrize("true", [0.5, 0.8, 1.7])
def test_the_temperature_is_found_again(true):
    """Two tokens, right as often as their logits say at a temperature that is on no grid."""
    rng = np.random.default_rng(0)
    logits = rng.uniform(0.0, 5.0, 40000)
    right = rng.random(40000) < 1 / (1 + np.exp(-logits / true))
    confidence = 1 / (1 + np.exp(-logits[:, None] / GRID))
    assert _lowest(Judged(confidence, right, np.zeros(40000, int))) == pytest.approx(true, rel=0.06)


def test_drafts_are_judged_where_decoding_judges_them(model, text):
    """Of the exit head all drafts are alike, so one is told apart: right where its first choice is the text's token."""
    (judged,) = judge(model, text, 1, np.array([1.0, 2.0]), 2)
    drafter = join(model.definition, model.params)

    @jax.jit
    def logits(tokens):
        positions = jnp.broadcast_to(jnp.arange(32), (2, 32))
        hidden = drafter.llama.shallow(tokens, None, positions)[0]
        return drafter.drafter.logits(drafter.drafter.unroll(hidden, None, positions, 1)[0], drafter.draft_head())

    found = np.asarray(logits(jnp.asarray(text.tokens)))
    rows = [(b, t - 1) for b, t in np.argwhere(text.mask)]
    right = [int(found[b, t].argmax()) == int(text.tokens[b, t + 1]) for b, t in rows]
    assert judged.right.tolist() == right
    assert judged.row.tolist() == [b for b, _ in rows]
    for column, temperature in enumerate((1.0, 2.0)):
        p = np.exp(found / temperature) / np.exp(found / temperature).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(judged.confidence[:, column], [p[b, t].max() for b, t in rows], rtol=1e-4)


def test_later_drafts_count_where_those_before_were_right(make_tiny, text):
    """A block's draft 1 is judged one token after each draft 0 that was right, if that token is learned from."""
    tiny = make_tiny(layers=4)
    base = random_base(tiny.config, jax.random.key(0), std=0.3)
    manifest = replace(tiny.manifest, drafter="medusa", drafter_config={"heads": 2}, exit_layer=0)
    medusa = LoadedModel(tiny.config, manifest, *split(build_model(tiny.config, manifest, base)))
    first, second = judge(medusa, text, 2, np.array([1.0]), 2)
    known = np.pad(text.mask[:, 1:], ((0, 0), (0, 1)))
    right = np.zeros(known.shape, bool)
    right[known] = first.right
    assert len(second.right) == (right[:, :-1] & known[:, 1:]).sum()


def test_confidence_moves_and_no_token_does(model, text):
    """With temperatures the threshold cuts elsewhere; replies are the same."""
    (temperature,) = fit_temperatures(model, text, 1, 2)
    assert temperature > 0
    cut = replace(SETTINGS, threshold=0.5)
    plain, _ = generate_batch(model, PROMPTS, cut, eos_ids=())
    drafted = []
    for wanted in (0.05, 20.0):  # sure of everything, of nothing
        module = join(model.definition, model.params)
        module.calibrate([wanted])
        definition, params = split(module)
        found, _ = generate_batch(replace(model, definition=definition, params=params), PROMPTS, cut, eos_ids=())
        assert [row.output_ids for row in found] == [row.output_ids for row in plain]
        drafted.append(sum(sum(row.drafted) / row.rounds for row in found) / 2)
    assert drafted[0] > 1.5
    assert drafted[1] == pytest.approx(1.0, abs=0.05)


def test_what_is_no_temperature():
    common = {"source": "", "source_sha256": "", "dtype": "float32", "exit_layer": 1}
    assert Manifest(**common, calibration=(0.8, 1.1)).calibration == (0.8, 1.1)
    with pytest.raises(UserError, match=r"MANIFEST.json: calibration .* from 0.01 to 100"):
        Manifest(**common, calibration=(0.8, 0.0))
