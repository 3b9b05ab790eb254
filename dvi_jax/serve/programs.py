"""An engine's arrays on its devices, and what is done to them: each step by its name and what the host gives it.

So that a step can be told. Where several processes serve together, the first one decides what comes next, and all of
them run it (`together.py`). Letters as in `slots.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.decode.plan import Plan
from dvi_jax.loading import LoadedModel
from dvi_jax.model.speculative_llama import Tree
from dvi_jax.serve.compiling import compile_stretches, compile_wholes
from dvi_jax.serve.ended import Ended
from dvi_jax.serve.places import Places, gaps, on_its_way, written_over
from dvi_jax.serve.prefixes import Prefixes, cut_block, position_axes, put_block
from dvi_jax.serve.prompts import (
    draw_first,
    empty_prompts,
    lay,
    packed_chunk,
    packed_places,
    packed_whole,
    take_chunk,
    take_whole,
)
from dvi_jax.serve.slots import Shape, calls_of, empty_slots, release, run_stretch, token_logprobs

Given = ParamSpec("Given")
Result = TypeVar("Result")
Tell = Callable[[str, tuple[Any, ...]], None]  # the step's name, and what it is given
STEPS: set[str] = set()  # what may be told


def _step(
    method: Callable[Concatenate[Programs, Given], Result],
) -> Callable[Concatenate[Programs, Given], Result]:
    """A step that all processes run; its arguments are what `together.py` can write down."""

    @wraps(method)
    def told(self: Programs, *given: Given.args, **named: Given.kwargs) -> Result:
        assert not named, "arguments are told in their order"
        if self.tell is not None:
            self.tell(method.__name__, given)
        return method(self, *given, **named)

    STEPS.add(method.__name__)
    return told


class Programs:
    """All slots, the prompts on their way into them, and the beginnings of prompts that are kept."""

    def __init__(self, model: LoadedModel, shape: Shape, *, chunk: int, prefix_bytes: int):
        """Take the memory. `chunk`: C. `prefix_bytes`: for what prompts share; 0 where P is several."""
        assert shape.together == 1 or not prefix_bytes
        self.rows, self.chunk = shape.together, chunk
        self.tell: Tell | None = None  # of other processes
        self.params, self._owns_drafter = model.decode_params, False  # what the next step computes with
        self._definition = model.definition
        sizes = {"rows": self.rows, "room": shape.room, "record": shape.record}
        self._filled = empty_prompts(model.definition, self.params, **sizes)
        self._places = Places(stay=model.definition.mesh is None)
        self.prefixes = Prefixes(chunk, prefix_bytes)
        self._axes = position_axes(model.definition, self.params, record=shape.record)
        self.slots = empty_slots(model.definition, self.params, shape)
        devices = self.slots.eos_ids.sharding.addressable_devices
        self._gaps = gaps(devices) if jax.default_backend() == "gpu" else []

    def draft_with(self, drafter: Tree, lora_s: Tree) -> None:
        """Draft with these weights, as in `decode_params`, from the next step on; in this process alone.

        They are written over those before, so that every program finds them where it did: a GPU that has recorded one
        with the addresses of its arrays would have to record it again.
        """
        if not self._owns_drafter:  # the model's arrays stay as they are
            own = jax.tree.map(jnp.zeros_like, (self.params.drafter, self.params.lora_s))
            self.params, self._owns_drafter = self.params._replace(drafter=own[0], lora_s=own[1]), True
        drafter, lora_s = written_over((self.params.drafter, self.params.lora_s), (drafter, lora_s))
        self.params = self.params._replace(drafter=drafter, lora_s=lora_s)

    @_step
    def take(self, tokens: np.ndarray, lengths: np.ndarray, position: int) -> None:
        """A chunk of prompts, as `packed_chunk` gets it."""
        chunk = self._places.put(packed_chunk(tokens, lengths, position))
        self._filled = take_chunk(self._definition, self.params, self._filled, chunk)

    @_step
    def keep(self, name: bytes) -> None:
        """Keep the chunk that was taken in last, under its name."""
        self.prefixes.keep(name, cut_block(self._filled, self._axes, self.chunk))

    @_step
    def lay_back(self, *names: bytes) -> int:
        """A prompt's beginning, from what is kept of it under these names. -> chunks."""
        known = self.prefixes.find(names)
        for number, block in enumerate(known):
            self._filled = put_block(self._filled, block, self._axes, np.int32(number * self.chunk))
        return len(known)

    @_step
    def lay(self, places: np.ndarray, terms: np.ndarray, sampled: bool) -> jax.Array:
        """The prompts that are taken in into slots `places` int32 [P], none twice -> `Slots.first`."""
        placed, alone = packed_places(places, terms, len(self.slots.eos_ids))
        model, given = (self._definition, self.params), self._places.put(placed)
        self.slots = lay(*model, self.slots, self._filled, given, sampled=sampled, alone=alone)
        return on_its_way(self.slots.first)

    @_step
    def take_whole(self, tokens: np.ndarray, places: np.ndarray, terms: np.ndarray, sampled: bool) -> jax.Array:
        """A prompt of one chunk int32 [1, C], on a single device, into its slot -> `Slots.first`."""
        whole = self._places.put(packed_whole(tokens, places, terms))
        self.slots = take_whole(self._definition, self.params, self.slots, whole)
        if sampled:
            placed = self._places.put(packed_places(places, terms, len(self.slots.eos_ids))[0])
            self.slots = draw_first(self._definition, self.params, self.slots, placed)
        return on_its_way(self.slots.first)

    @_step
    def release(self, ended: np.ndarray) -> None:
        """The sequences marked in bool [B] go no further."""
        self.slots = release(self.slots, ended)

    def compile(self, stretches: Iterable[tuple[Plan, int, bool]]) -> None:
        """These side by side, before they are run: plan, piece, and whether any slot is sampled."""
        compile_stretches(self._definition, self.params, self.slots, stretches)

    def compile_wholes(self, sizes: Iterable[int]) -> None:
        """What `take_whole` runs, for chunks of so many tokens, likewise."""
        compile_wholes(self._definition, self.params, self.slots, sizes)

    @_step
    def stretch(self, rounds: int, plan: Plan, sampled: bool, piece: int) -> list[jax.Array]:
        """Start so many rounds, in pieces of `piece` (0: none) -> what `Outcome` reads of each call (`run_stretch`)."""
        found = []
        for limit in calls_of(rounds, piece):
            self.slots = run_stretch(
                self._definition, self.params, self.slots, limit, plan, sampled=sampled, piece=piece
            )
            found.append(on_its_way(self.slots.told))
        return found

    @_step
    def logprobs(self, slot: int, start: int, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of a slot's tokens (`token_logprobs`)."""
        place = np.int32(slot), np.int32(start)
        return token_logprobs(self._definition, self.params, self.slots, *place, most=most)

    def ended(self, slot: int, prompt: int, length: int, *, is_known: bool = True) -> Ended:
        """Of a slot, as `Ended.of`, for who learns, which is in this process alone."""
        return Ended.of(self.slots, slot, prompt, length, is_known=is_known)

    @_step
    def try_laying_back(self) -> None:
        """Compile what keeps beginnings and lays them back, with the chunk that was taken in last."""
        block = cut_block(self._filled, self._axes, self.chunk)
        self._filled = put_block(self._filled, block, self._axes, np.int32(0))
