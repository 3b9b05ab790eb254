"""The interface of drafters: all that the decode loop, the learners and the checkpoints know of them.

Every drafter is a `Drafter`, and of one of two kinds: a `StepDrafter` makes one draft a pass, each from the exit hidden
state of the token before it; a `BlockDrafter` makes all drafts of a round in one pass.
`needs_exit_layer` says which cannot do without an exit layer.

Letters as in `layers.py`; W rows of a round, A tapped layers, Vd tokens that may be drafted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct

from dvi_jax.config import LlamaConfig
from dvi_jax.model.features import Features
from dvi_jax.model.products import linear
from dvi_jax.model.quantised import Matrix


class Committed(struct.PyTreeNode):
    """The rows that the last round committed (after a prefill: the prompt's last row), padded to W."""

    hidden: jax.Array  # [B, W, D], exit hidden state of each row, as the drafter sees it
    features: Features  # of each row, [B, W, ...]
    start: jax.Array  # int32 [B], position of row 0
    count: jax.Array  # int32 [B], committed rows; start + count is the position of the row now drafted from

    def last_final(self) -> jax.Array:
        """The verifier's final hidden state of the last committed row: [B, 1, D]."""
        return jnp.take_along_axis(self.features.final, (self.count - 1)[:, None, None], axis=1)


class BranchRows(NamedTuple):
    """For learning: X rows of drafts that were not taken, each one token off the text beside which it stands."""

    hidden: jax.Array  # [B, X, D], exit hidden state of the draft
    positions: jax.Array  # int32 [B, X], of the draft; it follows the text before that position


@dataclass(frozen=True)
class NoOptions:
    """The options of a drafter that has none."""


@dataclass(frozen=True)
class Origin:
    """What a new drafter may start from."""

    config: LlamaConfig  # of the base model
    norm: jax.Array  # [D], the base model's final norm
    key: jax.Array  # PRNG key for random weights


class Drafter(nnx.Module):
    """What every drafter has. One without state of its own keeps `()`.

    A subclass is built as `cls(origin, options)`; its weights are `DrafterParam` or `ShallowLoRA` variables.
    """

    kind: ClassVar[str]
    Options: ClassVar[type] = NoOptions  # a frozen dataclass: what a manifest, YAML or a command line may set

    options: Any  # an instance of `Options`
    needs_exit_layer: ClassVar[bool] = False  # without one, exit hidden states are embeddings of tokens
    taps: tuple[int, ...] = ()  # layers of the verifier whose hidden states it asks for (`Llama`)
    max_drafts: int | None = None  # most drafts it can make in a round; None: as many as are asked for
    foretells: ClassVar[bool] = False  # whether it can begin as a linear map (`foretelling`)

    def __init__(self, origin: Origin, options: Any):
        self.options = options

    def init_state(self, batch: int, slots: int, dtype: jnp.dtype) -> Any:
        """State for `slots` positions: a pytree of arrays [B, ...], carried by the decode loop.

        One for fewer slots must be a corner of one for more: a prefix is taken in once and laid into many batches.
        """
        return ()

    def prefill(self, state: Any, hidden: jax.Array, before: Features, positions: jax.Array) -> Any:
        """Take in the prompt, or its next chunk: exit hidden [B, T, D] at consecutive `positions` [B, T].

        before: the verifier's features [B, T, ...] at the position before each, zeros before the first.
        """
        return state

    def unroll(self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int) -> list[jax.Array]:
        """For learning: draft j of a round at every position, had the round begun j positions earlier and been right.

        Exit hidden [B, T, D] and features [B, T, ...] at `positions` [B, T] -> draft hidden states [B, T, D], whose
        logits at row t predict position t + 1. There are `steps` of them; one where later drafts work like the first;
        as many as a block has, from a block drafter.
        """
        raise NotImplementedError

    def unroll_branches(
        self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int, branches: BranchRows
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """What `unroll` gives, and the drafts that would have come behind `branches`: [B, X, D] each.

        Those are of draft 1 of a round (its second), 2 and so on, had the branch been draft 0, 1 and so on; a single
        one where all drafts are made alike, none where a round has but one.
        """
        raise NotImplementedError

    def foretelling(self, hidden: jax.Array, features: Features) -> jax.Array:
        """Of what the first draft at every row may begin as a linear map: float32 [B, T, I], of unit size.

        From exit hidden [B, T, D] and features [B, T, ...] of the rows, as `unroll` takes them. Only where `foretells`.
        """
        raise NotImplementedError

    def foretell(self, weights: jax.Array) -> None:
        """Begin as the map `weights` [D, I] of `foretelling` to the verifier's final hidden state of the same row."""
        raise NotImplementedError

    def logits(self, draft_hidden: jax.Array, head: Matrix) -> jax.Array:
        """Draft hidden [..., D] through the frozen LM head [Vd, D] -> float32 logits [..., Vd]."""
        with jax.named_scope("draft_head"):
            return linear(draft_hidden, head, jnp.float32)

    def corrected(
        self, logits: jax.Array, draft_hidden: jax.Array, previous: jax.Array, vocabulary: jax.Array | None
    ) -> jax.Array:
        """Logits [..., Vd] of draft_hidden [..., D], once it is known which token stands before the one to be drafted.

        `previous`: that token, int32 [...]. `vocabulary`: int32 [Vd], the token of each column, None for all in order.
        Only block drafters have use for it: a step drafter has seen that token.
        """
        return logits

    def config(self) -> dict[str, Any]:
        """What a checkpoint's manifest must say to rebuild this drafter."""
        return asdict(self.options)


class StepDrafter(Drafter):
    """A drafter that makes one draft a pass and sees the exit hidden state of every token drafted before."""

    def first(self, state: Any, committed: Committed, hidden: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        """First draft of a round: exit hidden [B, 1, D] at `position` [B] -> (draft hidden [B, 1, D], state)."""
        raise NotImplementedError

    def next(
        self, state: Any, draft_hidden: jax.Array, hidden: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Later drafts, all of one number in the round: exit hidden [B, T, D] at `positions` [B, T] -> [B, T, D].

        `draft_hidden` [B, T, D] is what the calls returned for the tokens before. In a chain T is 1; in a tree the
        state's caches are such that each row sees its own ancestors.
        """
        raise NotImplementedError


class BlockDrafter(Drafter):
    """A drafter that makes all drafts of a round in one pass, from what was committed and the token they follow."""

    max_drafts: int

    def propose(self, state: Any, committed: Committed, anchor: jax.Array, drafts: int) -> tuple[jax.Array, Any]:
        """The first `drafts` of the block after the token whose exit hidden state is `anchor` [B, 1, D].

        -> draft hidden [B, drafts, D], and the state, which has taken in the rows that the last round committed.
        """
        raise NotImplementedError

    def unroll_branches(
        self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int, branches: BranchRows
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        # Later drafts of a block do not see the ones before them: behind a branch they are what they are in the text.
        drafts = self.unroll(hidden, features, positions, steps)
        return drafts, [jnp.take_along_axis(x, branches.positions[..., None], axis=1) for x in drafts[1:]]
