"""What a generation carries from round to round, and the settings that may change without recompiling.

Letters: B batch, S cache slots (also the longest sequence that fits), W = draft_steps + 1 rows of a round, D hidden.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dvi_jax.decode.branches import Branches
from dvi_jax.decode.sampling import Sampling
from dvi_jax.mesh import CACHES, COPIED_CACHES, ROWS, WHOLE
from dvi_jax.model.attention import Caches
from dvi_jax.model.drafters import Committed
from dvi_jax.model.features import Features

NO_TOKEN = -1
FOREVER = 2**31 - 1


class Knobs(NamedTuple):
    """Run-time settings: one compiled program serves every value. `draft_steps` 0 is plain decoding."""

    draft_steps: jax.Array  # int32 scalar, at most W - 1
    threshold: jax.Array  # float32 scalar; drafting stops after a token less probable than this
    eos_ids: jax.Array  # int32 [E], or [B, E] with each sequence's own; NO_TOKEN where unused
    draft_cost: jax.Array  # float32 scalar, in rounds that draft nothing; above 0, drafting stops where it does not pay
    until: jax.Array  # int32 scalar, `decode` returns after this many rounds in all, finished or not

    @classmethod
    def make(
        cls,
        draft_steps: int,
        threshold: float,
        eos_ids: tuple[int, ...],
        *,
        draft_cost: float = 0.0,
        until: int = FOREVER,
        room: int = 8,
    ) -> Knobs:
        """Knobs from Python values. Up to `room` end-of-sequence ids share one compiled program."""
        padded = (*eos_ids, *[NO_TOKEN] * (room - len(eos_ids)))
        values = (np.int32(draft_steps), np.float32(threshold), np.array(padded, np.int32), np.float32(draft_cost))
        return cls(*jax.device_put((*values, np.int32(until))))  # one transfer, no program


class Signals(struct.PyTreeNode):
    """Learning signals, indexed by the position they predict. Filled only in rollouts.

    reward: 1 the proposal was accepted, 0 it was the round's first reject, -1 none was judged here.
    step: which draft of its round the proposal was, from 0; meaningless where none was judged.
    """

    proposal: jax.Array  # int32 [B, S], NO_TOKEN where nothing was proposed or judged
    reward: jax.Array  # int8 [B, S]
    step: jax.Array  # int8 [B, S]
    features: Features  # [B, S, ...], the verifier's of the row that predicts this position
    branches: Branches | None = None  # drafts not taken; None where nobody learns from them

    @property
    def most_branches(self) -> int:
        """K, how many of a position are kept."""
        return 0 if self.branches is None else self.branches.tokens.shape[2]

    @classmethod
    def without_judgement(cls, features: Features, branches: int = 0) -> Signals:
        """Features [B, S, ...] known, nothing proposed anywhere; room for so many branches of a position."""
        batch, slots, width = features.final.shape
        return cls(
            proposal=jnp.full((batch, slots), NO_TOKEN, jnp.int32),
            reward=jnp.full((batch, slots), -1, jnp.int8),
            step=jnp.zeros((batch, slots), jnp.int8),
            features=features,
            branches=Branches.empty(batch, slots, branches, width, features.final.dtype) if branches else None,
        )


class DecodeState(struct.PyTreeNode):
    """One batch of generations between two rounds.

    `tokens[b, :length[b]]` is committed; its last token has not been through the model yet, so the caches hold
    `length - 1` positions. Rejecting drafts moves `length`, nothing else: later slots are masked and overwritten.
    """

    tokens: jax.Array  # int32 [B, S], prompt and committed tokens
    length: jax.Array  # int32 [B], committed tokens, prompt included
    limit: jax.Array  # int32 [B], length at which a sequence is finished
    done: jax.Array  # bool [B], the sequence has met an end-of-sequence id or its limit
    shallow: Caches  # base weights, layers below the exit
    deep: Caches  # base weights and lora_D, layers from the exit on
    trunk: Caches  # the draft pass's own shallow caches with a separate trunk, else ()
    drafter: Any  # the drafter's state
    committed: Committed  # the rows of the last round
    rounds: jax.Array  # int32 scalar, rounds done
    accept_lengths: jax.Array  # int32 [B, S], tokens committed in each round, 0 once a sequence is done
    drafted: jax.Array  # int32 [B, S], tokens drafted in each round
    signals: Signals | None = None  # None: nothing is learned from this generation
    sampling: Sampling | None = None  # None: greedy, another program


# Where a state lies on a mesh: as prefixes of its fields, whatever those hold.
_SPECS: dict[str, Any] = dict.fromkeys((field.name for field in fields(DecodeState)), ROWS)
STATE_SPECS = DecodeState(**_SPECS | dict.fromkeys(("shallow", "deep", "trunk"), CACHES) | {"rounds": WHOLE})

# Where that of a few sequences lies which are not split: on all devices along `data`.
_COPIED: dict[str, Any] = dict.fromkeys(_SPECS, WHOLE)
COPIED_SPECS = DecodeState(**_COPIED | dict.fromkeys(("shallow", "deep", "trunk"), COPIED_CACHES))


def knob_specs(knobs: Knobs) -> Any:
    """Where knobs lie on a mesh."""
    return Knobs(WHOLE, WHOLE, ROWS if knobs.eos_ids.ndim == 2 else WHOLE, WHOLE, WHOLE)  # type: ignore[arg-type]
