"""A reply on the host, without an engine."""

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
