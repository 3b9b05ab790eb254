"""Prompts on their way in: which chunks they go in by, and that a reply does not depend on it."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.serve import intake, prompts
from dvi_jax.serve.requests import Request
from dvi_jax.serve.slots import Shape, Terms, empty_slots
from dvi_jax.texts import decode_texts

CHUNK, SHORT = 64, 16
LENGTHS = [1, SHORT - 1, SHORT, SHORT + 1, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + SHORT]


def watched(engine):
    """Steps that the engine takes from now on, in order: of those with a chunk (rows, tokens), else their names."""
    steps = []

    def tell(step, given):
        steps.append(given[0].shape if step in ("take", "take_whole") else step)

    engine._programs.tell = tell
    return steps


def chunks(steps):
    return [step for step in steps if isinstance(step, tuple)]


def asked():
    """One of each length, greedy and sampled."""
    rng = np.random.default_rng(3)
    return [
        Request(
            prompt_ids=tuple(rng.integers(2, 258, length).tolist()),
            max_new_tokens=12,
            sampling=SamplingConfig(temperature=0.9 if index % 3 == 2 else 0.0, seed=index),
            eos_ids=(),
        )
        for index, length in enumerate(LENGTHS)
    ]


def test_short_prompts_go_in_by_short_chunks(model, make_engine, pieces_of):
    """And their replies are the prompts' own, alone and in company."""
    with make_engine(model, chunk=CHUNK) as engine:
        steps = watched(engine)
        alone = [pieces_of(engine.submit(request)) for request in asked()]
        assert chunks(steps) == [*[(1, SHORT)] * 3, *[(1, CHUNK)] * 3, *[(1, CHUNK)] * 4]
        for _ in range(2):
            handles = [engine.submit(request) for request in reversed(asked())]
            assert [pieces_of(handle) for handle in reversed(handles)] == alone
    settings = DecodeConfig(draft_steps=2, plan="chain:2", max_new_tokens=12)
    for request, (ids, *_) in zip(asked(), alone, strict=True):
        (own,), *_ = decode_texts(model, [request.prompt_ids], settings, eos_ids=(), sampling=[request.sampling])
        assert ids == own.new_ids


def test_a_drawn_first_token_is_all_that_counts(model, make_engine, pieces_of):
    """The best one was laid before it: whether the reply ends is not for that one to say."""
    with make_engine(model, chunk=CHUNK) as engine:

        def reply(**changes):
            ids, *_ = pieces_of(engine.submit(replace(asked()[0], **changes)))
            return list(ids)

        (best, *_), drawn = reply(), SamplingConfig(temperature=2.0, seed=1)
        whole = reply(sampling=drawn)
        assert whole[0] != best
        until_best = whole[: whole.index(best)] if best in whole else whole
        for _ in range(engine.status().slots):  # in every slot
            assert reply(sampling=drawn, eos_ids=(best,))[: len(until_best)] == until_best
            assert reply(sampling=drawn, eos_ids=(whole[0],)) == whole[:1]
            assert reply(sampling=drawn, max_new_tokens=1) == whole[:1]
            assert reply(sampling=drawn) == whole


@pytest.mark.parametrize("length", [SHORT - 1, CHUNK])
def test_a_prompt_taken_in_where_it_lies_is_what_chunk_and_laying_are(model, length):
    """In every bit of all slots; though the best token, which the first of the programs lays, ends the reply."""
    program, shape = (model.definition, model.decode_params), Shape(3, 128, 3, record=True)
    prompt, place = np.arange(5, 5 + length, dtype=np.int32), np.array([1], np.int32)
    tokens = np.zeros((1, CHUNK), np.int32)
    tokens[0, :length] = prompt

    def fresh():
        return empty_slots(*program, shape), prompts.empty_prompts(*program, rows=1, room=128, record=True)

    def terms(eos_ids):
        drawn = SamplingConfig(temperature=2.0, repetition_penalty=1.3, seed=4)
        return Terms.of(length, 9, eos_ids, drawn, model.config.vocab_size).packed()

    def by_two(eos_ids, sampled):
        slots, filled = fresh()
        filled = prompts.take_chunk(*program, filled, prompts.packed_chunk(tokens, np.array([length], np.int32), 0))
        placed, alone = prompts.packed_places(place, terms(eos_ids), 3)
        return prompts.lay(*program, slots, filled, placed, sampled=sampled, alone=alone)

    best, drawn = (int(by_two((), sampled).first[0, 0]) for sampled in (False, True))
    assert best != drawn
    for eos_ids in ((), (best,), (drawn,)):
        whole = prompts.packed_whole(tokens, place, terms(eos_ids))
        slots = prompts.take_whole(*program, fresh()[0], whole)
        assert int(slots.first[0, 0]) == best
        placed, _ = prompts.packed_places(place, terms(eos_ids), 3)
        slots = prompts.draw_first(*program, slots, placed)
        for one, other in zip(*map(jax.tree.leaves, (slots, by_two(eos_ids, True))), strict=True):
            np.testing.assert_array_equal(numbers(one), numbers(other))


