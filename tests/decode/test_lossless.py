"""Speculative output equals plain output, token for token and, where looked at, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import choose_plan, generate_batch, start
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import Knobs
from dvi_jax.loading import LoadedModel
from dvi_jax.model.speculative_llama import Params
from tests.compiling import lightly_compiled

pytestmark = pytest.mark.optimized(emitters=True)


def teach(model: LoadedModel, train_noise) -> LoadedModel:
    """The drafter after training-like changes: other drafts, the same verifier."""
    return model.with_params(train_noise(model.params, "drafter", "lora_s"))


@pytest.mark.parametrize("golden", ["gqa_tied", pytest.param("mha", marks=pytest.mark.full)], indirect=True)
@pytest.mark.parametrize("trained", [False, True])
def test_golden_prompts(golden, trained, train_noise):
    """All golden prompts in float32: the ids are also those of transformers 4.33.3."""
    model = teach(golden.model, train_noise) if trained else golden.model
    new_tokens = max(len(run["greedy_ids"]) - len(run["prompt"]) for run in golden.runs)
    settings, accepted = DecodeConfig(draft_steps=6, max_new_tokens=new_tokens), set()
    for eos in sorted({run["eos_token_id"] for run in golden.runs}):
        # All prompts in every batch, whatever their own eos: one program for all.
        prompts = [run["prompt"] for run in golden.runs]
        plain, fast = (generate_batch(model, prompts, settings, plain=p, eos_ids=(eos,))[0] for p in (True, False))
        assert [g.output_ids for g in fast] == [g.output_ids for g in plain]
        assert [g.rounds for g in plain] == [len(g.new_ids) - 1 for g in plain]
        for run, generation in zip(golden.runs, plain, strict=True):
            if run["eos_token_id"] == eos:
                assert generation.output_ids[: len(run["greedy_ids"])] == run["greedy_ids"]
        accepted |= {g.accepted for g in fast}
    assert len(accepted) > 1


@pytest.mark.parametrize(("dtype", "trunk"), [("float32", "shared"), ("bfloat16", "separate, biased")])
def test_every_accept_length_bit_for_bit(make_tiny, train_noise, dtype, trunk):
    """Verifier hidden states of committed rows are equal in every bit, whatever was drafted around them."""
    lora = None if trunk == "shared" else {"rank_s": 2, "rank_d": 2}
    model = make_tiny(dtype, layers=2, lora=lora, model_type="qwen2" if "biased" in trunk else "llama")
    settings, prompts = DecodeConfig(draft_steps=3, max_new_tokens=48), [[5, 9, 2], [7, 7, 1]]
    plan = choose_plan(model, settings)
    seen, features = set(), {}
    # Four drafters, from one that the verifier often agrees with to noise, and none at all.
    with lightly_compiled():
        drafters = _drafters(model, train_noise)
    for name, params in drafters:
        for row, (prompt, draft_steps) in enumerate([(p, 0 if name == "plain" else 3) for p in prompts]):
            knobs = Knobs.make(draft_steps, 0.0, (), until=1)
            with lightly_compiled():  # one program begins all of them
                state = start(model.with_params(params), [prompt], settings, knobs)
            rows = {}
            while not bool(state.done.all()):
                state = decode_rounds(model.definition, params, state, knobs, plan)
                knobs = knobs._replace(until=knobs.until + 1)  # round by round
                begin, count = int(state.committed.start[0]), int(state.committed.count[0])
                seen.add(count)
                for i in range(count):
                    rows[begin + i] = np.asarray(state.committed.features.final[0, i])
            expected = features.setdefault(row, (rows, np.asarray(state.tokens[0, : int(state.length[0])])))
            np.testing.assert_array_equal(state.tokens[0, : int(state.length[0])], expected[1])
            assert rows.keys() == expected[0].keys()
            for position, feature in rows.items():
                np.testing.assert_array_equal(feature, expected[0][position])
    assert seen == {1, 2, 3, 4}


def _drafters(model: LoadedModel, train_noise) -> list[tuple[str, Params]]:
    """Plain first. Weak deep layers make the exit head right most of the time, so every accept length occurs."""
    base = model.params.base["llama"]
    layers = dict(base["layers"])
    for index in sorted(layers)[1:]:
        layers[index] = {
            **layers[index],
            "out": layers[index]["out"] * 0.05,
            "down": layers[index]["down"] * 0.05,
        }
    params = model.params._replace(base={"llama": {**base, "layers": layers}})
    if params.lora_d:
        params = train_noise(params, "lora_d", std=0.02)
    return [
        ("plain", params),
        ("good", params),
        ("mixed", train_noise(params, "drafter", "lora_s", std=0.1)),
        ("noise", train_noise(params, "drafter", "lora_s", std=2.0)),
    ]


def test_threshold_stops_drafting_and_keeps_the_output(make_tiny):
    """At 1.1 no draft is sure enough, so every round drafts exactly one token."""
    model = make_tiny(layers=2)
    plain, _ = generate_batch(
        model, [[5, 9, 2]], DecodeConfig(draft_steps=3, max_new_tokens=32), plain=True, eos_ids=()
    )
    for threshold in (0.0, 0.3, 1.1):
        (fast,), _ = generate_batch(
            model, [[5, 9, 2]], DecodeConfig(draft_steps=3, threshold=threshold, max_new_tokens=32), eos_ids=()
        )
        assert fast.output_ids == plain[0].output_ids
        if threshold == 1.1:
            assert set(fast.drafted[:-1]) == {1}
        if threshold == 0.0:
            assert set(fast.drafted[:-3]) == {3}


@pytest.mark.parametrize("new_tokens", [1, 2, 5, 9])
@pytest.mark.parametrize("plain", [True, False])
def test_exact_length(make_tiny, plain, new_tokens):
    settings = DecodeConfig(draft_steps=3, max_new_tokens=new_tokens)
    (generation,), _ = generate_batch(make_tiny(layers=2), [[5, 9]], settings, plain=plain, eos_ids=())
    assert len(generation.new_ids) == new_tokens == 1 + sum(generation.accept_lengths)
    assert generation.finish_reason == "length"


def test_eos_ends_the_sequence_wherever_it_comes(make_tiny, train_noise):
    """For each token of a plain continuation as eos, both modes stop at its first occurrence."""
    model = make_tiny(layers=2)
    model = model.with_params(_drafters(model, train_noise)[1][1])
    settings = DecodeConfig(draft_steps=3, max_new_tokens=24)
    (free,), _ = generate_batch(model, [[5, 9, 2]], settings, eos_ids=())
    for eos in sorted(set(free.new_ids)):
        (fast,), _ = generate_batch(model, [[5, 9, 2]], settings, eos_ids=(eos,))
        assert fast.new_ids == free.new_ids[: free.new_ids.index(eos) + 1]
        assert fast.finish_reason == "eos"
        assert sum(fast.accept_lengths) == len(fast.new_ids) - 1


def test_compiles_once(make_tiny):
    """Prompts, accept lengths, thresholds, draft steps and eos ids change; the loop is traced once."""
    from dvi_jax.decode import speculative

    model = make_tiny(seed=5, layers=2)
    traces = []
    original = speculative.speculative_round

    def counting(*args):
        traces.append(1)
        return original(*args)

    speculative.speculative_round = counting
    try:
        jax.clear_caches()
        for prompt in ([5, 9, 2], [7], [3] * 16):
            for threshold, plain, eos in ((0.0, False, ()), (0.5, False, (9,)), (0.0, True, (1, 2))):
                generate_batch(
                    model,
                    [prompt],
                    DecodeConfig(draft_steps=3, threshold=threshold, max_new_tokens=20),
                    plain=plain,
                    eos_ids=eos,
                )
    finally:
        speculative.speculative_round = original
    assert len(traces) == 1


def test_first_token_may_end_it(make_tiny):
    model = make_tiny(layers=2)
    (free,), _ = generate_batch(model, [[5, 9, 2]], DecodeConfig(draft_steps=3, max_new_tokens=4), eos_ids=())
    (stopped,), _ = generate_batch(
        model, [[5, 9, 2]], DecodeConfig(draft_steps=3, max_new_tokens=4), eos_ids=(free.new_ids[0],)
    )
    assert stopped.new_ids == free.new_ids[:1]
    assert stopped.rounds == 0
    assert jnp.int32(stopped.accepted) == 0
