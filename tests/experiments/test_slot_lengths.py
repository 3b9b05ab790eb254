"""What slots hold for nothing, against two requests worked out by hand."""

import numpy as np
import pytest

from dvi_jax.errors import UserError
from experiments.slot_lengths import waste

REQUESTS = np.array([[64, 64], [256, 128]])  # prompt and reply: slots of 128 and of 384 fit them to the token


def test_two_requests():
    one, two, _ = waste(REQUESTS, 384)
    used = 64 * (64 + 32) + 128 * (256 + 64)  # positions that hold a token, over the tokens written
    assert (one["slots"], one["memory"], one["left_out"]) == ([384], 1.0, 0)
    assert one["wasted"] == pytest.approx(1 - used / (192 * 384))
    assert two["slots"] == [128, 384]
    assert two["wasted"] == pytest.approx(1 - used / (64 * 128 + 128 * 384))
    assert two["memory"] == pytest.approx((64 * 128 + 128 * 384) / (192 * 384))


@pytest.mark.parametrize(("requests", "context"), [(REQUESTS, 256), (REQUESTS + 500, 512)])
def test_contexts_that_say_nothing(requests, context):
    with pytest.raises(UserError, match=f"--contexts {context}: "):
        waste(requests, context)