def numbers(x):
    """Of a key those that it is made of."""
    return np.asarray(jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def test_which_chunk_a_prompt_has_does_not_depend_on_others(model, make_engine, pieces_of):
    """So prompts that go in side by side have chunks of one length."""
    with make_engine(model, chunk=CHUNK, together=3) as engine:
        steps = watched(engine)
        pieces_of(engine.submit(asked()[0]))
        assert chunks(steps) == [(3, CHUNK)]


def test_what_is_kept_of_prompts_is_whole_chunks(model, make_engine, pieces_of):
    with make_engine(model, chunk=CHUNK, prefix_bytes=10**6) as engine:
        steps, handles = watched(engine), []
        for request in [*asked()[1:3], asked()[-1], *asked()[1:3], asked()[-1]]:
            handles.append(engine.submit(request))
            pieces_of(handles[-1])
        assert [handle.statistics.cached_tokens for handle in handles] == [*[0] * 5, CHUNK]
        assert chunks(steps) == [*[(1, SHORT)] * 2, *[(1, CHUNK)] * 2, *[(1, SHORT)] * 2, (1, CHUNK)]


@pytest.mark.parametrize("length", [SHORT, CHUNK])
def test_a_prompt_of_one_chunk_is_one_program(model, make_engine, pieces_of, length):
    """Though beginnings of prompts are kept."""
    with make_engine(model, chunk=CHUNK, prefix_bytes=10**6) as engine:
        steps = watched(engine)
        pieces_of(engine.submit(Request(tuple(range(2, 2 + length)), 1)))
        assert steps == [(1, length)]


def test_a_prompt_of_one_chunk_waits_for_its_slot(model, make_engine, pieces_of):
    """A longer one is taken in meanwhile; and the replies are those that they are without waiting."""
    short, long = asked()[4], replace(asked()[-1], max_new_tokens=5)
    with make_engine(model, slots=1, chunk=CHUNK) as engine:
        alone = [pieces_of(engine.submit(request)) for request in (short, long)]
        for request, own in zip((short, long), alone, strict=True):
            steps = watched(engine)
            with engine._changed:  # so that both are there when the first turn begins
                running, waiting = engine.submit(Request((5, 6, 7), 80, eos_ids=())), engine.submit(request)
            assert len(pieces_of(running)[0]) == 80
            assert pieces_of(waiting) == own
            taken = [index for index, step in enumerate(steps) if isinstance(step, tuple)]
            if request is short:
                assert chunks(steps) == [(1, SHORT), (1, CHUNK)]
                assert steps[:2] == [(1, SHORT), "stretch"]
                assert steps[2 : taken[-1]].count("stretch") > 1
                assert "lay" not in steps
            else:
                assert chunks(steps) == [(1, SHORT), (1, CHUNK), (1, CHUNK)]
                assert "stretch" in steps[taken[-1] : steps.index("lay")]


def test_a_prompt_that_nobody_wants_any_more_is_not_taken_in(model, make_engine, pieces_of):
    with make_engine(model, slots=1, chunk=CHUNK) as engine:
        steps = watched(engine)
        remember = engine._programs.tell

        def tell(step, given):
            remember(step, given)
            if engine._scheduler._intake.holds_chunk:
                waiting.cancel()

        engine._programs.tell = tell
        with engine._changed:
            running, waiting = (engine.submit(Request((5, 6, 7), 80, eos_ids=())) for _ in range(2))
        assert len(pieces_of(running)[0]) == 80
        assert pieces_of(waiting) == ([], "", "cancelled")
    assert chunks(steps) == [(1, SHORT)]


def test_who_runs_waits_for_one_chunk_a_slot(model, make_engine, pieces_of):
    """Also where it is one that was held, and a long prompt comes next."""
    with make_engine(model, slots=2) as engine:
        steps = watched(engine)
        with engine._changed:
            sizes = [(3, 90), (3, 20), (3, 4), (20, 4)]  # of prompts and replies
            handles = [engine.submit(Request(tuple(range(2, 2 + size)), new, eos_ids=())) for size, new in sizes]
        assert [len(pieces_of(handle)[0]) for handle in handles] == [new for _, new in sizes]
    turns = " ".join("chunk" if isinstance(step, tuple) else step for step in steps).split("stretch")
    counts = [turn.count("chunk") for turn in turns]
    assert counts[0] == 2
    assert max(counts[1:]) == 1
    assert sum(counts) == 5


@pytest.mark.parametrize(
    ("backend", "devices", "rows", "chunk", "sizes"),
    [
        ("cpu", 1, 1, 128, (32, 128)),
        ("cpu", 1, 1, 64, (16, 64)),
        ("cpu", 1, 1, 63, (63,)),  # a quarter would save nothing
        ("cpu", 1, 4, 128, (128,)),
        ("cpu", 2, 1, 128, (128,)),
        ("gpu", 1, 1, 512, (64, 128, 512)),
        ("gpu", 1, 1, 256, (64, 256)),
        ("gpu", 1, 4, 512, (512,)),
        ("gpu", 4, 1, 512, (128, 512)),
        ("gpu", 4, 1, 256, (256,)),  # a quarter would be rows of a round
    ],
)
def test_how_long_chunks_may_be(monkeypatch, backend, devices, rows, chunk, sizes):
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    monkeypatch.setattr(intake, "shards", lambda mesh: mesh or 1)
    model = SimpleNamespace(definition=SimpleNamespace(mesh=devices if devices > 1 else None))
    assert intake.chunk_sizes(model, rows, chunk) == sizes
