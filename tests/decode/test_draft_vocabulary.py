"""Drafting from a part of the vocabulary: proposals stay inside, output stays the verifier's.

Greedily: tests/contract/test_contract.py.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.decode.batch import generate_batch, make_knobs, make_sampling, read_generations, start
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.errors import UserError
from dvi_jax.loading import with_draft_vocabulary

SETTINGS, PROMPTS = DecodeConfig(draft_steps=3, max_new_tokens=40), [[5, 9, 2], [7, 7, 1]]
SAMPLING = SamplingConfig(temperature=3.0, repetition_penalty=1.1)


def restricted(model, ids, tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    return with_draft_vocabulary(model, tmp_path / "ids.json")


def test_the_whole_vocabulary_changes_nothing(make_tiny, tmp_path):
    model = make_tiny(layers=2)
    every = restricted(model, list(range(64)), tmp_path)
    assert generate_batch(every, PROMPTS, SETTINGS)[0] == generate_batch(model, PROMPTS, SETTINGS)[0]


def test_ids_stay_integers_in_bfloat16(make_tiny, tmp_path):
    """Casting the parameters for decoding must leave token ids alone: 257 is no bfloat16 number."""
    model = restricted(make_tiny("bfloat16", layers=2), [1, 5, 63], tmp_path)
    ids = model.decode_params.base["draft_vocabulary"]["ids"]
    assert ids.dtype == jnp.int32


@pytest.mark.parametrize("ids", [[], [64], [-1, 3], "no", [1.5]])
def test_bad_vocabularies(make_tiny, tmp_path, ids):
    with pytest.raises(UserError, match="token ids"):
        restricted(make_tiny(layers=2), ids, tmp_path)


def test_sampled_drafts_stay_inside(make_close, run_rows, tmp_path):
    """At temperature 3 anything is drawn: drafts from a third of the vocabulary, ids as sampled from all of it."""
    model, prompts = make_close(), [[5, 9, 2], [40] * 9, [7]]
    few, settings = restricted(model, list(range(0, 64, 3)), tmp_path), DecodeConfig(draft_steps=3, max_new_tokens=30)
    knobs = make_knobs(settings, ())
    state = start(few, prompts, settings, knobs, sampling=make_sampling(few, prompts, SAMPLING), record=True)
    state = decode_rounds(few.definition, few.decode_params, state, knobs)
    proposals = np.asarray(state.signals.proposal)
    proposals = proposals[proposals >= 0]
    assert len(set(proposals.tolist())) > 10
    assert not (proposals % 3).any()
    ids = [row.new_ids for row in read_generations(state, [3, 9, 1], ())]
    assert any(token % 3 for row in ids for token in row)
    assert ids == [row.new_ids for row in run_rows(model, prompts, SAMPLING, draft_steps=0)]
