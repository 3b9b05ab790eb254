"""An engine's plans are compared with plain decoding before it serves: once, and to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.decode.plan import PLAIN
from dvi_jax.errors import UserError
from dvi_jax.serve import agreement

pytestmark = pytest.mark.optimized


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DVI_JAX_CACHE", str(tmp_path))


def test_plans_that_agree_are_compared_once(model, make_engine, pieces_of, tmp_path, monkeypatch):
    make_engine(model).close()
    assert len(list((tmp_path / "agreement").iterdir())) == 1
    monkeypatch.setattr(agreement, "run_stretch", None)  # would fail if it were called
    make_engine(model).close()
    make_engine(model, plan="plain").close()
    (kept,) = (tmp_path / "agreement").iterdir()
    kept.unlink()
    with pytest.raises(TypeError):
        make_engine(model)


def test_no_two_slots_are_compared_by_the_same_sequence(model, make_engine, monkeypatch):
    found, checksums = [], agreement._checksums

    def looked_at(slots, start, count):
        found.append(np.asarray(slots.decode.tokens)[:, int(start) - 16 : int(start) + 12])
        return checksums(slots, start, count)

    monkeypatch.setattr(agreement, "_checksums", looked_at)
    make_engine(model).close()
    plain, drafted = found
    np.testing.assert_array_equal(plain[:, :16], np.broadcast_to(np.arange(3, 19), (4, 16)))
    assert len({tuple(row) for row in plain[:, 17:].tolist()}) == 4
    np.testing.assert_array_equal(drafted, plain)


@pytest.mark.parametrize("where", ["token", "value"])
def test_a_single_bit_is_enough(model, make_engine, tmp_path, monkeypatch, where):
    """Plain decoding is made to differ in the first new row of one slot: in a value of the last layer, or its token."""
    run_stretch = agreement.run_stretch

    def other(definition, params, slots, rounds, plan, **options):
        slots = run_stretch(definition, params, slots, rounds, plan, **options)
        if plan != PLAIN:
            return slots
        state = slots.decode
        if where == "token":
            return slots._replace(decode=state.replace(tokens=state.tokens.at[2, 16].add(1)))
        value = state.deep[-1].value
        bits = jax.lax.bitcast_convert_type(value, jnp.uint32).at[2, 1, 16, 3].add(1)
        layer = state.deep[-1]._replace(value=jax.lax.bitcast_convert_type(bits, value.dtype))
        return slots._replace(decode=state.replace(deep=(*state.deep[:-1], layer)))

    monkeypatch.setattr(agreement, "run_stretch", other)
    with pytest.raises(UserError, match=r"plan chain:2: with jax .* do not have the bits of plain decoding"):
        make_engine(model)
    assert not (tmp_path / "agreement").exists()
