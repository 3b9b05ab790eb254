"""The accounting of memory: equal to what is really allocated, and a refusal with the numbers where it will not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dvi_jax.checkpoint import Manifest
from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.decode import memory
from dvi_jax.decode.batch import make_sampling, start
from dvi_jax.decode.memory import MIB, Sizes, check, estimate_memory, measure_memory
from dvi_jax.decode.prefill import cache_slots
from dvi_jax.decode.prefix import make_prefix
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import Knobs
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import split
from dvi_jax.presets import TINY

SETTINGS = DecodeConfig(draft_steps=2, max_new_tokens=8)
PROMPTS = [list(range(1, 21)), list(range(5, 15))]  # padded to 24; then 8 new tokens and the width, 3
SIZES = Sizes(batch=2, slots=cache_slots(24 + 8 + 3), width=3, prompt=24)


def begin(model: LoadedModel, *, record: bool = False):
    return start(model, PROMPTS, SETTINGS, Knobs.make(2, 0.0, ()), record=record)


def array_bytes(tree: object) -> int:
    """What the arrays take on the device, each counted once."""
    return sum({id(leaf): leaf.nbytes for leaf in jax.tree.leaves(tree)}.values())


@pytest.fixture(scope="module")
def fused() -> LoadedModel:
    """bfloat16 with float32 trained parts, a separate trunk, both LoRA sets, a drafter with a cache."""
    config = replace(TINY, num_layers=2)
    base = random_base(config, jax.random.key(0), jax.numpy.bfloat16, std=0.3)
    manifest = Manifest(
        source="random",
        source_sha256="",
        dtype="bfloat16",
        exit_layer=1,
        drafter="fused",
        lora={"rank_s": 4, "rank_d": 4},
    )
    return LoadedModel(config, manifest, *split(build_model(config, manifest, base)))


def test_equals_what_is_allocated(fused):
    budget = estimate_memory(fused, SIZES._replace(record=True))
    state = begin(fused, record=True)
    assert budget.sizes.slots == state.tokens.shape[1]
    for name in ("shallow", "deep", "trunk"):
        assert budget.caches[name] == array_bytes(getattr(state, name)) > 0
    assert budget.drafter == array_bytes(state.drafter) > 0
    assert budget.signals == array_bytes(state.signals) > 0
    assert budget.state == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for kind in ("base", "drafter", "lora_s", "lora_d"):
        assert budget.weights[kind] == array_bytes(getattr(fused.params, kind)) > 0
    both = array_bytes((fused.params, fused.decode_params))
    assert sum(budget.weights.values()) == both > array_bytes(fused.params)
    assert sum(budget.parts().values()) == budget.total == both + budget.state + budget.workspace
    assert estimate_memory(fused, SIZES).held == both  # the copies for decoding were made by now


def test_prefix_and_sampling_are_counted(make_tiny):
    model, shared = make_tiny(layers=2), list(range(1, 11))  # a prefix of 10 is padded to 16
    prompts, prefix = [shared + prompt for prompt in PROMPTS], make_prefix(model, shared)
    sampling = make_sampling(model, prompts, SamplingConfig())
    state = start(model, prompts, SETTINGS, Knobs.make(2, 0.0, ()), sampling=sampling, prefix=prefix)
    budget = estimate_memory(model, SIZES._replace(coupled=True, prefix=16))
    assert budget.prefix == sum(leaf.nbytes for leaf in jax.tree.leaves(prefix.filled)) > 0
    assert budget.state == sum(leaf.nbytes for leaf in jax.tree.leaves(state)) > estimate_memory(model, SIZES).state
    assert budget.total == sum(budget.weights.values()) + budget.state + budget.prefix + budget.workspace


def test_before_loading(make_tiny):
    model = make_tiny(layers=2)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.params)
    assert estimate_memory(model.with_params(shapes), SIZES) == replace(estimate_memory(model, SIZES), held=0)


def test_plan_knows_the_workspace_and_compiles_ahead(make_tiny):
    model, compiled = make_tiny(layers=2), []
    budget = measure_memory(model, SIZES)
    estimate = estimate_memory(model, SIZES)
    assert budget.exact
    assert not estimate.exact
    assert estimate.state == budget.state
    assert estimate.workspace / 4 < budget.workspace < 4 * estimate.workspace

    def note(event: str, seconds: float, **facts: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(facts.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        state, knobs = begin(model), Knobs.make(2, 0.0, ())
        program = decode_rounds.lower(model.definition, model.decode_params, state, knobs, SIZES.plan).compile()
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not {"jit(prefill)", "jit(decode_rounds)"} & set(compiled)
    assert budget.decode_workspace >= program.memory_analysis().temp_size_in_bytes > 0


def test_refusal_names_the_numbers(make_tiny):
    budget = replace(
        estimate_memory(make_tiny(layers=2), SIZES),
        sizes=SIZES._replace(slots=48),
        weights={"base": 12 * MIB, "drafter": MIB},
        caches={"shallow": 30 * MIB, "deep": 50 * MIB},
        drafter=0,
        signals=0,
        tokens=0,
        prefill_workspace=3 * MIB,
        decode_workspace=MIB,
        exact=True,
    )
    check(budget, 96 * MIB)
    with pytest.raises(UserError) as refusal:
        check(budget, 96 * MIB - 1)
    assert str(refusal.value) == (
        "batch 2 with 48 cache slots needs 96.0 MiB (weights 13.0, caches 80.0, workspace 3.0)"
        " but the limit is 96.0 MiB: lower the batch, the new tokens or the length of the prompts"
    )
    check(replace(budget, exact=False), 93 * MIB)  # an estimate refuses nothing
    with pytest.raises(UserError, match=r"workspace about 3\.0"):
        check(replace(budget, exact=False), 93 * MIB - 1)


def test_too_large_is_refused_before_compiling(make_tiny, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: pytest.fail("compiled"))
    with pytest.raises(UserError, match=r"batch 100000000 .* but the device has"):
        measure_memory(make_tiny(layers=2), SIZES._replace(batch=100_000_000))


def test_room_on_an_accelerator(make_tiny, monkeypatch):
    """The pool's limit less what is in use; the model itself is in use already and not needed twice."""

    class Device:
        def __init__(self, in_use: int):
            self.in_use = in_use

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 100 * MIB, "bytes_in_use": self.in_use}

    budget = replace(estimate_memory(make_tiny(layers=2), SIZES), weights={"base": 60 * MIB}, held=60 * MIB)
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [Device(60 * MIB)])
    check(budget)
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [Device(100 * MIB)])
    with pytest.raises(UserError, match=r"but the device has 60\.0 MiB"):
        check(budget)


def test_room_on_the_cpu():
    """Against what Linux says itself, as far as that stands still."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    assert memory.available_bytes() == pytest.approx(1024 * int(lines["MemAvailable"].split()[0]), rel=0.2)
