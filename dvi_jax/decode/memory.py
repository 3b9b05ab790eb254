"""What a generation needs of the device's memory, counted before any of it is allocated; of each device's on a mesh.

Weights, caches and the rest of the state are counted exactly: their shapes come from the very functions that make them,
run on shapes alone. What prefill and decoding need while they run is estimated from the traced programs (`account`), or
known to the byte once these are compiled (`plan`); compiled ahead from shapes, they serve the calls that come later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import psutil

from dvi_jax.config import SamplingConfig
from dvi_jax.containers import container_bytes
from dvi_jax.decode.plan import Plan
from dvi_jax.decode.prefill import PREFIX_SPECS, Filled, prefill
from dvi_jax.decode.prefix import fill_prefix
from dvi_jax.decode.sampling import Sampling
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import STATE_SPECS, DecodeState, Knobs
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import bytes_of, check_batch
from dvi_jax.model.speculative_llama import Params

GIB, MIB = 2**30, 2**20
CACHES = ("shallow", "deep", "trunk")  # fields of the state that hold keys and values of the base model's layers
_TENSOR = re.compile(r"tensor<((?:\d+x)+)([a-z]+\d+)\w*>")  # in StableHLO, such as 8x6x32000xf32 or 2x64xf8E4M3FN


class Sizes(NamedTuple):
    """What a generation's memory depends on, besides the model."""

    batch: int
    slots: int  # positions in the caches
    width: int  # rows of a sequence in a round
    prompt: int  # tokens that prompts, behind a shared prefix, are padded to
    record: bool = False  # keep learning signals
    coupled: bool | None = None  # how it samples; None: greedily
    prefix: int = 0  # tokens that a shared prefix is padded to; 0: there is none
    plan: Plan | None = None  # how it drafts; None: as suits drafter and device


@dataclass(frozen=True)
class Budget:
    """Bytes of one generation, by what they are for. `held` of them lie on the device already."""

    sizes: Sizes
    weights: Mapping[str, int]  # base, drafter, lora_s, lora_d; decode_copies: parts cast to the decoding dtype
    caches: Mapping[str, int]  # shallow, deep; trunk, of a separate trunk
    drafter: int  # the drafter's state
    signals: int  # learning signals of a rollout
    tokens: int  # token ids, counts, and all else that the state holds
    prefix: int  # the shared prefix that batches start from
    prefill_workspace: int
    decode_workspace: int
    exact: bool  # the workspaces are those of compiled programs, not estimates
    held: int

    @property
    def state(self) -> int:
        """All that the decode loop carries."""
        return sum(self.caches.values()) + self.drafter + self.signals + self.tokens

    @property
    def workspace(self) -> int:
        """The larger of the two: prefill and decoding never run together."""
        return max(self.prefill_workspace, self.decode_workspace)

    @property
    def total(self) -> int:
        """Bytes needed at the fullest moment."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Every count by name, in the order of a table; together they are `total`."""
        return {
            **{f"weights: {name}": size for name, size in self.weights.items()},
            **{f"caches: {name}": size for name, size in self.caches.items()},
            "drafter state": self.drafter,
            "learning signals": self.signals,
            "tokens and counts": self.tokens,
            "shared prefix": self.prefix,
            "workspace": self.workspace,
        }

    def describe(self) -> str:
        """One line such as `batch 8, 1024 cache slots: 14.1 GiB (weights 12.6, caches 1.2, workspace 0.3)`."""
        return f"batch {self.sizes.batch}, {self.sizes.slots} cache slots: {self.shares()}"

    def shares(self) -> str:
        """The total in GiB or MiB, and what it consists of in the same unit."""
        unit = _unit(self.total)[0]
        about = "" if self.exact else "about "
        return (
            f"{readable(self.total)} (weights {sum(self.weights.values()) / unit:.1f},"
            f" caches {(self.state + self.prefix) / unit:.1f}, workspace {about}{self.workspace / unit:.1f})"
        )


