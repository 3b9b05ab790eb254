"""What rounds write down to learn from, against a transcription into Python loops."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.decode.commit import accept, record
from dvi_jax.decode.state import NO_TOKEN, Signals
from dvi_jax.model.features import Features

SLOTS, HIDDEN = 40, 2


@pytest.mark.parametrize("seed", range(4))
def test_rounds_that_draft_and_rounds_that_do_not(seed):
    """A position has the judgement of the round that committed it, and nothing beyond them has any."""
    rng = np.random.default_rng(seed)
    signals = Signals.without_judgement(Features.zeros((1, SLOTS, HIDDEN), 1, jnp.float32))
    length, proposals, rewards, steps, states = 3, {}, {}, {}, {}
    for drafts in rng.integers(0, 4, size=8):
        verified, drafted = rng.integers(0, 2, size=(2, drafts + 1))
        drafted[-1] = NO_TOKEN  # behind the last row nothing was drafted
        rows = rng.normal(size=(drafts + 1, HIDDEN))
        verdict = accept(jnp.array([verified]), jnp.array([drafted]), jnp.array([drafts]), jnp.array([9]))
        features = Features(jnp.array([rows], jnp.float32), jnp.array([-rows[:, None]], jnp.float32))
        state = SimpleNamespace(length=jnp.array([length]), done=jnp.array([False]))
        signals = record(signals, state, jnp.array([drafted]), features, verdict, None)
        right = 0
        while right < drafts and verified[right] == drafted[right]:
            right += 1
        for row in range(right + 1):
            states[length + row], steps[length + row] = rows[row], row
            if row < drafts:
                proposals[length + row], rewards[length + row] = drafted[row], row < right
        length += right + 1
    assert len({len(states), len(rewards)}) == 2, "some tokens were drafted, some were not"
    expected = [proposals.get(at, NO_TOKEN) for at in range(SLOTS)]
    np.testing.assert_array_equal(signals.proposal[0], expected)
    np.testing.assert_array_equal(signals.reward[0], [int(rewards.get(at, -1)) for at in range(SLOTS)])
    for at, row in states.items():
        assert signals.step[0, at] == steps[at]
        np.testing.assert_array_equal(signals.features.final[0, at], row.astype(np.float32))
        np.testing.assert_array_equal(signals.features.taps[0, at, 0], -row.astype(np.float32))
