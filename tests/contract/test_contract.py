"""What holds for every drafter: a new one is tested by being registered (`DRAFTERS`)."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.checkpoint import read_checkpoint, write_checkpoint
from dvi_jax.config import DecodeConfig, ObjectiveConfig, OptimizerConfig, SamplingConfig
from dvi_jax.decode.batch import choose_plan, make_knobs, make_sampling, start
from dvi_jax.decode.memory import Sizes, estimate_memory
from dvi_jax.decode.plan import Plan
from dvi_jax.decode.prefix import make_prefix
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.errors import UserError
from dvi_jax.learn.fast_update import Batch, fast_update, init_learner
from dvi_jax.learn.replay import Replay, push, read_windows
from dvi_jax.loading import from_checkpoint, trained_parts
from dvi_jax.model.speculative_llama import join
from tests.compiling import lightly_compiled
from tests.contract.cases import BEGINNING, PROMPTS
from tests.contract.conftest import UNROLLED, base_of

pytestmark = pytest.mark.optimized
NEW = 28
SAMPLING = {
    "greedy": None,
    "coupled": SamplingConfig(temperature=0.7, seed=3),
    "rejection": SamplingConfig(temperature=0.7, seed=3, coupled=False),
}


def decoded(case, model, *, plain=False):
    """The state after a generation of the case's prompts, with learning signals."""
    prompts = PROMPTS[: case.batch]
    settings = DecodeConfig(draft_steps=case.draft_steps, plan=case.settings_plan, max_new_tokens=NEW)
    knobs = make_knobs(settings, (), plain=plain)
    sampling = make_sampling(model, prompts, SAMPLING[case.sampling])
    plan = choose_plan(model, settings, plain=plain)
    with lightly_compiled():  # plain and speculative decoding begin with one state, made by one program
        prefix = make_prefix(model, BEGINNING) if case.prefix else None
        state = start(model, prompts, settings, knobs, sampling=sampling, prefix=prefix, record=True)
    with lightly_compiled() if case.compiled_lightly else nullcontext():
        return decode_rounds(model.definition, model.decode_params, state, knobs, plan)


def bits(array):
    """float32 holds every bfloat16, and equality of ints tells -0 from 0."""
    return np.asarray(jnp.asarray(array, jnp.float32)).view(np.int32)


def test_decoding_is_lossless_and_drafts_are_accepted(case, case_model):
    """Plain and speculative: ids and every bit of the verifier's final state at every committed position.

    Rejection sampling gives other tokens by design (its distribution: tests/decode/test_sampling.py).
    """
    assert case_model.kv == case.kv
    fast = decoded(case, case_model)
    assert int(jnp.sum(fast.accept_lengths > 1)) > 0, "no draft was accepted: nothing was tested"
    assert int(jnp.max(fast.drafted)) == Plan.parse(case.settings_plan).drafts
    if case.vocabulary == "few":
        proposals = np.asarray(fast.signals.proposal)
        assert not (proposals[proposals >= 0] % 2).any()  # the even ids
    if case.sampling == "rejection":
        assert np.all(np.asarray(fast.length) == [len(prompt) + NEW for prompt in PROMPTS[: case.batch]])
        return
    plain = decoded(case, case_model, plain=True)
    assert int(jnp.sum(plain.drafted)) == 0
    for row, length in enumerate(np.asarray(plain.length)):
        np.testing.assert_array_equal(fast.tokens[row, :length], plain.tokens[row, :length])
        pairs = zip(jax.tree.leaves(fast.signals.features), jax.tree.leaves(plain.signals.features), strict=True)
        for a, b in pairs:
            np.testing.assert_array_equal(bits(a[row, 1:length]), bits(b[row, 1:length]))


@pytest.mark.axes("drafter", "exit", full=("drafter", "dtype", "exit", "trunk"))
def test_distillation_learns(losses):
    """Forty updates on the verifier's own text bring the loss well down."""
    assert np.all(np.isfinite(losses))
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