def estimate_memory(model: LoadedModel, sizes: Sizes) -> Budget:
    """The memory of one generation, its workspace estimated.

    The model's arrays may be `jax.ShapeDtypeStruct`s: a model can be judged before it is loaded. A prefix counts as
    one still to be made. `UserError` for a batch that does not divide among the mesh.
    """
    check_batch(model.definition.mesh, sizes.batch, "a batch")
    state = abstract_state(model, sizes)
    counted = (*CACHES, "drafter", "signals")
    lowered = lower_programs(model, sizes)
    known = {(leaf.shape, leaf.dtype.itemsize) for leaf in jax.tree.leaves((model.params, state))}
    mesh = model.definition.mesh

    def of_state(name: str) -> int:
        return bytes_of(mesh, getattr(state, name), getattr(STATE_SPECS, name))

    return Budget(
        sizes=sizes,
        weights={name: bytes_of(mesh, part) for name, part in model.params._asdict().items()}
        | {"decode_copies": cast_bytes(model)},
        caches={name: of_state(name) for name in CACHES},
        drafter=of_state("drafter"),
        signals=of_state("signals"),
        tokens=sum(of_state(field.name) for field in fields(state) if field.name not in counted),
        prefix=bytes_of(mesh, _abstract_prefix(model, sizes), PREFIX_SPECS if sizes.prefix else None),
        prefill_workspace=_estimate(lowered[0], known),
        decode_workspace=_estimate(lowered[1], known),
        exact=False,
        held=held_bytes(model),
    )


def measure_memory(model: LoadedModel, sizes: Sizes, limit: int | None = None) -> Budget:
    """Compile both programs of a generation and give its exact memory.

    Raises `UserError` as `check` does: before compiling where weights and caches alone are too much.
    """
    budget = estimate_memory(model, sizes)
    check(budget, limit)
    programs = [lowered.compile() for lowered in lower_programs(model, sizes)]
    exact = replace(
        budget,
        prefill_workspace=workspace_bytes(programs[0], budget.state),
        decode_workspace=workspace_bytes(programs[1], 0),
        exact=True,
    )
    check(exact, limit)
    return exact


def check(budget: Budget, limit: int | None = None) -> None:
    """Raise `UserError` with the numbers unless the budget fits into `limit` bytes.

    Without a limit, into what the device has left. An estimated workspace is shown but refuses nothing.
    """
    room = available_bytes() + budget.held if limit is None else limit  # of each device
    needed = budget.total if budget.exact else budget.total - budget.workspace
    if needed > room:
        owner = "the limit is" if limit is not None else "the device has"
        raise UserError(
            f"batch {budget.sizes.batch} with {budget.sizes.slots} cache slots needs {budget.shares()}"
            f" but {owner} {readable(room)}: lower the batch, the new tokens or the length of the prompts"
        )


def available_bytes() -> int:
    """Bytes that can still be allocated: of the fullest accelerator's pool, or of the machine's memory on the CPU.

    Of the machine's memory a container may have less (`dvi_jax/containers.py`).
    """
    pools = [stats for stats in (device.memory_stats() for device in jax.local_devices()) if stats]
    if pools and all("bytes_limit" in stats for stats in pools):
        return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in pools)
    machine, container = psutil.virtual_memory().available, container_bytes()
    return machine if container is None else min(machine, container)


def check_room(needed: int, what: str) -> None:
    """Raise `UserError` if `what` needs more bytes than there are."""
    room = available_bytes()
    if needed > room:
        raise UserError(f"{what} need {readable(needed)}, but there are {readable(room)}")


def workspace_bytes(program: jax.stages.Compiled, made: int) -> int:
    """Bytes that a program needs besides its arguments and the `made` bytes of new arrays that it is run for."""
    analysis = program.memory_analysis()
    if analysis is None:
        raise UserError("this device does not say how much memory a program takes")
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # the rest is written into donated arguments
    return analysis.temp_size_in_bytes + max(0, new - made)


