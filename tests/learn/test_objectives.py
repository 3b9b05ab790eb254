"""The objectives against closed forms and enumeration over a tiny vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import ObjectiveConfig
from dvi_jax.learn import objectives
from dvi_jax.learn.schedule import kl_to_rl

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
TEACHER = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
MASK = jnp.array([1, 1, 0, 1, 1, 1], jnp.float32)


def softmax(x):
    e = np.exp(np.asarray(x, np.float64))
    return e / e.sum(-1, keepdims=True)


def policy_loss(logits, proposals, *rest):
    """L_pg as a function of the logits."""
    return objectives.policy_gradient(objectives.token_log_prob(logits, proposals), *rest)


policy_gradient = jax.jit(jax.grad(policy_loss))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_closed_form(temperature):
    p, q = softmax(TEACHER / temperature), softmax(LOGITS / temperature)
    per_row = (p * np.log(p / q)).sum(-1) * temperature**2
    expected = (per_row * np.asarray(MASK)).sum() / 5
    np.testing.assert_allclose(objectives.kl_divergence(TEACHER, LOGITS, MASK, temperature), expected, rtol=1e-5)


def test_kl_is_zero_only_at_the_teacher_and_moves_the_student_alone():
    assert abs(float(objectives.kl_divergence(TEACHER, TEACHER, MASK))) < 1e-6
    teacher_grad, student_grad = jax.jit(jax.grad(objectives.kl_divergence, argnums=(0, 1)))(TEACHER, LOGITS, MASK)
    assert not teacher_grad.any()
    expected = (softmax(LOGITS) - softmax(TEACHER)) * np.asarray(MASK)[:, None] / 5
    np.testing.assert_allclose(student_grad, expected, atol=1e-6)


def test_entropy_and_cross_entropy_closed_form():
    p = softmax(LOGITS)
    mask = np.asarray(MASK)
    rows = objectives.entropy_rows(LOGITS)
    np.testing.assert_allclose(rows, -(p * np.log(p)).sum(-1), rtol=1e-5)
    targets = np.array([0, 4, 2, 1, 3, 3])
    expected = -(np.log(p[np.arange(6), targets]) * mask).sum() / 5
    np.testing.assert_allclose(objectives.cross_entropy(LOGITS, jnp.array(targets), MASK), expected, rtol=1e-5)


def test_empty_mask_gives_zero():
    assert float(objectives.kl_divergence(TEACHER, LOGITS, jnp.zeros(6))) == 0.0


def test_policy_gradient_is_the_gradient_of_expected_reward():
    """The REINFORCE gradient averaged over proposals is minus that of sum_a p(a) r(a), whatever the baseline."""
    reward_of = jnp.array([1.0, 0.0, 0.0, 1.0, 0.0])
    logits = LOGITS[:1]

    def expected_reward(x):
        return jnp.sum(jax.nn.softmax(x[0]) * reward_of)

    for baseline in (0.0, 0.4):
        total = np.zeros(logits.shape)
        for token in range(5):
            grad = policy_gradient(
                logits, jnp.array([token]), reward_of[token][None], jnp.float32(baseline), jnp.ones(1)
            )
            total += softmax(logits)[0, token] * np.asarray(grad)
        np.testing.assert_allclose(total, -jax.jit(jax.grad(expected_reward))(logits), atol=1e-6)


def test_policy_gradient_finite_difference():
    """The loss itself by central differences in float64."""
    proposals, rewards = np.array([0, 4, 2, 1, 3, 3]), np.array([1, 0, 1, 1, 0, 0.0])

    def loss(x):
        log_p = np.log(softmax(x))[np.arange(6), proposals]
        return -((rewards - 0.3) * log_p * np.asarray(MASK)).sum() / 5

    grad = policy_gradient(LOGITS, jnp.array(proposals), jnp.array(rewards, jnp.float32), jnp.float32(0.3), MASK)
    x = np.asarray(LOGITS, np.float64)
    for i, j in [(0, 0), (1, 2), (2, 1), (4, 3), (5, 3)]:
        step = np.zeros_like(x)
        step[i, j] = 1e-5
        np.testing.assert_allclose(grad[i, j], (loss(x + step) - loss(x - step)) / 2e-5, atol=1e-5)


def test_flipped_rewards_flip_the_sign():
    proposals, rewards = jnp.array([0, 4, 2, 1, 3, 3]), jnp.array([1, 0, 1, 1, 0, 0.0])
    args = (LOGITS, proposals)
    up = policy_loss(*args, rewards, jnp.float32(0.5), MASK)
    down = policy_loss(*args, 1 - rewards, jnp.float32(0.5), MASK)
    np.testing.assert_allclose(up, -down, rtol=1e-5)


def test_linear_schedule():
    config = ObjectiveConfig(warmup=10, ramp=20, kl_min=0.1, pg_max=0.8)
    expected = {0: (1.0, 0.0), 10: (1.0, 0.0), 20: (0.55, 0.4), 30: (0.1, 0.8), 1000: (0.1, 0.8)}
    for step, (kl, pg) in expected.items():
        np.testing.assert_allclose(kl_to_rl(jnp.int32(step), config), (kl, pg), rtol=1e-6)


def test_exponential_schedule():
    config = ObjectiveConfig(schedule="exponential", warmup=5, ramp=10, kl_min=0.0, pg_max=1.0)
    for step, lam in {0: 1.0, 5: 1.0, 15: np.exp(-1), 35: np.exp(-3)}.items():
        np.testing.assert_allclose(kl_to_rl(jnp.int32(step), config), (lam, 1 - lam), rtol=1e-5)
