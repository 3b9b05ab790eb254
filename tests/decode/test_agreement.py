"""Programs of a row class are compared before a plan is used: once, and to the bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from dvi_jax.config import DecodeConfig
from dvi_jax.decode import agreement
from dvi_jax.decode.plan import PLAIN
from dvi_jax.errors import UserError

pytestmark = pytest.mark.optimized
SETTINGS = DecodeConfig(draft_steps=2, plan="chain:2", max_new_tokens=30)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DVI_JAX_CACHE", str(tmp_path))


def test_programs_that_agree_are_compared_once(make_tiny, tmp_path, monkeypatch):
    model = make_tiny(layers=2)
    agreement.check_agreement(model, SETTINGS)
    assert len(list((tmp_path / "agreement").iterdir())) == 1
    monkeypatch.setattr(agreement, "decode_rounds", None)  # would fail if it were called
    agreement.check_agreement(model, SETTINGS)
    agreement.check_agreement(model, replace(SETTINGS, plan="early-exit:2"))  # one program does both
    agreement.check_agreement(model, replace(SETTINGS, plan="plain", draft_steps=0))
    with pytest.raises(TypeError):  # another plan is another program
        agreement.check_agreement(model, replace(SETTINGS, plan="chain:1"))


@pytest.mark.parametrize("where", ["token", "key"])
def test_a_single_bit_is_enough(make_tiny, tmp_path, monkeypatch, where):
    """Plain decoding is made to differ in the last committed row: its key in the last layer, or its token."""
    decode = agreement.decode_rounds

    def other(definition, params, state, knobs, plan):
        state = decode(definition, params, state, knobs, plan)
        if plan != PLAIN:
            return state
        last = int(state.length[0]) - 1
        if where == "token":
            return state.replace(tokens=state.tokens.at[0, last].add(1))
        keys = state.deep[-1].key
        bits = jax.lax.bitcast_convert_type(keys, jnp.uint32).at[0, 0, last - 1, 0].add(1)
        layer = state.deep[-1]._replace(key=jax.lax.bitcast_convert_type(bits, keys.dtype))
        return state.replace(deep=(*state.deep[:-1], layer))

    monkeypatch.setattr(agreement, "decode_rounds", other)
    with pytest.raises(UserError, match=r"plan chain:2: with jax .* do not have the bits of plain decoding"):
        agreement.check_agreement(make_tiny(layers=2), SETTINGS)
    assert not (tmp_path / "agreement").exists()
