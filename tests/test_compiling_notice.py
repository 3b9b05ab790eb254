"""Whoever compiles for long is told of once, whatever is compiled beside it."""

import threading
import time

import pytest

from dvi_jax import compiling
from tests.serve.server.live import until


@pytest.fixture
def told(monkeypatch):
    found = []
    monkeypatch.setattr(compiling, "PATIENCE", 0.2)
    monkeypatch.setattr(compiling, "notice", found.append)
    return found


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_what_is_ready_beside_it_does_not_silence_it(told):
    """As where several are compiled at once: one takes long, the next is found on disk, another is quick."""
    notice = compiling.CompilingNotice()
    notice.on_event(compiling._REQUESTED)
    in_a_thread(lambda: (notice.on_event(compiling._REQUESTED), notice.on_event(compiling._FOUND)))
    in_a_thread(lambda: (notice.on_event(compiling._REQUESTED), notice.on_duration(compiling._COMPILED, 0.01)))
    until(lambda: told)
    in_a_thread(lambda: notice.on_event(compiling._REQUESTED))
    time.sleep(0.5)
    assert len(told) == 1


def test_quick_ones_side_by_side_are_not_told_of(told):
    notice, both = compiling.CompilingNotice(), threading.Barrier(2)

    def compiles():
        both.wait()
        notice.on_event(compiling._REQUESTED)
        both.wait()
        notice.on_duration(compiling._COMPILED, 0.01)

    threads = [threading.Thread(target=compiles) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.5)
    assert told == []
