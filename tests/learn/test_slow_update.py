"""The slow update: its loss in closed form, when it is due, and that only lora_D moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig, SlowConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.learn.slow_update import init_slow, is_due, slow_loss, slow_update, verifier_logits
from dvi_jax.model.speculative_llama import join

RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 64, (2, 10)), jnp.int32)
MASK = jnp.asarray(RNG.random((2, 10)) < 0.5)
CONFIG = SlowConfig(every=1, lr=2e-2)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_loss_closed_form():
    logits, reference = RNG.normal(size=(2, 10, 64)), RNG.normal(size=(2, 10, 64))
    log_p, log_q = log_softmax(logits)[:, :-1], log_softmax(reference)[:, :-1]
    weight, targets = np.asarray(MASK)[:, 1:], np.asarray(TOKENS)[:, 1:]
    ce = -(np.take_along_axis(log_p, targets[..., None], -1)[..., 0] * weight).sum() / weight.sum()
    kl = ((np.exp(log_p) * (log_p - log_q)).sum(-1) * weight).sum() / weight.sum()
    loss, terms = jax.jit(slow_loss)(jnp.asarray(logits), jnp.asarray(reference), TOKENS, MASK, 0.1)
    np.testing.assert_allclose(loss, ce + 0.1 * kl, rtol=1e-5)
    np.testing.assert_allclose((terms["slow_ce"], terms["slow_kl"]), (ce, kl), rtol=1e-5)


def test_when_it_is_due():
    assert [step for step in range(13) if is_due(step, SlowConfig(every=4))] == [4, 8, 12]
    assert not any(is_due(step, SlowConfig(every=0)) for step in range(13))


@pytest.fixture(scope="module")
def adapted(make_tiny):
    return make_tiny(lora={"rank_s": 0, "rank_d": 2})


def test_only_lora_d_moves_and_it_learns(adapted):
    """From a silent lora_D: KL starts at 0, the observed tokens get likelier, every B matrix moves, base stays."""
    state = init_slow(adapted.params, CONFIG)
    base = jax.tree.map(np.asarray, adapted.params.base)
    losses = []
    for _ in range(30):
        state, metrics = slow_update(adapted.definition, adapted.params, state, TOKENS, MASK, config=CONFIG)
        losses.append((float(metrics["slow_ce"]), float(metrics["slow_kl"])))
    assert losses[0][1] == pytest.approx(0.0, abs=1e-6)
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] > 0.0
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), adapted.params.lora_d, state.lora_d)
    assert all(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, base, jax.tree.map(np.asarray, adapted.params.base))


def test_lossless_relative_to_the_verifier_as_it_now_is(adapted):
    """After slow updates the output differs from before, and speculative still equals plain."""
    state = init_slow(adapted.params, CONFIG)
    for _ in range(20):
        state, _ = slow_update(adapted.definition, adapted.params, state, TOKENS, MASK, config=CONFIG)
    moved = adapted.with_params(adapted.params._replace(lora_d=state.lora_d))
    settings, prompts = DecodeConfig(draft_steps=3, max_new_tokens=24), [[5, 9, 2], [7, 1, 1]]
    before, _ = generate_batch(adapted, prompts, settings, eos_ids=())
    plain, _ = generate_batch(moved, prompts, settings, plain=True, eos_ids=())
    fast, _ = generate_batch(moved, prompts, settings, eos_ids=())
    assert [g.output_ids for g in fast] == [g.output_ids for g in plain] != [g.output_ids for g in before]


def test_fast_update_does_not_see_lora_d(adapted):
    """The drafter's gradient has no lora_D part, and the verifier's logits do not depend on lora_S."""
    from dvi_jax.config import DistillConfig
    from dvi_jax.learn.distill import init_distill

    trainable = init_distill(adapted.params, DistillConfig("c", "o", ("d",))).trainable
    assert set(trainable) == {"drafter", "lora_s"}
    logits = jax.jit(lambda params: verifier_logits(join(adapted.definition, params), TOKENS))
    noisy = adapted.params._replace(lora_s=jax.tree.map(lambda x: x + 1.0, adapted.params.lora_s))
    np.testing.assert_array_equal(logits(noisy), logits(adapted.params))
