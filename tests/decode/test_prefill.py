"""Prefill in chunks and on shared prefixes: against the original's numbers, and against one pass over the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.checkpoint import Manifest
from dvi_jax.config import DecodeConfig
from dvi_jax.decode import prefill as module
from dvi_jax.decode.batch import slots_for
from dvi_jax.decode.prefill import bucket, prefill
from dvi_jax.decode.prefix import Prefix, make_prefix, pad_prompts
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.model import attention
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import split
from dvi_jax.presets import TINY

WIDTH = 4
KNOBS = Knobs.make(WIDTH - 1, 0.0, ())
# Of the golden models one with every key head shared by several query heads; the other: make full.
OF_BOTH = pytest.mark.parametrize("golden", ["gqa_tied", pytest.param("mha", marks=pytest.mark.full)], indirect=True)


@pytest.fixture
def small_chunks(monkeypatch) -> Iterator[None]:
    """Prompts go through 16 tokens at a time; programs traced with the usual chunks are not used, nor kept these."""
    monkeypatch.setattr(module, "LONGEST_CHUNK", 16)
    prefill.clear_cache()
    yield
    prefill.clear_cache()


@pytest.fixture(scope="module")
def fused() -> LoadedModel:
    """A separate trunk and a drafter with a cache that depends on the feature of the position before."""
    config = replace(TINY, num_layers=2)
    base = random_base(config, jax.random.key(0), std=0.3)
    manifest = Manifest(
        source="random",
        source_sha256="",
        dtype="float32",
        exit_layer=1,
        drafter="fused",
        lora={"rank_s": 4, "rank_d": 4},
    )
    return LoadedModel(config, manifest, *split(build_model(config, manifest, base)))


def begin(
    model: LoadedModel, prompts: Sequence[Sequence[int]], prefix: Prefix | None = None, *, slots: int = 128
) -> DecodeState:
    """Prefilled with learning signals, 64 tokens to go."""
    tokens, lengths = pad_prompts(prompts, prefix)
    arguments = tokens, lengths, lengths + 64, KNOBS.eos_ids
    filled = None if prefix is None else prefix.filled
    return prefill(
        model.definition, model.decode_params, *arguments, slots=slots, width=WIDTH, record=True, prefix=filled
    )


def finish(model: LoadedModel, state: DecodeState) -> list[list[int]]:
    state = jax.device_get(decode_rounds(model.definition, model.decode_params, state, KNOBS))
    return [row[:length].tolist() for row, length in zip(state.tokens, state.length, strict=True)]


def check_same_state(state: DecodeState, expected: DecodeState) -> None:
    """Equal to rounding in all that decoding and learning read; what lies behind a prompt is free."""
    state, expected = jax.device_get((state, expected))
    np.testing.assert_array_equal(state.tokens, expected.tokens)
    np.testing.assert_array_equal(state.length, expected.length)
    pairs = [
        (state.committed.hidden, expected.committed.hidden),
        (state.committed.features.final, expected.committed.features.final),
    ]
    for row, length in enumerate(np.asarray(state.length) - 1):
        pairs.append([s.signals.features.final[row, : length + 1] for s in (state, expected)])
        caches = [jax.tree.leaves((s.shallow, s.deep, s.trunk, s.drafter)) for s in (state, expected)]
        assert len(caches[0]) == 2 * (2 + 1 + 1)  # layers, those of the trunk, the drafter's
        pairs += [[leaf[row, :, :length] for leaf in pair] for pair in zip(*caches, strict=True)]
    for found, wanted in pairs:
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-5)


@OF_BOTH
def test_chunks_against_the_original(golden, small_chunks):
    """Rows of 3 to 33 tokens in three chunks: hidden states of the PyTorch original, ids of transformers 4.33.3."""
    model, prompts = golden.model, [run["prompt"] for run in golden.runs]
    state = begin(model, prompts)
    features, hidden = jax.device_get((state.signals.features.final, state.committed.hidden))
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(features[row, 1 : len(prompt) + 1], golden.stages[f"hidden_last_{row}"], atol=1e-5)
        np.testing.assert_allclose(hidden[row, 0], golden.stages[f"hidden_exit_{row}"][-1], atol=1e-5)
    for run, ids in zip(golden.runs, finish(model, state), strict=True):
        count = min(len(ids), len(run["greedy_ids"]))
        assert ids[:count] == run["greedy_ids"][:count]


@OF_BOTH
def test_prefix_against_transformers(golden):
    """Beginnings of one greedy sequence: each goes on as that sequence does, also one that is the prefix itself."""
    (run,) = [run for run in golden.runs if len(run["prompt"]) == 33]
    sequence = run["greedy_ids"]
    prefix = make_prefix(golden.model, sequence[:33])
    state = begin(golden.model, [sequence[:length] for length in (33, 34, 35, 40, 45, 50, 60, 63)], prefix)
    features = np.asarray(state.signals.features.final)[-1, 1:34]
    np.testing.assert_allclose(features, golden.stages[f"hidden_last_{golden.runs.index(run)}"], atol=1e-5)
    for ids in finish(golden.model, state):
        assert ids[: len(sequence)] == sequence


def test_one_state_however_prefilled(fused, small_chunks, monkeypatch):
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 64, 20).tolist()
    prompts = [shared + rng.integers(0, 64, count).tolist() for count in (37, 12, 0)]
    prefix = make_prefix(fused, shared)
    in_chunks, on_prefix = begin(fused, prompts), begin(fused, prompts, prefix)
    monkeypatch.setattr(module, "LONGEST_CHUNK", 1024)
    prefill.clear_cache()
    whole = begin(fused, prompts)
    check_same_state(in_chunks, whole)
    check_same_state(on_prefix, whole)
    # The shared slots are copies: the same bits in every row of every batch.
    copied, original = (jax.tree.leaves(jax.device_get(x.deep)) for x in (on_prefix, prefix.filled))
    for cache, rows in zip(copied, original, strict=True):
        for row in cache[:, :, :20]:
            np.testing.assert_array_equal(row, rows[0, :, :20])


def test_8_bits_are_the_same_in_chunks(make_tiny, small_chunks, monkeypatch):
    """But for roundings of a row that lie just at a half: those are a step apart, and rare."""
    model = make_tiny(layers=2).with_kv("int8")
    prompts = [np.random.default_rng(0).integers(0, 64, count).tolist() for count in (45, 20)]
    in_chunks = begin(model, prompts)
    monkeypatch.setattr(module, "LONGEST_CHUNK", 1024)
    prefill.clear_cache()
    whole = begin(model, prompts)
    np.testing.assert_array_equal(in_chunks.tokens, whole.tokens)
    for cache, other in zip((*in_chunks.shallow, *in_chunks.deep), (*whole.shallow, *whole.deep), strict=True):
        for rows, same in zip(cache, other, strict=True):
            values, others = (np.asarray(kept.values[0, :, :45], np.int32) for kept in (rows, same))
            assert np.abs(values).max() == 127
            assert np.abs(values - others).max() <= 1
            assert np.mean(values != others) < 1e-3
            np.testing.assert_allclose(rows.scales[0, :, :45], same.scales[0, :, :45], rtol=1e-3)


def test_prefixes_of_one_bucket_share_a_program(make_tiny, monkeypatch):
    traced, model = [], make_tiny(layers=2)
    original = module.fill
    monkeypatch.setattr(module, "fill", lambda *args, **options: traced.append(1) or original(*args, **options))
    for length in (17, 20, 24):
        prompt = list(range(length + 1))
        begin(model, [prompt], make_prefix(model, prompt[:length]), slots=256)
    assert len(traced) == 1


def test_workspace_grows_with_the_prompt_not_its_square(make_tiny, monkeypatch):
    model = make_tiny(layers=2)

    def workspace(chunk: int, tokens: int) -> int:
        monkeypatch.setattr(module, "LONGEST_CHUNK", chunk)
        prefill.clear_cache()
        prompts, count = jnp.zeros((1, tokens), jnp.int32), jnp.full((1,), tokens, jnp.int32)
        arguments = model.decode_params, prompts, count, count + 8, KNOBS.eos_ids
        program = prefill.lower(model.definition, *arguments, slots=2 * tokens, width=WIDTH).compile()
        return program.memory_analysis().temp_size_in_bytes

    half, full, whole = workspace(64, 512), workspace(64, 1024), workspace(1024, 1024)
    prefill.clear_cache()
    assert full < 2.2 * half
    assert full < whole / 5


def test_fused_attention_is_the_same_attention(monkeypatch):
    """The call that cuDNN gets, by its plain implementation: 72 rows of two sequences over what lies before them."""
    heads, start, rng = (4, 2, 8), 9, np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(1, 2, 72, 64)), jnp.float32)
    shape = (2, 2, 96, 8)
    cache = attention.LayerCache(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)))
    positions = jnp.broadcast_to(start + jnp.arange(72), (2, 72))
    rope = attention.rope_tables(attention.rope_frequencies(8, 10000.0, None), positions)

    def both() -> tuple[jax.Array, attention.LayerCache, jax.Array]:
        fresh, _ = attention.attend_fresh(qkv, heads, rope, None, positions)
        return *attention.attend_cached(qkv, heads, rope, cache, positions), fresh

    plain, filled, fresh = jax.jit(both)()
    monkeypatch.setattr(attention, "has_gpu_kernels", lambda dtype: True)
    monkeypatch.setattr(attention, "CUDNN", "xla")
    monkeypatch.setattr(attention, "attend", None)
    fused, other, fused_fresh = jax.jit(lambda: both())()
    np.testing.assert_allclose(fused, plain, atol=1e-5)
    np.testing.assert_allclose(fused_fresh, fresh, atol=1e-5)
    np.testing.assert_array_equal(other.key, filled.key)


def test_chunks_get_shorter_with_the_batch(monkeypatch):
    assert [module.chunk_tokens(batch, jnp.float32) for batch in (1, 4, 5, 32, 512)] == [1024, 1024, 512, 128, 128]
    monkeypatch.setattr(module, "has_gpu_kernels", lambda dtype: True)
    assert [module.chunk_tokens(batch, jnp.bfloat16) for batch in (1, 4, 32, 512)] == [4096, 4096, 512, 128]


def test_every_bucket_divides_into_chunks():
    for size in sorted({bucket(size) for size in range(1, 70_000, 7)}):
        for chunk in (128, 256, 512, 1024, 2048, 4096):
            assert size % -(-size // chunk) == 0


def test_slots_have_room_for_the_padding_behind_a_prefix():
    """Cache slots follow the whole prompt; what is written ends at the prefix's length plus a bucket."""
    fewest = DecodeConfig(draft_steps=0, max_new_tokens=1)
    for length in range(2, 600, 3):
        slots = slots_for(length, fewest)
        assert all(shared + bucket(length - shared) <= slots for shared in range(1, length + 1))
        assert bucket(length) <= slots


def test_refusals(make_tiny):
    model = make_tiny(layers=2)
    prefix = make_prefix(model, [5, 6, 7])
    for prompt in ([5, 6], [5, 6, 8, 9]):
        with pytest.raises(UserError, match="prompt 1 does not begin with the 3 tokens of the shared prefix"):
            pad_prompts([[5, 6, 7, 1], prompt], prefix)
    for ids in ([], [1] * 256):
        with pytest.raises(UserError, match="a prefix has 1 to 255 tokens, got"):
            make_prefix(model, ids)
    with pytest.raises(UserError, match="prefix ids must be between 0 and 63"):
        make_prefix(model, [64])
    with pytest.raises(ValueError, match="pad them to a bucket"):
        prefill.lower(
            model.definition,
            model.decode_params,
            jnp.zeros((1, 1025), jnp.int32),
            *[jnp.ones(1, jnp.int32)] * 2,
            KNOBS.eos_ids,
            slots=2048,
            width=WIDTH,
        )
