"""What experiments share: device facts, results on disk, copy bandwidth, byte floors, and timed rounds.

Times are medians of repetitions after a first one that compiles; every reading waits for the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.checkpoint import Manifest
from dvi_jax.config import LlamaConfig
from dvi_jax.decode.memory import Sizes, abstract_state
from dvi_jax.decode.plan import Plan
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.model.drafters import Committed
from dvi_jax.model.kept_kv import row_bytes
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import Params, split
from dvi_jax.quantisation import Quantisation
from experiments.random_weights import random_quantised_base

WAKE_SECONDS = 1.0


def environment() -> dict[str, str]:
    """Device and versions, for the head of a result."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
    }


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """A command's options for its result: names of files and folders without where they lay on this machine."""
    paths = {"checkpoint", "data", "drafter_from"}
    values = {name: value for name, value in vars(options).items() if name != "out" and not callable(value)}
    return {
        name: Path(value).name if isinstance(value, Path) or (name in paths and isinstance(value, str)) else value
        for name, value in values.items()
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, a number that is none as null; `UserError` where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_without_nan(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value


def median_seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of `function()`, whose result is waited for; one call before the first is not counted."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def copy_bandwidth(gigabytes: float) -> float:
    """Bytes read plus written per second by a device-to-device copy."""
    x = jnp.ones(int(gigabytes * 1e9) // 4, jnp.float32)
    copy = jax.jit(lambda v: v + 1)
    began = time.perf_counter()
    while time.perf_counter() - began < WAKE_SECONDS:  # a device that was idle copies at two thirds of its speed
        jax.block_until_ready(copy(x))
    return 2 * x.nbytes / median_seconds(lambda: copy(x), 10)


def random_model(
    config: LlamaConfig,
    dtype: str,
    exit_layer: int,
    drafter: str = "exit_head",
    quantisation: Quantisation | None = None,
) -> LoadedModel:
    """Random weights of a published shape, made on the device, in fewer bits if asked for; the drafter untrained."""
    options = {"rank": 0} if drafter == "exit_head" else {}
    manifest = Manifest(
        source="random",
        source_sha256="",
        dtype=dtype,
        exit_layer=exit_layer,
        drafter=drafter,
        drafter_config=options,
        quantisation=quantisation,
    )
    return LoadedModel(config, manifest, *split(build_model(config, manifest, random_weights(config, manifest))))


def random_weights(config: LlamaConfig, manifest: Manifest) -> dict[str, Any]:
    """The same base tree whenever it is asked for, kept as the manifest says."""
    key, kind = jax.random.key(0), jnp.dtype(manifest.dtype)
    if manifest.quantisation:
        return random_quantised_base(config, key, kind, manifest.quantisation)
    return random_base(config, key, kind)


def abstract_model(
    config: LlamaConfig,
    dtype: str,
    exit_layer: int,
    drafter: str = "exit_head",
    quantisation: Quantisation | None = None,
) -> LoadedModel:
    """The same with shapes in place of arrays: to compile for, or to count, without any memory."""
    made = []

    def params() -> Params:
        made.append(random_model(config, dtype, exit_layer, drafter, quantisation))
        return made[0].params

    shapes = jax.eval_shape(params)
    return made[0].with_params(shapes)


def filled_state(model: LoadedModel, batch: int, slots: int, width: int, length: int, new_tokens: int) -> DecodeState:
    """A state after a prompt of `length` random tokens, made without a prefill: the caches hold a pattern.

    For timing, which no value changes but accept lengths. Decoding goes on for `new_tokens`, which must fit in `slots`.
    """
    empty = jax.tree.map(_pattern, abstract_state(model, Sizes(batch, slots, width, prompt=16)))
    count = jnp.full((batch,), length, jnp.int32)
    tokens = jax.random.randint(jax.random.key(0), (batch, slots), 3, model.config.vocab_size, jnp.int32)
    committed = Committed(empty.committed.hidden, empty.committed.features, count - 1, jnp.ones_like(count))
    return empty.replace(tokens=tokens, length=count + 1, limit=count + new_tokens, committed=committed)


def _pattern(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Finite values that differ for floats and what is kept in 8 bits, since zeros would spare the device power."""
    if not (jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.int8):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return _waves(leaf.shape, leaf.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _waves(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    waves = jnp.sin(jnp.arange(prod(shape), dtype=jnp.float32)).reshape(shape)
    return (waves * (127 if dtype == jnp.int8 else 1)).astype(dtype)


@dataclass(frozen=True)
class Floor:
    """Fewest bytes a round must read: weights once for each pass over them, and the keys and values in the context."""

    row_bytes: int  # shallow weights, for one row
    draft_bytes: int  # what one draft reads besides: the head (drafters of their own weights add theirs)
    verify_bytes: int  # deep weights and head
    kv_bytes: int  # per position, all layers

    def bytes(self, drafts: float, context: float) -> float:
        """Bytes of a round that drafts `drafts` tokens at a mean context length."""
        return self.row_bytes * (drafts + 1) + self.draft_bytes * drafts + self.verify_bytes + self.kv_bytes * context


def floor_of(model: LoadedModel, batch: int = 1) -> Floor:
    """The floor of a model's rounds; gathers from the embedding are not counted."""
    config, params = model.config, model.decode_params  # what is read: the drafter in the decoding dtype
    base = params.base["llama"]
    layers = [_bytes(base["layers"][i]) for i in range(config.num_layers)]
    head = base.get("head", base["embed"])
    draft_head = params.base.get("draft_vocabulary", {}).get("head", head)
    exit_layer = model.manifest.exit_layer
    kept = row_bytes(config.head_dim, model.manifest.dtype, model.kv)
    return Floor(
        row_bytes=sum(layers[:exit_layer]),
        draft_bytes=_bytes((draft_head, params.drafter, params.lora_s)),
        verify_bytes=sum(layers[exit_layer:]) + _bytes(head),
        kv_bytes=batch * 2 * config.num_kv_heads * kept * config.num_layers,
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class Timing:
    """Medians over repetitions of one setting."""

    round_ms: float
    spread: float  # (slowest - fastest repetition) / median
    rounds: int
    drafted_per_round: float
    tokens_per_round: float
    tokens_per_second: float


def compile_decode(
    model: LoadedModel, state: DecodeState, plan: Plan | None = None
) -> tuple[jax.stages.Compiled, float]:
    """The decode loop compiled for states like this one, and the seconds that tracing and compiling took."""
    began = time.perf_counter()
    program = decode_rounds.lower(model.definition, model.decode_params, state, Knobs.make(0, 0.0, ()), plan).compile()
    return program, time.perf_counter() - began


def time_decode(
    program: jax.stages.Compiled, model: LoadedModel, fresh: Callable[[], DecodeState], drafts: int, repeats: int
) -> Timing:
    """Decode `fresh()` states to their limits with `drafts` drafts a round and no end-of-sequence id."""
    knobs, times = Knobs.make(drafts, 0.0, ()), []
    state: DecodeState | None = None
    for _ in range(repeats + 1):
        del state  # two states at once might not fit
        state = jax.block_until_ready(fresh())
        began = time.perf_counter()
        state = jax.block_until_ready(program(model.decode_params, state, knobs))
        times.append(time.perf_counter() - began)
    assert state is not None
    seconds, (batch,) = statistics.median(times[1:]), state.length.shape
    rounds, tokens, drafted = int(state.rounds), int(np.sum(state.accept_lengths)), int(np.sum(state.drafted))
    return Timing(
        round_ms=1e3 * seconds / rounds,
        spread=(max(times[1:]) - min(times[1:])) / seconds,
        rounds=rounds,
        drafted_per_round=drafted / rounds / batch,
        tokens_per_round=tokens / rounds / batch,
        tokens_per_second=tokens / seconds,
    )
