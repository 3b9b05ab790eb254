"""Several processes that serve as one: the first one's engine decides, and the others run the programs that it runs.

Each step (`programs.py`) is told before it is begun, over a connection of its own: an exchange between devices would
wait for what they compute, and a connection that ends says at once that a process is gone.
"""

from __future__ import annotations

import base64
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import jax
import numpy as np

from dvi_jax.decode.plan import Plan
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel
from dvi_jax.processes import coordinator_host, is_first, told
from dvi_jax.serve.programs import STEPS, Programs
from dvi_jax.version import __version__

END = "end"  # told in place of a step when the engine is closed
JOIN_SECONDS = 300.0  # that others may take to connect, as jax gives them to come at all
NOTICE_SECONDS = 2.0  # within which a connection tells of a process whose devices were missed
SECRET_BYTES = 32
SILENCE = (5, 5, 3)  # of a host that may be gone: seconds until it is asked, between two questions, and how many
UNHEARD_MILLISECONDS = 20_000  # that something sent may wait to be acknowledged, while nothing is asked
SECRET_SECONDS = 5.0  # for who connects to say the secret
FOREIGN = -1  # in place of a process's number

Lost = Callable[[str], None]  # gets what is lost, in words


def require_alike(model: LoadedModel, sizes: Mapping[str, object]) -> None:
    """Raise `UserError` where this process's engine would be another one than the first's. All call it together."""
    if jax.process_count() == 1:
        return
    manifest = model.manifest
    facts = {"release of dvi_jax": __version__, "kv": model.kv, "weights": repr(manifest.quantisation)}
    facts |= {"model": manifest.base_sha256 or manifest.source, "drafter": manifest.drafter}
    facts |= {name: str(value) for name, value in sizes.items()}
    for name, first in told(lambda: facts).items():
        if facts.get(name) != first:
            raise UserError(f"{name} must be alike in all processes: {facts.get(name)} here, {first} in the first")


def join_together(on_lost: Lost) -> Leader | Follower | None:
    """This process's part in an engine of all processes, which call it together; None where there is one alone.

    `on_lost` is called in the first one, by another thread, if a process is gone before `close`.
    """
    if jax.process_count() == 1:
        return None
    if is_first():
        return Leader(on_lost)
    where = told(lambda: None)
    return Follower(where["host"], where["port"], where["secret"])


class Leader:
    """The first process: it tells the others."""

    def __init__(self, on_lost: Lost):
        self.lost: str | None = None  # what is, in words
        self._is_lost, self._on_lost, self._closed = threading.Event(), on_lost, False
        secret = secrets.token_hex(SECRET_BYTES)
        with _listening() as listener:
            place = {"host": coordinator_host(), "port": listener.getsockname()[1], "secret": secret}
            told(lambda: place)
            self._others = dict(_accepted(listener, secret, jax.process_count() - 1))
        for number, connection in self._others.items():
            threading.Thread(target=self._watch, args=(number, connection), daemon=True).start()

    def tell(self, step: str, given: tuple[Any, ...]) -> None:
        """Every other process is to take this step next."""
        frame = _frame(step, given)
        for connection in self._others.values():
            with suppress(OSError):  # `_watch` hears of it
                connection.sendall(frame)

    def looked_for(self) -> str | None:
        """`lost`, which may not be known yet when an exchange with a process fails."""
        self._is_lost.wait(NOTICE_SECONDS)
        return self.lost

    def close(self) -> None:
        """Let the others end."""
        if not self._closed:
            self._closed = True
            self.tell(END, ())
            for connection in self._others.values():
                connection.close()

    def _watch(self, number: int, connection: socket.socket) -> None:
        """Others say nothing: whatever comes, it is the end of the connection."""
        with suppress(OSError):
            connection.recv(1)
        if not self._closed:
            self.lost = f"process {number} is gone: begin all of them again"
            self._on_lost(self.lost)
            self._is_lost.set()


