"""What an engine needs of the device's memory, counted before any of it is taken."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax

from dvi_jax.decode.memory import available_bytes, cast_bytes, held_bytes, readable
from dvi_jax.decode.prefill import PREFIX_SPECS
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import bytes_of, replicas, shards
from dvi_jax.serve.prompts import empty_prompts
from dvi_jax.serve.slots import SLOT_SPECS, Shape, abstract_slots


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of an engine on each device, by what they are for.

    Exact but for the workspace, what the host gives and the `gaps` for it.
    """

    shape: Shape
    weights: int  # with the copies that decoding casts to its dtype
    slot: int  # of one slot: caches, the drafter's state, learning signals, tokens
    intake: int  # where prompts are taken in before they have slots
    prefixes: int  # beginnings of prompts, at most
    workspace: int  # logits of a round, read while others are written: the largest of what programs need besides
    held: int  # of these, on the device already

    @property
    def total(self) -> int:
        """Bytes needed at the fullest moment."""
        return self.weights + self.shape.slots * self.slot + self.intake + self.prefixes + self.workspace

    def describe(self) -> str:
        """One line: the total, and what it consists of."""
        return (
            f"{self.shape.slots} slots of {self.shape.room} positions need {readable(self.total)} (weights"
            f" {readable(self.weights)}, each slot {readable(self.slot)}, prompts {readable(self.intake)}, shared"
            f" prefixes {readable(self.prefixes)}, workspace about {readable(self.workspace)})"
        )


def engine_memory(model: LoadedModel, shape: Shape, prefix_bytes: int) -> EngineMemory:
    """The memory of an engine of this shape.

    The model's arrays may be `jax.ShapeDtypeStruct`s.
    """
    mesh = model.definition.mesh
    params = jax.eval_shape(lambda params: model.with_params(params).decode_params, model.params)
    slots = abstract_slots(model.definition, params, shape)
    all_slots, first = bytes_of(mesh, slots, SLOT_SPECS), slots.first.size * slots.first.dtype.itemsize
    prompts = partial(empty_prompts, model.definition, rows=shape.together, room=shape.room, record=shape.record)
    return EngineMemory(
        shape=shape,
        weights=bytes_of(mesh, model.params) + cast_bytes(model),
        slot=(all_slots - first) // shape.slots,
        intake=bytes_of(mesh, jax.eval_shape(prompts, params), PREFIX_SPECS) + first,
        prefixes=prefix_bytes,
        workspace=2 * 4 * shape.slots * shape.width * model.config.vocab_size // (replicas(mesh) * shards(mesh)),
        held=held_bytes(model),
    )


def check_engine_memory(memory: EngineMemory, limit: int | None = None) -> None:
    """Raise `UserError` with the numbers unless the engine fits into `limit` bytes.

    Without a limit, into what the device has left. The estimated workspace is shown but refuses nothing.
    """
    room = available_bytes() + memory.held if limit is None else limit
    if memory.total - memory.workspace > room:
        owner = "the limit is" if limit is not None else "the device has"
        raise UserError(
            f"{memory.describe()} but {owner} {readable(room)}: lower the slots, the context or the prefixes"
        )
