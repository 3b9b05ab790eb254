"""What the speed experiments share: device facts, copy bandwidth, byte floors, and timed rounds.

Times are medians of repetitions after a first one that compiles; every reading waits for the device.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.checkpoint import Manifest
from dvi_jax.config import DecodeConfig, LlamaConfig
from dvi_jax.decode.generate import start
from dvi_jax.decode.speculative import decode
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.load import LoadedModel, build_model
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import split


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
    values = {name: value for name, value in vars(options).items() if name != "out"}
    return {name: Path(value).name if name in paths and value else value for name, value in values.items()}


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
    return 2 * x.nbytes / median_seconds(lambda: copy(x), 10)


def random_model(config: LlamaConfig, dtype: str, exit_layer: int, drafter: str = "exit_head") -> LoadedModel:
    """Random weights of a published shape, made on the device; the drafter untrained."""
    options = {"rank": 0} if drafter == "exit_head" else {}
    manifest = Manifest("random", "", dtype, exit_layer, drafter, options)
    base = random_base(config, jax.random.key(0), jnp.dtype(dtype))
    return LoadedModel(config, manifest, *split(build_model(config, manifest, base)))


@dataclass(frozen=True)
class Floor:
    """Fewest bytes a round must read: weights once for each pass over them, and the keys and values in the context."""

    row_bytes: int  # shallow weights, for one row
    draft_bytes: int  # what one draft reads besides: the head (drafters of their own weights add theirs)
    verify_bytes: int  # deep weights and head
    kv_bytes: int  # per position, all layers

    def bytes(self, drafts: int, context: float) -> float:
        """Bytes of a round that drafts `drafts` tokens at a mean context length."""
        return self.row_bytes * (drafts + 1) + self.draft_bytes * drafts + self.verify_bytes + self.kv_bytes * context


def floor_of(model: LoadedModel, batch: int = 1) -> Floor:
    """The floor of a model's rounds; gathers from the embedding are not counted."""
    config, base = model.config, model.params.base["llama"]
    layers = [sum(leaf.nbytes for leaf in jax.tree.leaves(base["layers"][i])) for i in range(config.num_layers)]
    head = base["embed" if config.tie_word_embeddings else "head"].nbytes
    drafter = sum(leaf.nbytes for leaf in jax.tree.leaves((model.params.drafter, model.params.lora_s)))
    exit_layer, item = model.manifest.exit_layer, jnp.dtype(model.manifest.dtype).itemsize
    return Floor(
        row_bytes=sum(layers[:exit_layer]),
        draft_bytes=head + drafter,
        verify_bytes=sum(layers[exit_layer:]) + head,
        kv_bytes=batch * 2 * config.num_kv_heads * config.head_dim * item * config.num_layers,
    )


@dataclass(frozen=True)
class Timing:
    """Medians over repetitions of one setting."""

    compile_seconds: float
    round_ms: float
    rounds: int
    tokens_per_second: float
    tokens_per_round: float
    state: DecodeState  # of the last repetition


def time_decode(
    model: LoadedModel,
    prompts: list[list[int]],
    settings: DecodeConfig,
    *,
    plain: bool = False,
    repeats: int = 5,
    prepare: Callable[[DecodeState], DecodeState] = lambda state: state,
) -> Timing:
    """Decode `prompts` repeatedly, no eos; `prepare` may change the prefilled state."""
    knobs = Knobs.make(0 if plain else settings.draft_steps, settings.threshold, ())
    began = time.perf_counter()
    program = decode.lower(model.graphdef, model.decode_params, start(model, prompts, settings, knobs), knobs).compile()
    compile_seconds = time.perf_counter() - began
    times = []
    for _ in range(repeats + 1):
        state = jax.block_until_ready(prepare(start(model, prompts, settings, knobs)))
        began = time.perf_counter()
        state = jax.block_until_ready(program(model.decode_params, state, knobs))
        times.append(time.perf_counter() - began)
    seconds, rounds = statistics.median(times[1:]), int(state.rounds)
    tokens = int(np.sum(state.accept_lengths))
    return Timing(
        compile_seconds=compile_seconds,
        round_ms=1e3 * seconds / rounds,
        rounds=rounds,
        tokens_per_second=tokens / seconds,
        tokens_per_round=tokens / rounds / len(prompts),
        state=state,
    )
