"""A reply that has ended, as it lies in its slot: what can be learned from it, read by whatever program keeps it.

Letters as in `slots.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.decode.state import DecodeState
from dvi_jax.learn.replay import Windows, read_windows
from dvi_jax.serve.requests import Request
from dvi_jax.serve.slots import Slots


class Ended(NamedTuple):
    """Of use until the next step uses up the slots."""

    state: DecodeState  # of all slots, what is read here alone: the host pays for every array of a program
    # int32 [3]: the slot, tokens of the prompt, and of the whole sequence; below 0: all that it has, so many at most.
    place: np.ndarray | jax.Array

    @classmethod
    def of(cls, slots: Slots, slot: int, prompt_length: int, length: int, *, is_known: bool = True) -> Ended:
        """The first `length` tokens in a slot; or all that there are when the device comes to it, so many at most."""
        state = slots.decode.replace(shallow=(), deep=(), trunk=(), drafter=(), sampling=None)
        return cls(state, np.array([slot, prompt_length, length if is_known else -length], np.int32))

    def window(self, branches: int = 0) -> Windows:
        """One window of S positions, with so many drafts that were not taken, of a slot that keeps any; under jit."""
        (slot, prompt_length, length), state = self.place, self.state
        length = jnp.where(length < 0, state.length[slot], length)

        def of(tree: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(tree, slot, 1)

        row = state.replace(tokens=of(state.tokens), length=length[None], signals=jax.tree.map(of, state.signals))
        return read_windows(row, prompt_length[None], window=state.tokens.shape[1], branches=branches)


OnEnded = Callable[[Ended, Request], None]
OnWindow = Callable[[Windows, Request], None]


def with_windows(on_window: OnWindow | None) -> OnEnded | None:
    """What gives `on_window` the window of each reply."""
    return None if on_window is None else lambda ended, request: on_window(take_window(ended), request)


@jax.jit
def take_window(ended: Ended) -> Windows:
    """A window of S positions, in arrays of its own."""
    return ended.window()
