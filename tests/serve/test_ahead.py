"""Stretches that are started before the last one is read: what is learned stays, and slots are free earlier."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from dvi_jax.serve.pace import Pace
from dvi_jax.serve.requests import Request
from dvi_jax.serve.scheduler import Scheduler
from tests.serve.traffic import random_requests


def test_a_stretch_ahead_changes_no_window(model, make_engine, pieces_of, monkeypatch):
    """What is learned from a reply was there when it ended, whatever its slot did before that was noticed.

    Nor does it matter that a slot is another's before its reply, whose length is then not known, has been read.
    """
    requests = [replace(request, sampling=None) for request in random_requests(12, seed=6)]
    requests += [replace(request, stop=(), learn=True) for request in requests[:8]]
    found = {}
    for piece in (0, 1, 8):
        windows = {}

        def keep(window, request, windows=windows):
            windows[request] = jax.device_get((window.tokens, window.length, window.features, window.proposal))

        monkeypatch.setattr("dvi_jax.serve.plans.piece_rounds", lambda *_, piece=piece: piece)
        with make_engine(model, ahead=piece > 0, on_window=keep) as engine:
            replies = [pieces_of(handle) for handle in [engine.submit(request) for request in requests]]
        assert len(windows) == len(requests)
        found[piece] = replies, windows
    assert found[0][0] == found[1][0] == found[8][0]
    for request, piece in itertools.product(requests, (1, 8)):
        left, right = found[0][1][request], found[piece][1][request]
        length = int(left[1][0])
        assert length == right[1][0] > len(request.prompt_ids)
        # Which drafts were judged depends on where rounds fell, which both have alike; behind the end nothing counts.
        for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            if one.ndim > 1:
                assert np.array_equal(one[:, :length], other[:, :length])


@pytest.mark.parametrize("changes", [{}, {"logprobs": 1}, {"stop": ("never",)}])
def test_who_must_end_makes_room_at_once(model, make_engine, pieces_of, monkeypatch, changes):
    """Of replies whose number of tokens is known the slots are others' one stretch earlier, if nothing is to be read.

    Log-probabilities are; and, where replies are learned from, how long one with stop strings is.
    """
    monkeypatch.setattr("dvi_jax.serve.plans.piece_rounds", lambda *_: 4)
    monkeypatch.setattr(Pace, "rounds", lambda self, *, hurry, least: least)
    lengths = [1 + 4 * (1 + index % 4) for index in range(48)]  # pieces of four rounds, and the prompt's own token
    requests = [Request((5, 6, 7 + index), length, eos_ids=(), **changes) for index, length in enumerate(lengths)]
    found = []
    for let_go in (lambda self: None, Scheduler._let_go):
        monkeypatch.setattr(Scheduler, "_let_go", let_go)
        with make_engine(model, plan="plain", ahead=True, logprobs=1) as engine:
            replies = [pieces_of(handle) for handle in [engine.submit(request) for request in requests]]
            assert engine.drain(10)
            found.append((replies, engine.status()))
    (late, before), (early, after) = found
    assert early == late
    assert after.rounds == before.rounds == sum(lengths) - 48
    # Most replies end while others go on: their slots wait for a piece then.
    spared = before.slot_rounds - after.slot_rounds
    assert spared > 0.7 * 4 * 48 if not changes else abs(spared) <= 4 * 4