def abstract_state(model: LoadedModel, sizes: Sizes) -> DecodeState:
    """Shapes and types of the state that a prefill returns; nothing is computed."""
    arrays, options, statics = _prefill_arguments(model, sizes)
    return jax.eval_shape(lambda a, o: prefill(model.definition, *a, **o, **statics), arrays, options)


def lower_programs(model: LoadedModel, sizes: Sizes) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """Prefill and the decode loop, traced and ready to compile; jax keeps both for the calls to come."""
    arrays, options, statics = _prefill_arguments(model, sizes)
    knobs = jax.eval_shape(lambda: Knobs.make(0, 0.0, ()))
    state = abstract_state(model, sizes)
    return (
        prefill.lower(model.definition, *arrays, **options, **statics),
        decode_rounds.lower(model.definition, arrays[0], state, knobs, sizes.plan),
    )


def _prefill_arguments(model: LoadedModel, sizes: Sizes) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Shapes of prefill's arrays, the named ones apart, and its static arguments: all that `start` gives it."""
    count = jax.ShapeDtypeStruct((sizes.batch,), jnp.int32)
    prompts = jax.ShapeDtypeStruct((sizes.batch, sizes.prompt), jnp.int32)
    eos_ids = jax.eval_shape(lambda: Knobs.make(0, 0.0, ())).eos_ids
    arrays = _decode_params(model), prompts, count, count, eos_ids
    options = {"sampling": _abstract_sampling(model, sizes), "prefix": _abstract_prefix(model, sizes)}
    statics = {"slots": sizes.slots, "width": sizes.width, "record": sizes.record, "branches": 0}
    return arrays, options, statics


def _abstract_sampling(model: LoadedModel, sizes: Sizes) -> Sampling | None:
    if sizes.coupled is None:
        return None
    rows = [SamplingConfig(coupled=sizes.coupled)] * sizes.batch
    return jax.eval_shape(lambda: Sampling.make(rows, [[0]] * sizes.batch, model.config.vocab_size))


def _abstract_prefix(model: LoadedModel, sizes: Sizes) -> Filled | None:
    if not sizes.prefix:
        return None
    tokens, length = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, sizes.prefix), (1,)))
    return jax.eval_shape(partial(fill_prefix, model.definition), _decode_params(model), tokens, length)


def _decode_params(model: LoadedModel) -> Params:
    """Shapes of `model.decode_params`, without making them."""
    return jax.eval_shape(lambda params: model.with_params(params).decode_params, model.params)


def cast_bytes(model: LoadedModel) -> int:
    """Bytes of the parts of `decode_params` that are copies in another type; the others are the same arrays."""
    mesh, params = model.definition.mesh, model.params
    copies = jax.tree.map(lambda leaf, cast: cast if leaf.dtype != cast.dtype else None, params, _decode_params(model))
    return bytes_of(mesh, copies)


def held_bytes(model: LoadedModel) -> int:
    """Bytes of the model that are on each device already, copies for decoding included once they were made."""
    held = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else None, model.params)
    return bytes_of(model.definition.mesh, held) + ("decode_params" in vars(model)) * cast_bytes(model)


def _estimate(lowered: jax.stages.Lowered, known: set[tuple[tuple[int, ...], int]]) -> int:
    """Twice the largest array between a program's operations: one is read while the next is written.

    Arrays shaped as a weight or as a part of the state (`known`: shape and item size) are those, updated in place.
    """
    sizes = [0]
    for dimensions, dtype in set(_TENSOR.findall(lowered.as_text())):
        shape = tuple(map(int, dimensions.split("x")[:-1]))
        item = max(1, int(re.sub(r"\D", "", dtype)) // 8)
        if (shape, item) not in known:
            sizes.append(prod(shape) * item)
    return 2 * max(sizes)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes of arrays, in a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _unit(size: int) -> tuple[int, str]:
    return (GIB, "GiB") if size >= GIB else (MIB, "MiB")


def readable(size: int) -> str:
    """Bytes for people, in MiB or GiB."""
    unit, name = _unit(size)
    return f"{size / unit:.1f} {name}"
