"""An engine's memory is counted to the byte before it is taken, and refused with the numbers."""

import gc

import jax
import pytest

from dvi_jax.errors import UserError
from dvi_jax.serve import engine as engine_module
from dvi_jax.serve.memory import check_engine_memory, engine_memory
from dvi_jax.serve.slots import TERM_COLUMNS, Shape
from tests.serve.conftest import SHAPE


def live_bytes():
    gc.collect()  # engines of other tests
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("record", [False, True])
def test_counted_to_the_byte(model, make_engine, monkeypatch, tmp_path, record):
    monkeypatch.setenv("DVI_JAX_CACHE", str(tmp_path))  # where nothing is known, so that plans are compared
    before = live_bytes() if model.decode_params else 0
    with make_engine(model, prefix_bytes=10**6, on_window=print if record else None) as engine:
        memory = engine.memory
        last = 4 * (1 + TERM_COLUMNS + 2 + SHAPE["chunk"])  # given of the prompt that plans are compared with
        assert live_bytes() - before == memory.shape.slots * memory.slot + memory.intake + last
        assert memory.prefixes == 10**6
        assert memory.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))


def test_refused_with_the_numbers(model, make_engine, monkeypatch):
    memory = engine_memory(model, Shape(slots=64, room=4096, width=3, record=False), prefix_bytes=2**20)
    # Keys and values of two layers and of the drafter's, in float32.
    caches = 2 * 4096 * 8 * (2 * 2 + 4) * 4
    assert caches < memory.slot < 1.1 * caches
    check_engine_memory(memory, limit=memory.total)
    message = r"64 slots of 4096 positions need \d+\.\d MiB \(weights .*, each slot 2\.\d MiB, .* limit is 100.0 MiB"
    with pytest.raises(UserError, match=message):
        check_engine_memory(memory, limit=100 * 2**20)
    endless = engine_memory(model, Shape(slots=10**9, room=64, width=3, record=False), prefix_bytes=0)
    assert endless.slot > 2 * 64 * 8 * 2 * 2 * 4  # and it is known without a list of so many
    monkeypatch.setattr("dvi_jax.serve.memory.available_bytes", lambda: 0)
    monkeypatch.setattr(engine_module, "Programs", pytest.fail)  # nothing is taken
    with pytest.raises(UserError, match="but the device has"):
        make_engine(model)
