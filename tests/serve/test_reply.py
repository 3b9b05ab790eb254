"""A reply on the host, without an engine."""

import threading

import pytest

from dvi_jax.errors import UserError
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.requests import Request


def test_nothing_comes_after_a_failure():
    """Another thread says it while the engine's may be giving tokens: the reader must not wait for more."""
    reply = Reply(Request((1, 2), 8), (), None, lambda: None)
    reply.take([5], done=False)
    reply.fail("process 1 is gone")
    reply.take([6], done=False)
    reply.end("cancelled")
    pieces = iter(reply)
    assert next(pieces).ids == (5,)
    with pytest.raises(UserError, match="process 1 is gone"):
        next(pieces)
    assert reply.finish_reason == "failed"


def test_nothing_comes_after_the_end():
    """A failure that is noticed at that moment is none of a whole reply's."""
    reply = Reply(Request((1, 2), 1), (), None, lambda: None)
    reply.take([5], done=True)
    reply.fail("process 1 is gone")
    assert [(piece.ids, piece.finish_reason) for piece in reply] == [((5,), "length")]
    assert reply.finish_reason == "length"


@pytest.mark.parametrize(("whole", "told"), [(True, 1), (False, 4)])
def test_who_wants_the_whole_is_told_once(monkeypatch, whole, told):
    reply = Reply(Request((1, 2), 4), (), None, lambda: None)
    notified, waits, found = [], threading.Event(), []
    wait_for, notify = reply._changed.wait_for, reply._changed.notify_all
    monkeypatch.setattr(reply._changed, "wait_for", lambda until: (waits.set(), wait_for(until)))
    monkeypatch.setattr(reply._changed, "notify_all", lambda: (notified.append(1), notify()))
    reader = threading.Thread(target=lambda: found.extend(reply.whole() if whole else reply))
    reader.start()
    assert waits.wait(10)
    for number in range(4):
        reply.take([number], done=number == 3)
    reader.join(10)
    assert [piece.ids for piece in found] == [(0,), (1,), (2,), (3,)]
    assert len(notified) == told
