"""When a round's parts go through peer memory; the kernel itself needs GPUs (`experiments.scaling` and its bits)."""

import jax
import jax.numpy as jnp
import pytest

from dvi_jax.config import MeshConfig
from dvi_jax.mesh import WHOLE, make_mesh, run_sharded
from dvi_jax.model import exchange, peer_memory


def inbox(mesh, *numbers):
    """The shape of an inbox on each device of a mesh, None where there is none."""
    found = []

    def look(x):
        found.append(exchange.inbox_for(*numbers))
        return x

    jax.eval_shape(run_sharded(make_mesh(MeshConfig.parse(mesh)), look, (WHOLE,), WHOLE), jnp.ones(()))
    return None if found[0] is None else found[0].units.shape


def test_an_inbox_holds_two_exchanges_of_every_device(monkeypatch):
    """Two numbers and two flags in each unit."""
    monkeypatch.setattr(peer_memory, "is_available", lambda: True)
    assert inbox("model=2", 2, 5, 64) == (2, 2, 2 * 5 * 64 // 2, 4)
    assert inbox("model=4", 1, 1, 64) == (2, 4, 32, 4)


@pytest.mark.parametrize(
    ("mesh", "numbers"),
    [
        ("data=2,model=2", (2, 5, 64)),  # a device may have ended while others go on
        ("model=2", (4, 256, 4096)),  # more than threads that run side by side take
    ],
)
def test_where_peer_memory_does_not_serve(monkeypatch, mesh, numbers):
    monkeypatch.setattr(peer_memory, "is_available", lambda: True)
    assert inbox(mesh, *numbers) is None


def test_a_cpu_has_no_peer_memory():
    assert inbox("model=2", 2, 5, 64) is None


def test_kernels_are_loaded_without_an_exchange(monkeypatch):
    monkeypatch.setattr(peer_memory, "is_available", lambda: True)
    with exchange.each_alone():
        assert inbox("model=2", 2, 5, 64) is None


def test_an_exchange_larger_than_its_inbox_is_not_made():
    """It would write into memory of others."""
    small = peer_memory.Inbox(jnp.zeros((2, 2, 32, 4), jnp.int32))
    with pytest.raises(AssertionError, match="more than the inbox was made for"):
        peer_memory.joined_parts(jnp.zeros((2, 16, 64)), 1, small)
