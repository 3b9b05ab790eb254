"""Inner hidden states of the verifier: the same as in a plain forward pass, at no bit's cost to the verifier."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig
from dvi_jax.decode import prefill as prefill_module
from dvi_jax.decode.batch import choose_plan, make_knobs, start
from dvi_jax.decode.prefix import make_prefix
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.model.llama import Llama
from tests.compiling import lightly_compiled
from tests.contract.cases import BEGINNING, PROMPTS, Case
from tests.contract.conftest import THREE_LAYERS, untrained

pytestmark = pytest.mark.optimized
# Sizes of tests/contract/test_contract.py, whose programs these tests meet again.
SETTINGS = DecodeConfig(draft_steps=3, max_new_tokens=28)
LONG = [[7, 40, 3, 21, 5, 9, 30, 2, 2, 51, 8, 11, 6, 1, 9, 9, 4, 33], *PROMPTS[1:]]
WAYS = ("whole", "chunks", "prefix")
CHOSEN = {
    Case(drafter="tapped_step"): WAYS,
    Case(drafter="tapped_step", trunk="separate"): ("prefix",),
    Case(drafter="tapped_block"): ("whole", "chunks"),
}


def pytest_generate_tests(metafunc):
    if "way" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        pairs = [(case, way) for case, chosen in CHOSEN.items() for way in (WAYS if full else chosen)]
        metafunc.parametrize(("tapping", "way"), pairs, ids=str)


def decoded(model, prompts=PROMPTS, prefix=None, *, settings=SETTINGS, plain=False):
    knobs = make_knobs(settings, (), plain=plain)
    state = start(model, prompts, settings, knobs, record=True, prefix=prefix)
    return decode_rounds(model.definition, model.decode_params, state, knobs, choose_plan(model, settings, plain=plain))


def forward(model, tokens):
    """Hidden states after each tapped layer over whole sequences, one layer split after the other: [B, T, A, D]."""
    params = model.params.base["llama"]
    base = {"embed": params["embed"], "norm": params["norm"], "head": params["head"]}
    base["layers"] = {str(i): {n: w for n, w in x.items() if n != "lora"} for i, x in params["layers"].items()}
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # A split at layer i gives the state after i layers by another way than a tap: as the exit hidden state.
    splits = [jax.jit(Llama(model.config, base, tap).shallow, static_argnums=1) for tap in model.taps]
    return jnp.stack([shallow(tokens, None, positions)[0] for shallow in splits], -2)


def test_taps_are_those_of_a_forward_pass(tapping, way, monkeypatch):
    model, prompts, prefix = untrained(tapping), PROMPTS, None
    if way == "chunks":
        monkeypatch.setattr(prefill_module, "LONGEST_CHUNK", 16)
        monkeypatch.setattr(prefill_module, "SMALLEST_CHUNK", 16)
        prefill_module.prefill.clear_cache()
        prompts = LONG
    with lightly_compiled():  # equal to rounding is enough; of another width than where bits are compared
        if way == "prefix":
            prefix = make_prefix(model, BEGINNING)
        state = decoded(model, prompts, prefix, settings=replace(SETTINGS, draft_steps=2))
        expected = forward(model, state.tokens)
    if way == "chunks":
        prefill_module.prefill.clear_cache()
    for row, length in enumerate(np.asarray(state.length)):
        # Signals lie where a row predicts: the row at p - 1 at position p.
        found = state.signals.features.taps[row, 1:length]
        assert found.shape == (length - 1, len(model.taps), 32)
        np.testing.assert_allclose(found, expected[row, : length - 1], atol=2e-4)
        assert float(jnp.std(found)) > 0.1


@pytest.mark.parametrize(
    ("tapped", "untapped", "dtype"), [("tapped_step", "fused", "float32"), ("tapped_block", "medusa", "bfloat16")]
)
def test_tapping_changes_no_bit_of_the_verifier(tapped, untapped, dtype):
    """Plain decoding of one verifier, split at one layer, with a drafter that taps and with one that does not."""
    one, other = (
        decoded(untrained(Case(drafter=kind, dtype=dtype), THREE_LAYERS), plain=True) for kind in (tapped, untapped)
    )
    assert other.signals.features.taps is None
    np.testing.assert_array_equal(one.tokens, other.tokens)
    for row, length in enumerate(np.asarray(one.length)):
        finals = (np.asarray(jnp.float32(s.signals.features.final[row, :length])) for s in (one, other))
        np.testing.assert_array_equal(*(final.view(np.int32) for final in finals))
