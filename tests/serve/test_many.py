"""Many prompts through one engine: what comes back is each prompt's own generation, in order."""

import itertools

import numpy as np
import pytest

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.errors import UserError
from dvi_jax.serve.many import decode_many, open_engine
from dvi_jax.serve.requests import Request
from dvi_jax.texts import decode_texts


@pytest.fixture(scope="module")
def engine(model):
    """16 slots, prompts taken in by pairs, in one or two chunks."""
    with open_engine(model, slots=16, context=60, longest_prompt=16, plan="chain:2") as engine:
        assert engine.memory.shape.slots == 16
        yield engine


def requests(count):
    rng = np.random.default_rng(0)
    for index in range(count):
        prompt = tuple(rng.integers(2, 258, rng.integers(1, 17)).tolist())
        sampling = SamplingConfig(temperature=0.9 if index % 3 == 0 else 0.0, seed=index)
        stop = tuple(map(chr, rng.integers(33, 127, rng.integers(1, 9))))
        yield Request(prompt, int(rng.integers(1, 40)), sampling, (7, index % 258), stop)


def test_each_is_the_prompts_own_generation(model, engine):
    """Decoded alone: ids, texts, and which drafts of which round were right."""
    asked = list(requests(30))
    found = list(decode_many(engine, asked))
    assert len(found) == len(asked)
    for request, (generation, text, statistics) in zip(asked, found, strict=True):
        settings = DecodeConfig(draft_steps=2, plan="chain:2", max_new_tokens=request.max_new_tokens)
        (alone,), (words,), _ = decode_texts(
            model,
            [request.prompt_ids],
            settings,
            eos_ids=request.eos_ids,
            sampling=[request.sampling],
            stop=request.stop,
        )
        assert (generation, text) == (alone, words)
        assert statistics.new_tokens == len(alone.new_ids)
    assert {generation.finish_reason for generation, *_ in found} == {"eos", "length", "stop"}
    assert any(length > 1 for generation, *_ in found for length in generation.accept_lengths)


def test_requests_are_drawn_as_they_can_be_taken(engine):
    endless = (Request((5, 6, index % 200), 3, eos_ids=()) for index in itertools.count())
    replies = [generation.output_ids for generation, *_ in itertools.islice(decode_many(engine, endless), 300)]
    assert [ids[:3] for ids in replies] == [[5, 6, index % 200] for index in range(300)]
    assert next(endless).prompt_ids[2] > 0


def test_one_that_cannot_be_served_is_named(engine):
    with pytest.raises(UserError, match="the engine's context holds 60"):
        list(decode_many(engine, [Request((5,), 4), Request((5,), 60)]))
