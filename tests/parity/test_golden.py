"""JAX in float32 against runs recorded from the original: ids, accept lengths, adapter output, draft logits."""

import numpy as np
import pytest

STAGE_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def imported(golden, tmp_path_factory):
    """The golden weights through the importer, as any user's would go."""
    from conversion.importing import import_model
    from dvi_jax.loading import load

    path, record = golden
    out = tmp_path_factory.mktemp("golden") / "checkpoint"
    import_model(path / "base", out, adapter=path / "adapter", exit_layer=record["exit_layer"])
    return load(out)


@pytest.mark.parametrize("index", range(8))
def test_ids_and_accept_lengths_equal_the_original(golden, imported, decode_alone, index):
    """In one program for all runs: at most 8 drafts, of which a run makes as many as it asks for."""
    run = golden[1]["runs"][index]
    eos_ids = () if run["eos_token_id"] < 0 else (run["eos_token_id"],)
    result = decode_alone(
        imported,
        run["prompt"],
        new_tokens=run["max_new_tokens"],
        draft_steps=run["speculative_steps"],
        threshold=run["threshold"],
        eos_ids=eos_ids,
    )
    rounds = run["accept_lengths"][1:]  # the original counts the prefill as well
    assert len(rounds) == run["rounds"] > 0
    assert result.accept_lengths[: len(rounds)] == rounds
    assert result.output_ids[: len(run["output_ids"])] == run["output_ids"]
    if result.finish_reason == "eos":
        assert result.output_ids == run["output_ids"]
    else:
        assert len(result.new_ids) == run["max_new_tokens"]


def test_the_golden_runs_are_not_trivial(golden):
    """Drafts are accepted in every run and rejected in most, or the equality above would say little."""
    rounds = [run["accept_lengths"][1:] for run in golden[1]["runs"]]
    assert all(max(lengths) > 1 for lengths in rounds)
    assert sum(min(lengths) == 1 for lengths in rounds) >= 5


def test_stage_tensors_equal_the_original(golden, imported):
    import jax
    import jax.numpy as jnp

    from dvi_jax.model.speculative_llama import join

    @jax.jit
    def stages(params, prompt):
        model = join(imported.definition, params)
        positions = jnp.arange(prompt.shape[1])[None]
        hidden, _, _ = model.llama.shallow(prompt, None, positions)
        last, _, _ = model.llama.deep(hidden, None, positions)
        out = model.drafter.unroll(hidden, last, positions, 1)[0]
        return {
            "logits": model.llama.logits(last),
            "hidden_exit": hidden,
            "hidden_last": last,
            "adapter_out": out,
            "adapter_logits": model.drafter.logits(out, model.llama.head_weight()),
        }

    recorded = np.load(golden[0] / "golden.npz")
    for index, run in enumerate(golden[1]["runs"]):
        length = len(run["prompt"])
        found = stages(imported.params, jnp.asarray([run["prompt"] + [0] * (48 - length)]))
        for name, array in found.items():
            expected, what = recorded[f"{name}_{index}"], f"{name} of run {index}"
            np.testing.assert_allclose(array[0, :length], expected, rtol=0, atol=STAGE_TOLERANCE, err_msg=what)
