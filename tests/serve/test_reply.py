"""A reply on the host, without an engine."""

import threading

import pytest

from dvi_jax.errors import UserError
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.requests import ReplyPiece, Request, TokenLogprob


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
    reader = threading.Thread(target=lambda: found.extend([reply.whole()] if whole else reply))
    reader.start()
    assert waits.wait(10)
    for number in range(4):
        reply.take([number], done=number == 3)
    reader.join(10)
    assert [token for piece in found for token in piece.ids] == [0, 1, 2, 3]
    assert len(notified) == told


def test_what_has_come_since_is_one_piece():
    """Of a reader that comes late, the text is made once, and it has the end and the log-probabilities of all."""
    made = []

    class Text:
        def add(self, ids, *, last):
            made.append((tuple(ids), last))
            return len(ids), "".join(map(str, ids))

    reply = Reply(Request((1, 2), 5, logprobs=0), (4,), Text(), lambda: None)
    logprobs = [TokenLogprob(token, -0.5 * token, ()) for token in range(5)]
    reply.take([0], done=False, logprobs=(logprobs[0],))
    reply.take([1, 2], done=False, logprobs=(logprobs[1], logprobs[2]))
    pieces = iter(reply)
    assert next(pieces) == ReplyPiece((0, 1, 2), "012", None, tuple(logprobs[:3]))
    reply.take([3], done=False, logprobs=(logprobs[3],))
    reply.take([4], done=True, logprobs=(logprobs[4],))
    assert list(pieces) == [ReplyPiece((3, 4), "34", "eos", tuple(logprobs[3:]))]
    assert made == [((0, 1, 2), False), ((3, 4), True)]


def test_the_whole_is_one_piece_whenever_it_is_read():
    reply = Reply(Request((1, 2), 3), (), None, lambda: None)
    reply.take([7], done=False)
    reply.take([8, 9], done=True)
    assert reply.whole() == ReplyPiece((7, 8, 9), "", "length", None)
