"""The reference's decoding against runs recorded from the original."""

import numpy as np
import pytest

from dvi_jax.errors import UserError

STAGE_TOLERANCE = 2e-4


def test_golden_runs_are_exact(golden, reference, decode_options):
    from kangaroo_ref import kangaroo_generate

    _, record = golden
    assert len(record["runs"]) == 8
    for run in record["runs"]:
        result = kangaroo_generate(reference, run["prompt"], **decode_options(run))
        assert result.output_ids == run["output_ids"]
        assert result.accept_lengths == run["accept_lengths"]
        assert len(result.drafted) == run["rounds"]


def test_plain_decoding_gives_the_golden_greedy_ids(golden, reference):
    from kangaroo_ref import greedy_generate

    for run in golden[1]["runs"]:
        ids = greedy_generate(reference, run["prompt"], max_new_tokens=run["new_tokens"])
        assert ids == run["greedy_ids"]


def test_plain_decoding_stops_at_eos(golden, reference):
    from kangaroo_ref import greedy_generate

    run = golden[1]["runs"][3]
    ids = greedy_generate(reference, run["prompt"], max_new_tokens=64, eos_id=run["eos_token_id"])
    assert ids == run["output_ids"]


def test_stage_tensors_match_the_original(golden, reference):
    from kangaroo_ref import prompt_stages

    path, record = golden
    recorded = np.load(path / "golden.npz")
    for index, run in enumerate(record["runs"]):
        stages = prompt_stages(reference, run["prompt"])
        assert set(stages) == {"logits", "hidden_exit", "hidden_last", "adapter_out", "adapter_logits"}
        for name, tensor in stages.items():
            expected = recorded[f"{name}_{index}"]
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=STAGE_TOLERANCE, err_msg=name)


def test_drafts_are_what_the_rounds_judged(golden, reference, decode_options):
    """An accept length is the drafts' common prefix with the output, plus the verifier's token."""
    from kangaroo_ref import kangaroo_generate

    run = golden[1]["runs"][1]
    result = kangaroo_generate(reference, run["prompt"], **decode_options(run))
    position = len(run["prompt"]) + 1
    for drafted, accept_length in zip(result.drafted_ids, run["accept_lengths"][1:], strict=True):
        committed = run["output_ids"][position : position + accept_length]
        assert drafted[: accept_length - 1] == committed[:-1]
        assert len(drafted) == accept_length - 1 or drafted[accept_length - 1] != committed[-1]
        position += accept_length
    assert max(result.drafted) == run["speculative_steps"]


@pytest.mark.parametrize("threshold", [0.0, 1.1])
@pytest.mark.parametrize("draft_steps", [0, 1, 3, 8])
def test_speculation_changes_no_token(golden, reference, draft_steps, threshold):
    from kangaroo_ref import kangaroo_generate

    run = golden[1]["runs"][4]
    result = kangaroo_generate(
        reference, run["prompt"], max_new_tokens=40, draft_steps=draft_steps, threshold=threshold
    )
    assert len(result.output_ids) >= len(run["prompt"]) + 40 - draft_steps - 1
    assert result.output_ids == run["greedy_ids"][: len(result.output_ids)]
    # A threshold nothing reaches ends every round's drafting after one token.
    assert set(result.drafted) == {min(draft_steps, 1) if threshold > 1 else draft_steps}


def test_loop_stops_before_the_context_limit(golden, reference):
    from kangaroo_ref import kangaroo_generate

    run = golden[1]["runs"][2]
    result = kangaroo_generate(reference, run["prompt"], max_new_tokens=64, draft_steps=4, threshold=0.4, max_length=30)
    # A round starts only while the newest position is below 30 - 1 - 4 and commits at most 5.
    assert 26 <= len(result.output_ids) <= 30
    assert result.output_ids == run["output_ids"][: len(result.output_ids)]


def test_a_round_leaves_caches_at_the_committed_length(golden, reference):
    from kangaroo_ref import prefill, spec_decode_step

    run = golden[1]["runs"][1]
    state = prefill(reference, run["prompt"])
    for expected in run["accept_lengths"][1:]:
        start = state.start
        done = spec_decode_step(reference, state, draft_steps=6, threshold=0.0)
        assert (done.accept_length, state.start) == (expected, start + expected)
        assert {keys.shape[2] for keys, _ in reference.base.past_key_values} == {state.start}
        fully_accepted = expected == len(done.drafted_ids) + 1
        assert state.adapter_cache[0].shape[2] == state.start - fully_accepted


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt is empty"), ([1, 9999], "token 9999 is outside"), ([1] * 2048, "2048 tokens")],
)
def test_unusable_prompts_are_refused(golden, reference, prompt, message):
    from kangaroo_ref import kangaroo_generate

    with pytest.raises(UserError, match=message):
        kangaroo_generate(reference, prompt, max_new_tokens=4)