class Follower:
    """Another process: it does as it is told."""

    def __init__(self, host: str, port: int, secret: str):
        try:
            self._connection = socket.create_connection((host, port), timeout=JOIN_SECONDS)
            self._connection.settimeout(None)
            _keep_alive(self._connection)
            self._connection.sendall(secret.encode() + struct.pack("<i", jax.process_index()))
        except OSError as error:
            raise UserError(f"the first process cannot be reached at {host} port {port}: {error}") from error

    def follow(self, programs: Programs) -> None:
        """Take the steps that are told, up to the end. `UserError` if the first process is gone before.

        What a step gives is waited for two steps later, so that a device that fails is heard of here too.
        """
        given_before: deque[Any] = deque(maxlen=2)
        for step, given in _steps(self._connection):
            if step == END:
                return
            if step not in STEPS:
                raise UserError(f"the first process has another release: there is no step {step!r}")
            if len(given_before) == given_before.maxlen:
                jax.block_until_ready(given_before[0])
            given_before.append(getattr(programs, step)(*given))
        raise UserError("the first one is gone: begin all of them again")

    def close(self) -> None:
        self._connection.close()


def _listening() -> socket.socket:
    """At all addresses of this host, and any port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accepted(listener: socket.socket, secret: str, count: int) -> Iterator[tuple[int, socket.socket]]:
    """So many other processes, by number; who does not know the secret is none."""
    deadline = time.monotonic() + JOIN_SECONDS
    while count:
        try:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            connection, _ = listener.accept()
        except TimeoutError as error:
            raise UserError(f"{count} processes did not come within {JOIN_SECONDS:.0f} seconds") from error
        number = _number(connection, secret)
        if number == FOREIGN:
            connection.close()
            continue
        _keep_alive(connection)
        count -= 1
        yield number, connection


def _number(connection: socket.socket, secret: str) -> int:
    """Of the process at the other end, `FOREIGN` if it is none of ours."""
    with suppress(OSError):
        said = _exactly(connection, len(secret) + 4, SECRET_SECONDS)
        if said is not None and hmac.compare_digest(said[:-4], secret.encode()):
            connection.settimeout(None)
            return struct.unpack("<i", said[-4:])[0]
    return FOREIGN


def _keep_alive(connection: socket.socket) -> None:
    """Small messages at once; and a host that vanished without a word is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), SILENCE, strict=True):
        if hasattr(socket, name):  # not every system has them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNHEARD_MILLISECONDS)


def _frame(step: str, given: tuple[Any, ...]) -> bytes:
    """A step and what it is given, as bytes: a length, and JSON."""
    text = json.dumps([step, given], default=_written).encode()
    return struct.pack("<I", len(text)) + text


def _steps(connection: socket.socket) -> Iterator[tuple[str, list[Any]]]:
    """Steps as they come, until the connection ends."""
    with suppress(OSError):
        while (head := _exactly(connection, 4)) is not None:
            text = _exactly(connection, *struct.unpack("<I", head))
            if text is None:
                return
            step, given = json.loads(text, object_hook=_read)
            yield step, given


def _exactly(connection: socket.socket, count: int, seconds: float | None = None) -> bytes | None:
    """So many bytes, None if the connection ends before; `TimeoutError` if they take longer than `seconds`."""
    found, deadline = b"", None if seconds is None else time.monotonic() + seconds
    while len(found) < count:
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
        more = connection.recv(count - len(found))
        if not more:
            return None
        found += more
    return found


def _written(value: Any) -> dict[str, Any]:
    """What JSON lacks."""
    if isinstance(value, np.ndarray):
        data = base64.b64encode(value.tobytes()).decode()
        return {"array": data, "dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, Plan):
        return {"plan": str(value)}
    raise TypeError(f"a step cannot be given {value!r}")


def _read(written: dict[str, Any]) -> Any:
    """What `_written` wrote."""
    if "array" in written:
        numbers = np.frombuffer(base64.b64decode(written["array"]), np.dtype(written["dtype"]))
        return numbers.reshape(written["shape"]).copy()
    return bytes.fromhex(written["bytes"]) if "bytes" in written else Plan.parse(written["plan"])
