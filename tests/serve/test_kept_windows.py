"""Which windows of replies are kept, and that nobody waits while the device is given an update of them."""

import threading
from dataclasses import replace

import jax
import numpy as np
import pytest

from dvi_jax.serve import candidate as candidate_module
from dvi_jax.serve import learner as learner_module
from dvi_jax.serve import learning
from dvi_jax.serve.ended import take_window
from tests.serve.server.live import until
from tests.serve.traffic import SETTINGS, requests, serve, turned


def counted_keeps(monkeypatch, length_of=lambda length: length):
    """A list that grows by the length of each window that is kept, as the host is told; `length_of` may change it."""
    lengths, keep = [], candidate_module.keep

    def noted(*given, **named):
        replay, length = keep(*given, **named)
        lengths.append(length_of(length))
        return replay, lengths[-1]

    monkeypatch.setattr(candidate_module, "keep", noted)
    return lengths


def take_all(learner, some_ended, length):
    """Six replies of so many tokens."""
    for ended in some_ended:
        learner.take(ended._replace(place=np.array([0, 1, length], np.int32)), requests()[0])


# Two fresh windows, and a quarter of 64 positions.
@pytest.mark.parametrize(("length", "needed"), [(62, 2), (8, 2), (7, 3), (5, 4), (3, 6)])
def test_windows_are_kept_that_the_next_update_can_use(make_learner, some_ended, monkeypatch, length, needed):
    learner, kept = make_learner(), counted_keeps(monkeypatch)
    for updates in range(4):
        take_all(learner, some_ended, length)
        take_all(learner, some_ended, length)
        assert len(kept) == (updates + 1) * needed
        assert learner.status.windows == len(kept)
        until(lambda: learner._candidate.has_enough() and learner.has_work())
        turned(learner)  # looks at one update, and begins another
        assert learner._candidate.is_updating
        assert learner.status.updates == updates
        until(lambda: learner._candidate.has_updated)


def test_giving_the_device_an_update_keeps_nobody_waiting(make_learner, some_ended, monkeypatch):
    """Another thread does it; until it has, the windows that it gives are left alone."""
    learner, kept = make_learner(), counted_keeps(monkeypatch)
    go_on, update = threading.Event(), candidate_module.update

    def slow(*given, **named):
        assert go_on.wait(30)
        return update(*given, **named)

    monkeypatch.setattr(candidate_module, "update", slow)
    take_all(learner, some_ended, 62)
    until(learner.has_work)
    turned(learner)
    assert learner._candidate.is_updating
    for _ in range(3):
        take_all(learner, some_ended, 62)
        turned(learner)
    assert (learner.status.updates, learner.has_work(), len(kept)) == (0, False, 2)
    go_on.set()
    until(lambda: learner._candidate.has_updated)
    take_all(learner, some_ended, 62)
    turned(learner)
    assert (learner.status.updates, len(kept)) == (1, 4)


def test_replies_too_short_for_an_update_are_all_kept(make_learner, some_ended, monkeypatch):
    learner, kept = make_learner(), counted_keeps(monkeypatch)
    take_all(learner, some_ended, 2)
    assert len(kept) == 6  # and make 12 of 16 positions
    take_all(learner, some_ended, 2)
    assert len(kept) == 8


class OnItsWay:
    """A length that the device has yet to come to."""

    there, value = False, 0

    def copy_to_host_async(self):
        pass

    def is_ready(self):
        return self.there

    def __array__(self, *_, **__):
        assert self.there
        return np.array(self.value)


def test_replies_that_end_together_are_not_all_kept(make_learner, some_ended, monkeypatch):
    """Though their lengths are on their way; if windows turn out to be empty, others take their place."""
    learner, length = make_learner(), OnItsWay()
    kept = counted_keeps(monkeypatch, lambda _: length)
    take_all(learner, some_ended, 5)
    assert len(kept) == 4
    length.there = True
    take_all(learner, some_ended, 5)
    assert len(kept) == 4 + 6
    assert not learner.has_work()
    length.value = 5
    take_all(learner, some_ended, 5)
    assert len(kept) == 4 + 6 + 4
    assert learner.has_work()


def test_an_engine_keeps_windows_as_updates_need_them(model, make_engine, make_learner, pieces_of, monkeypatch):
    """Of sixty replies two for each update; the share, of which keeping takes nothing here, allows one, and idleness
    another.
    """
    monkeypatch.setattr(learner_module, "MOST_KEEPING", 0.0)
    learner, kept, begun = make_learner(settings=replace(SETTINGS, share=1e-6)), counted_keeps(monkeypatch), []
    begin = learner._candidate.begin_update

    def counted(*given, **named):
        begun.append(given)
        begin(*given, **named)

    monkeypatch.setattr(learner._candidate, "begin_update", counted)
    with make_engine(model, learner=learner) as engine:
        serve(engine, 10 * requests(), pieces_of)
        until(lambda: learner.status.updates >= 2)
    assert len(kept) == learner.status.windows
    assert len(begun) <= len(kept) <= 2 * (len(begun) + 1) < 60


def test_a_long_reply_is_cut_to_its_newest_positions(make_learner, some_ended):
    """All of a window's rows still belong to the positions that they predict."""
    learner, ended = make_learner(), some_ended[0]._replace(place=np.array([0, 5, 83], np.int32))
    learner.take(ended, requests()[0])
    window = jax.device_get(take_window(ended))
    kept = jax.device_get(learning.newest(learner._candidate.replay, 2))
    assert (kept.length.tolist(), kept.prompt_length.tolist()) == ([64, 0], [0, 0])
    for short, long in zip(jax.tree.leaves(kept), jax.tree.leaves(window), strict=True):
        assert short.ndim == 1 or np.array_equal(short[0], long[0, 19:83])


def test_a_context_beyond_the_models_is_the_models(new_model, some_ended):
    """As in an engine: a slot has 128 positions here, and a window cannot have more."""
    model = replace(new_model, config=replace(new_model.config, max_position_embeddings=128))
    learner = learner_module.Learner(model, replace(SETTINGS, window=256), 2048)
    learner.take(some_ended[0], requests()[0])
    kept = learning.newest(learner._candidate.replay, 1)
    assert kept.tokens.shape == (1, 128)
    assert kept.length.tolist() == [62]
