"""What is measured of an engine under load."""

import io
import json

import numpy as np
import pytest

from dvi_jax.errors import UserError
from experiments.engine_load import Report, Timeline, draw_requests, parse


def test_lengths_are_as_asked_for():
    options = parse(["--shape", "tiny", "--requests", "2000", "--longest-prompt", "900", "--longest-reply", "800"])
    requests = draw_requests(options, 4, 64)
    prompts, replies = np.array([(len(r.prompt_ids), r.max_new_tokens) for r in requests]).T
    assert (prompts.min(), prompts.max(), replies.max()) == (4, 900, 800)
    assert np.allclose([np.median(prompts), np.median(replies)], [100, 200], rtol=0.1)
    assert all(request.eos_ids == () for request in requests)
    assert draw_requests(options, 4, 64) == requests
    with pytest.raises(UserError, match="--context 512 is too short: the longest request has 2112 tokens"):
        parse(["--shape", "tiny", "--context", "512"])


def test_times_are_milliseconds():
    out = io.StringIO()
    timelines = [Timeline(1.0, [1.25, 1.75, 2.0]), Timeline(2.0, [2.5])]
    assert timelines[0].gaps(since=1.8) == [0.25]
    Report(out).result("engine", 8, "plain", 2.0, 100, timelines, more=1)
    result = json.loads(out.getvalue())
    assert (result["tokens_per_second"], result["ttft_p50"], result["gap_p50"], result["more"]) == (50, 375, 375, 1)
