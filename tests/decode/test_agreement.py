"""Programs of a row class are compared before a plan is used: once, and to the bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig
from dvi_jax.decode import agreement
from dvi_jax.decode.batch import make_knobs, start
from dvi_jax.decode.plan import PLAIN, Plan
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
    monkeypatch.setattr(agreement, "decode_rounds", differing(where, sequence=0))
    with pytest.raises(UserError, match=r"plan chain:2: with jax .* do not have the bits of plain decoding"):
        agreement.check_agreement(make_tiny(layers=2), SETTINGS)
    assert not (tmp_path / "agreement").exists()


def test_every_sequence_of_a_batch_is_compared_by_tokens_of_its_own_as_far_as_it_came(make_tiny, monkeypatch):
    """The last one stands further on than the others, which agree."""
    model, plan, found = make_tiny(layers=2), Plan.parse(SETTINGS.plan), []
    state = start(model, [[5, 6, 7]] * 2 + [list(range(3, 33))], SETTINGS, make_knobs(SETTINGS, ()))
    agreement.require_equal_bits(model, state, plan)
    monkeypatch.setattr(agreement, "decode_rounds", differing("key", sequence=2, found=found))
    with pytest.raises(UserError, match="do not have the bits of plain decoding"):
        agreement.require_equal_bits(model, state, plan)
    tokens, lengths = np.asarray(found[0].tokens), np.asarray(found[0].length)
    assert lengths[2] - 1 > max(lengths[:2])  # where it differs the others have nothing
    assert tokens[0, 3:5].tolist() != tokens[1, 3:5].tolist()


def differing(where, sequence, found=None):
    """`decode_rounds`, but plain decoding differs in the last committed row of a sequence: a key, or its token."""
    decode = agreement.decode_rounds

    def other(definition, params, state, knobs, plan):
        state = decode(definition, params, state, knobs, plan)
        if plan != PLAIN:
            return state
        if found is not None:
            found.append(state)
        last = int(state.length[sequence]) - 1
        if where == "token":
            return state.replace(tokens=state.tokens.at[sequence, last].add(1))
        keys = state.deep[-1].key
        bits = jax.lax.bitcast_convert_type(keys, jnp.uint32).at[sequence, 0, last - 1, 0].add(1)
        layer = state.deep[-1]._replace(key=jax.lax.bitcast_convert_type(bits, keys.dtype))
        return state.replace(deep=(*state.deep[:-1], layer))

    return other