@pytest.mark.axes("drafter", "exit", full=("drafter", "dtype", "exit", "trunk"))
def test_online_update_moves_the_drafter_alone(case, case_model):
    """A fast update on a rollout of the case's drafter: finite, every trained part moves, the old model still works."""
    state = decoded(case, case_model)
    lengths = np.array([len(prompt) for prompt in PROMPTS[: case.batch]], np.int32)
    windows = read_windows(state, lengths, window=int(np.max(lengths)) + NEW)
    size, taps = case_model.config.hidden_size, len(case_model.taps)
    replay = Replay.empty(2 * case.batch, windows.tokens.shape[1], size, taps)
    learner = init_learner(case_model.params, OptimizerConfig(), replay, jax.random.key(0))
    learner = learner.replace(replay=push(learner.replay, windows))
    before = jax.device_get(learner.trainable)
    with lightly_compiled():
        learner, metrics = fast_update(
            case_model.definition,
            case_model.params,
            learner,
            windows,
            np.array(True),
            objective=ObjectiveConfig(warmup=0, ramp=1, unroll_steps=UNROLLED),
            optimizer=OptimizerConfig(warmup=0),
            size=Batch(0, 1, 24),
        )
    assert np.isfinite([float(value) for value in metrics.values()]).all()
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), learner.trainable, before)
    assert any(jax.tree.leaves(moved["drafter"]))
    if case.trunk == "separate" or case.drafter == "exit_head":
        assert any(jax.tree.leaves(moved["lora_s"]))
    # The arrays that the model decodes with were not donated to the update.
    again = decoded(case, case_model)
    np.testing.assert_array_equal(again.tokens, state.tokens)


@pytest.mark.axes("drafter", "dtype", "exit", "trunk", "weights")
def test_checkpoint_round_trip(case, case_model, tmp_path):
    """Saved and loaded, the drafter is the same in every bit, its options too."""
    options = join(case_model.definition, case_model.params).drafter.config()
    manifest = replace(case_model.manifest, drafter_config=options)
    parts = jax.device_get(trained_parts(case_model.params))
    write_checkpoint(tmp_path / "saved", case_model.config, manifest, base_of(case_model), **parts)
    loaded = from_checkpoint(read_checkpoint(tmp_path / "saved"))
    assert loaded.manifest == manifest
    jax.tree.map(np.testing.assert_array_equal, loaded.params, case_model.params)


@pytest.mark.axes("drafter", "prefix", "kv", full=("drafter", "dtype", "exit", "trunk", "prefix", "kv"))
def test_memory_counts_the_state_to_the_byte(case, case_model):
    sizes = Sizes(case.batch, 64, case.draft_steps + 1, prompt=16, record=True, prefix=16 if case.prefix else 0)
    state = jax.eval_shape(lambda: decoded(case, case_model))
    counted = estimate_memory(case_model, sizes._replace(slots=state.tokens.shape[1]))
    assert counted.state == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@pytest.mark.axes("drafter")
def test_more_drafts_than_a_block_has_are_refused(case, case_model):
    most = case_model.max_drafts
    if most is None:
        assert choose_plan(case_model, DecodeConfig(draft_steps=16)).drafts == 16
        return
    with pytest.raises(UserError, match=f"block:{most + 1}: drafter {case.drafter} drafts at most {most}"):
        choose_plan(case_model, DecodeConfig(draft_steps=most + 1))


@pytest.mark.axes("drafter")
def test_a_plan_of_the_other_kind_is_refused(case, case_model):
    other, right = "block:2", "chain:N, tree:ROWS or early-exit:N"
    if case.drafts_blocks:
        other, right = "chain:2", "block:N or tree:ROWS"
    with pytest.raises(UserError, match=f"plan {other}: drafter {case.drafter} takes {right}"):
        choose_plan(case_model, DecodeConfig(plan=other))
