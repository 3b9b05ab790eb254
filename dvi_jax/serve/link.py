"""Messages between the two processes of a server, over a pair of sockets that nobody else has an end of."""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
import threading
from typing import Any

LENGTH = struct.Struct("!Q")  # before each message, of its bytes


class Link:
    """One end. A message is a tuple: what it is about, and what it says of that."""

    def __init__(self, end: socket.socket):
        self._socket, self._reader = end, end.makefile("rb")
        self._lock = threading.Lock()  # of who sends

    @classmethod
    def pair(cls) -> tuple[Link, socket.socket]:
        """An end, and the other one, to be handed on."""
        here, there = socket.socketpair()
        return cls(here), there

    def send(self, *message: Any) -> None:
        """Waits until it is on its way; for any thread. Nothing where the other end is gone: `receive` says so."""
        packed = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._socket.sendall(LENGTH.pack(len(packed)) + packed)

    def receive(self) -> tuple[Any, ...] | None:
        """The next message, waited for, by one thread; None once the other end is gone."""
        try:
            (length,) = LENGTH.unpack(self._read(LENGTH.size))
            return tuple(pickle.loads(self._read(length)))  # what comes here is our own process's
        except (OSError, ValueError, EOFError):
            return None

    def close(self) -> None:
        """The other end hears of it; a `receive` that waits ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, count: int) -> bytes:
        found = self._reader.read(count)
        if len(found) < count:
            raise EOFError
        return found
