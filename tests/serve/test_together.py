"""What the first of several processes tells: it arrives as it was said, and nobody else is listened to."""

import socket
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dvi_jax.decode.plan import Plan
from dvi_jax.errors import UserError
from dvi_jax.serve import together

SECRET = "s" * 64


class Noted:
    """In place of an engine's programs: what it was asked for."""

    def __init__(self):
        self.found = []

    def __getattr__(self, step):
        return lambda *given: self.found.append((step, given))


@pytest.fixture
def pair(monkeypatch):
    """The two ends, each joined in a thread as its process would, and what the first one says is lost."""
    place, ready, lost = {}, threading.Event(), []

    def told(make):
        if threading.current_thread().name == "leads":
            place.update(make())
            ready.set()
        assert ready.wait(10)
        return place

    monkeypatch.setattr(together, "told", told)
    monkeypatch.setattr(together, "coordinator_host", lambda: "127.0.0.1")
    processes = {"process_count": lambda: 2, "process_index": lambda: 1, "block_until_ready": lambda found: None}
    monkeypatch.setattr(together, "jax", SimpleNamespace(**processes))
    monkeypatch.setattr(together, "is_first", lambda: threading.current_thread().name == "leads")
    ends = {}

    def join():
        ends[threading.current_thread().name] = together.join_together(lost.append)

    threads = [threading.Thread(target=join, name=name) for name in ("leads", "follows")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    yield ends["leads"], ends["follows"], lost
    ends["leads"].close()
    ends["follows"].close()


def test_steps_arrive_as_they_were_told(pair):
    leader, follower, lost = pair
    programs, numbers = Noted(), np.array([[1, -2], [2**31 - 1, 0]], np.int32)
    leader.tell("take", (numbers, np.array([True, False]), 7))
    leader.tell("lay_back", (b"\x00\xff", b""))
    leader.tell("stretch", (16, Plan.parse("tree:8x3"), True, False))
    leader.close()
    follower.follow(programs)
    (take, (tokens, marks, position)), *others = programs.found
    assert (take, position, tokens.dtype, marks.dtype) == ("take", 7, np.int32, np.bool_)
    np.testing.assert_array_equal(tokens, numbers)
    np.testing.assert_array_equal(marks, [True, False])
    assert others == [("lay_back", (b"\x00\xff", b"")), ("stretch", (16, Plan.parse("tree:8x3"), True, False))]
    assert lost == []


def test_what_is_no_step_is_not_run(pair):
    leader, follower, _ = pair
    programs = Noted()
    leader.tell("__init__", ())
    with pytest.raises(UserError, match="another release: there is no step '__init__'"):
        follower.follow(programs)
    assert programs.found == []


def test_either_hears_that_the_other_is_gone(pair):
    leader, follower, lost = pair
    follower.close()
    assert leader.looked_for() == "process 1 is gone: begin all of them again"
    assert lost == [leader.lost]


def test_a_first_process_that_ends_without_a_word(pair):
    leader, follower, _ = pair
    for connection in leader._others.values():
        connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(UserError, match="the first one is gone: begin all of them again"):
        follower.follow(Noted())


def test_another_engine_than_the_first_ones_is_not_begun(monkeypatch, model):
    """Its programs would have other shapes, or its replies be of two models."""
    first = {}
    monkeypatch.setattr(together, "told", lambda make: first or first.update(make()) or first)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    together.require_alike(model, {"slots": 4})
    together.require_alike(model, {"slots": 4})
    with pytest.raises(UserError, match="slots must be alike in all processes: 8 here, 4 in the first"):
        together.require_alike(model, {"slots": 8})
    with pytest.raises(UserError, match="kv must be alike in all processes: int8 here, dtype in the first"):
        together.require_alike(model.with_kv("int8"), {"slots": 4})


def test_a_stranger_who_dawdles_holds_up_nobody_for_long(monkeypatch):
    monkeypatch.setattr(together, "SECRET_SECONDS", 0.05)
    ours, stranger = socket.socketpair()
    with ours, stranger:
        stranger.sendall(b"s" * 10)
        assert together._number(ours, SECRET) == together.FOREIGN


def test_who_does_not_know_the_secret_is_none_of_them():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address) as stranger, socket.create_connection(address) as ours:
            stranger.sendall(b"x" * 64 + (1).to_bytes(4, "little"))
            ours.sendall(b"s" * 64 + (3).to_bytes(4, "little"))
            ((number, connection),) = together._accepted(listener, SECRET, 1)
            assert stranger.recv(1) == b""  # closed
            connection.close()
    assert number == 3
