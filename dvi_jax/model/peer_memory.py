"""Parts of sums, from device to device through peer memory: a decoding round's exchanges on GPUs of one process.

A round exchanges a few kilobytes twice a layer, and a message by NCCL takes longer than the products beside it. Here
one small kernel, in Pallas for Mosaic GPU, writes a device's parts into the memory of the others and waits for theirs.

An inbox is new in every pass, and a pass's first exchange begins with a barrier of all devices of the mesh, which
therefore must make the same passes. `peer_kernel.py` has the protocol.

Letters: n devices along `model`, P parts, R rows, D hidden, U units: two numbers that travel together with their flags.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import jax
import jax.numpy as jnp

from dvi_jax.mesh import MODEL
from dvi_jax.model.products import compute_capability

WITH_PEERS = (9, 10)  # major compute capabilities of Hopper and of data centres' Blackwell; GeForce has no peer memory
THREADS = 128  # of a program: a warpgroup
MOST_PROGRAMS = 512  # which a large GPU runs side by side
MOST_UNITS = 8  # of a thread, whose loads are under way at once


@dataclass(frozen=True)
class Inbox:
    """Where the parts of a pass arrive, and how many exchanges there were."""

    units: jax.Array  # int32 [2, n, U, 4]: slots; by sender; two numbers, each before its flag
    exchanges: int = 0  # known to whoever traces the pass


def is_available() -> bool:
    """Whether GPUs can exchange so: those of one process, NVIDIA's Hopper or data centres' Blackwell, with jax 0.11."""
    capability = compute_capability()
    has_peers = bool(capability) and capability[0] in WITH_PEERS
    return has_peers and jax.process_count() == 1 and bool(_kernel().is_there())


def takes(parts: int, rows: int, size: int) -> bool:
    """Whether an exchange of [parts, rows, size] numbers of each device is small enough for one kernel."""
    return parts * rows * size // 2 <= MOST_PROGRAMS * THREADS * MOST_UNITS


def new_inbox(parts: int, rows: int, size: int) -> Inbox:
    """For a pass whose exchanges have up to [parts, rows, size] numbers of each device; inside `shard_map`."""
    return Inbox(jnp.zeros((2, jax.lax.axis_size(MODEL), parts * rows * size // 2, 4), jnp.int32))


def joined_parts(parts: jax.Array, rows: int, inbox: Inbox) -> tuple[jax.Array, Inbox]:
    """`exchange.joined_parts` of the first `rows` rows of `parts` float32 [P, R, D]: [n * P, rows, D], same bits."""
    assert len(parts) * rows * parts.shape[2] // 2 <= inbox.units.shape[2], "more than the inbox was made for"
    number = jnp.full((1,), inbox.exchanges + 1, jnp.int32)
    whole, units = _kernel().exchange(parts, inbox.units, number, rows=rows, is_first=inbox.exchanges == 0)
    return whole, replace(inbox, units=units, exchanges=inbox.exchanges + 1)


def _kernel() -> ModuleType:
    """The module of the kernel, which takes a while to import and which only GPUs need."""
    from dvi_jax.model import peer_kernel

    return peer_kernel
