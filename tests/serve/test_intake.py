"""Prompts on their way in: which chunks they go in by, and that a reply does not depend on it."""

from types import SimpleNamespace

import numpy as np
import pytest

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.serve import intake, programs
from dvi_jax.serve.requests import Request
from dvi_jax.texts import decode_texts

CHUNK, SHORT = 64, 16
LENGTHS = [1, SHORT - 1, SHORT, SHORT + 1, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + SHORT]


@pytest.fixture
def chunks(monkeypatch):
    """Tokens and rows of every chunk that the device is given."""
    found, packed_chunk = [], programs.packed_chunk

    def counted(tokens, *arguments):
        found.append(tokens.shape)
        return packed_chunk(tokens, *arguments)

    monkeypatch.setattr(programs, "packed_chunk", counted)
    return found


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


def test_short_prompts_go_in_by_short_chunks(model, make_engine, pieces_of, chunks):
    """And their replies are the prompts' own, alone and in company."""
    with make_engine(model, chunk=CHUNK) as engine:
        chunks.clear()
        alone = []
        for request in asked():
            alone.append(pieces_of(engine.submit(request)))
        assert chunks == [*[(1, SHORT)] * 3, *[(1, CHUNK)] * 3, *[(1, CHUNK)] * 4]
        for _ in range(2):
            handles = [engine.submit(request) for request in reversed(asked())]
            assert [pieces_of(handle) for handle in reversed(handles)] == alone
    settings = DecodeConfig(draft_steps=2, plan="chain:2", max_new_tokens=12)
    for request, (ids, *_) in zip(asked(), alone, strict=True):
        (own,), *_ = decode_texts(model, [request.prompt_ids], settings, eos_ids=(), sampling=[request.sampling])
        assert ids == own.new_ids


def test_which_chunk_a_prompt_has_does_not_depend_on_others(model, make_engine, pieces_of, chunks):
    """So prompts that go in side by side have chunks of one length."""
    with make_engine(model, chunk=CHUNK, together=3) as engine:
        chunks.clear()
        pieces_of(engine.submit(asked()[0]))
        assert chunks == [(3, CHUNK)]


def test_what_is_kept_of_prompts_is_whole_chunks(model, make_engine, pieces_of, chunks):
    with make_engine(model, chunk=CHUNK, prefix_bytes=10**6) as engine:
        chunks.clear()
        handles = []
        for request in [*asked()[1:3], asked()[-1], *asked()[1:3], asked()[-1]]:
            handles.append(engine.submit(request))
            pieces_of(handles[-1])
        assert [handle.statistics.cached_tokens for handle in handles] == [*[0] * 5, CHUNK]
        assert chunks == [*[(1, SHORT)] * 2, *[(1, CHUNK)] * 2, *[(1, SHORT)] * 2, (1, CHUNK)]


@pytest.mark.parametrize(
    ("backend", "devices", "rows", "chunk", "short"),
    [
        ("cpu", 1, 1, 128, 32),
        ("cpu", 1, 1, 64, 16),
        ("cpu", 1, 1, 63, 0),  # would save nothing
        ("cpu", 1, 4, 128, 0),
        ("cpu", 2, 1, 128, 0),
        ("gpu", 1, 1, 512, 128),
        ("gpu", 1, 1, 128, 0),  # would be rows of a round
        ("gpu", 4, 1, 512, 128),
    ],
)
def test_where_there_are_short_chunks(monkeypatch, backend, devices, rows, chunk, short):
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    monkeypatch.setattr(intake, "shards", lambda mesh: mesh)
    model = SimpleNamespace(definition=SimpleNamespace(mesh=devices))
    assert intake.short_tokens(model, rows, chunk) == short
