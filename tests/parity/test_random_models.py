"""Random small models, prompts and settings: the reference and JAX give the same ids and the same accept lengths."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dvi_jax.config import DecodeConfig, LlamaConfig, RopeScaling

CONTEXT = 40
LONGEST_PROMPT = 16
MOST_STEPS = 8
SMALLEST_GAP = 1e-5  # of two logits, or of a confidence and the threshold: below it float32 rounding decides

PLAIN = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    max_position_embeddings=CONTEXT,
)
# Every shape costs a compilation per exit layer, so there are few; weights, prompts and settings vary freely.
# Exits lie after the first layer, in the middle, and before the last one.
CONFIGS = {
    "plain": PLAIN,
    "grouped, tied": replace(PLAIN, num_kv_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "one KV head, rope base, deep": replace(PLAIN, num_kv_heads=1, num_layers=4, rope_theta=500.0),
    "two layers, wide heads, linear rope": replace(
        PLAIN, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, rope_scaling=RopeScaling("linear", 2.0)
    ),
    "two layers, llama3 rope": replace(
        PLAIN, num_layers=2, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_position_embeddings=32)
    ),
}
EXITS = [
    ("plain", 1),
    ("plain", 2),
    ("grouped, tied", 1),
    pytest.param("one KV head, rope base, deep", 2, marks=pytest.mark.full),
    pytest.param("two layers, wide heads, linear rope", 1, marks=pytest.mark.full),
    ("two layers, llama3 rope", 1),
]


@st.composite
def runs(draw):
    """Prompt, settings, and which of the tokens decoded without eos becomes the eos (None: none)."""
    prompt = draw(st.lists(st.integers(0, PLAIN.vocab_size - 1), min_size=1, max_size=LONGEST_PROMPT))
    room = CONTEXT - len(prompt)
    return {
        "prompt": prompt,
        "max_new_tokens": draw(st.one_of(st.just(room), st.integers(1, room))),
        "draft_steps": draw(st.integers(1, MOST_STEPS)),
        "threshold": draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))),
        "eos_at": draw(st.one_of(st.none(), st.integers(1, room))),
    }


def check_run(decode_alone, reference, model, run):
    """Decode on both sides and compare; returns the reference's result and JAX's."""
    from kangaroo_ref import greedy_generate, kangaroo_generate

    prompt, limits = run["prompt"], {"max_new_tokens": run["max_new_tokens"]}
    reference.closest, reference.threshold = float("inf"), None
    plain = greedy_generate(reference, prompt, **limits)
    new_ids = plain[len(prompt) :]
    eos_id = -1 if run["eos_at"] is None else new_ids[run["eos_at"] % len(new_ids)]
    options = {name: run[name] for name in ("draft_steps", "threshold")}
    reference.threshold = run["threshold"]
    expected = kangaroo_generate(reference, prompt, **options, **limits, eos_id=eos_id, max_length=CONTEXT)
    if eos_id in new_ids:
        plain = plain[: len(prompt) + new_ids.index(eos_id) + 1]
    assume(reference.closest > SMALLEST_GAP)

    options |= {"new_tokens": run["max_new_tokens"], "eos_ids": () if eos_id < 0 else (eos_id,)}
    found = decode_alone(model, prompt, **options)
    assert found.output_ids == plain
    rounds = expected.accept_lengths[1:]
    if new_ids[0] == eos_id:  # JAX stops here; the original never checks the prefill's token
        assert found.accept_lengths == []
    else:
        assert found.accept_lengths[: len(rounds)] == rounds
        assert found.drafted[: len(rounds)] == expected.drafted
        assert found.output_ids[: len(expected.output_ids)] == expected.output_ids
    return expected, found


@pytest.mark.parametrize(("name", "exit_layer"), EXITS)
def test_reference_and_jax_agree(both_sides, decode_alone, name, exit_layer):
    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(seed=st.integers(0, 2**20), run=runs())
    def check(seed, run):
        check_run(decode_alone, *both_sides(CONFIGS[name], seed, exit_layer), run)

    check()


@pytest.mark.parametrize("draft_steps", [1, 6])
def test_eos_inside_an_accepted_draft_ends_the_round(both_sides, decode_alone, draft_steps):
    """eos where the drafter proposes it too, so that the round ends on an accepted draft and not on a reject."""
    reference, model = both_sides(PLAIN, 0, 2)
    run = {"prompt": [5], "max_new_tokens": 39, "draft_steps": draft_steps, "threshold": 0.0, "eos_at": None}
    free, _ = check_run(decode_alone, reference, model, run)
    start, ended = 2, 0
    for drafted, accept_length in zip(free.drafted_ids, free.accept_lengths[1:], strict=True):
        if accept_length > 1 and free.output_ids.index(drafted[0]) == start:  # first seen as a round's first draft
            _, found = check_run(decode_alone, reference, model, run | {"eos_at": start - 1})
            assert found.finish_reason == "eos"
            assert found.accept_lengths[-1] == 1 <= found.drafted[-1]
            ended += 1
        start += accept_length
    assert ended > 0


def test_the_context_is_used_to_its_last_position(both_sides, decode_alone):
    reference, model = both_sides(PLAIN, 3, 1)
    run = {"prompt": [7, 9, 4], "max_new_tokens": CONTEXT - 3, "draft_steps": 8, "threshold": 0.0, "eos_at": None}
    expected, found = check_run(decode_alone, reference, model, run)
    assert len(found.output_ids) == CONTEXT
    assert CONTEXT - 9 < len(expected.output_ids) <= CONTEXT
    assert found.rounds >= len(expected.drafted)


def test_a_fixed_batch_has_the_pinned_accept_rate(both_sides):
    """A change of drafting or acceptance moves these numbers even where both sides move together."""
    from dvi_jax.decode.acceptance import measure_acceptance
    from dvi_jax.decode.batch import generate_batch
    from kangaroo_ref import kangaroo_generate

    reference, model = both_sides(PLAIN, 20, 2)
    rng = np.random.default_rng(20)
    prompts = [rng.integers(0, PLAIN.vocab_size, length).tolist() for length in (1, 3, 8, 15)]
    options = DecodeConfig(draft_steps=4, threshold=0.5, max_new_tokens=24)
    batch, _ = generate_batch(model, prompts, options, eos_ids=())
    assert [len(g.new_ids) for g in batch] == [24] * 4
    for prompt, generation in zip(prompts, batch, strict=True):
        alone = kangaroo_generate(reference, prompt, max_new_tokens=24, draft_steps=4, threshold=0.5)
        rounds = alone.accept_lengths[1:]
        assert generation.accept_lengths[: len(rounds)] == rounds
    acceptance = measure_acceptance(batch)
    assert (acceptance.accepted, acceptance.judged, acceptance.rounds) == (37, 80, 55)
    assert acceptance.accept_rate == pytest.approx(0.4625)
