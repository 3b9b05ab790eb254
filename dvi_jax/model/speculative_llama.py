"""The model that decodes and learns: a Llama, its drafter, and where lora_S sits.

`split` takes it apart into a static definition and `Params`, plain dicts by variable kind. Jitted functions take both
and call `join`: dispatch over plain dicts is an order of magnitude cheaper than over modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dvi_jax.errors import UserError
from dvi_jax.mesh import WHOLE, run_sharded, specs_of
from dvi_jax.model import exchange
from dvi_jax.model.drafters import BlockDrafter, Drafter
from dvi_jax.model.llama import Llama
from dvi_jax.model.quantised import Matrix, Quantised
from dvi_jax.model.variables import Base, DeepLoRA, DrafterParam, ShallowLoRA

Tree = dict[Any, Any]


class SpeculativeLlama(nnx.Module):
    """`llama` verifies; its shallow half and `drafter` draft.

    With `separate_trunk`, lora_S also sits inside the shallow layers: the draft pass then has shallow caches of its own
    and the verifier recomputes the drafted rows with base weights, so that drafting never touches what it verifies.
    """

    def __init__(self, llama: Llama, drafter: Drafter, *, separate_trunk: bool = False):
        """Raises `UserError` for a drafter without the exit layer that it needs."""
        if drafter.needs_exit_layer and not llama.exit_layer:
            last = llama.config.num_layers - 1
            raise UserError(
                f"exit_layer must be between 1 and {last} for a model of {llama.config.num_layers} layers, got 0"
            )
        self.llama = llama
        self.drafter = drafter
        self.separate_trunk = separate_trunk
        # "ids" int32 [Vd] and "head" [Vd, D] once `restrict_drafts` was called.
        self.draft_vocabulary: nnx.Dict[Base] = nnx.Dict()
        # "inverse" float32 [J], one over each draft's temperature, once `calibrate` was called.
        self.calibration: nnx.Dict[Base] = nnx.Dict()

    def calibrate(self, temperatures: Sequence[float]) -> None:
        """Temperatures of the drafts of a round; the last serves those after it.

        In greedy decoding thresholds and trees go by them; sampled drafts are not calibrated. They move no token.
        """
        self.calibration["inverse"] = Base(1 / jnp.array(temperatures, jnp.float32))

    def calibrated(self, logits: jax.Array, draft: jax.Array | int) -> jax.Array:
        """Draft logits [..., Vd] of draft number `draft` (from 0) of a round, whose softmax says how sure it is."""
        if not self.calibration:
            return logits
        inverse = self.calibration["inverse"][...]
        return logits * inverse[jnp.minimum(draft, len(inverse) - 1)].astype(logits.dtype)

    def restrict_drafts(self, ids: Sequence[int]) -> None:
        """Draft only these tokens, so that a draft reads a small part of the LM head; verification sees them all.

        For models whose head dominates a draft. Raises `UserError` for ids outside the vocabulary.
        """
        chosen = jnp.array(sorted(set(ids)), jnp.int32)
        size = self.llama.config.vocab_size
        if not len(chosen) or chosen[0] < 0 or chosen[-1] >= size:
            raise UserError(f"a draft vocabulary holds token ids between 0 and {size - 1}, at least one")
        self.draft_vocabulary["ids"] = Base(chosen)
        head = self.llama.head_weight()
        # Few rows: in the model's dtype, whatever the whole head is kept in.
        rows = head.rows(chosen).dequantised(self.llama.dtype) if isinstance(head, Quantised) else head[chosen]
        self.draft_vocabulary["head"] = Base(rows)

    @property
    def draft_shards(self) -> int:
        """Devices that have a part of `draft_head` each; one that is restricted is small, and on all of them."""
        return 1 if self.draft_vocabulary else self.llama.shards

    def draft_head(self) -> Matrix:
        """The rows of the LM head that drafts are chosen from: [Vd, D], all that are here unless restricted."""
        return self.draft_vocabulary["head"][...] if self.draft_vocabulary else self.llama.head_weight()

    def draft_token(self, index: jax.Array) -> jax.Array:
        """Token ids of rows of `draft_head`."""
        return self.draft_vocabulary["ids"][...][index] if self.draft_vocabulary else index

    def draft_ids(self) -> jax.Array | None:
        """int32 [Vd], the token of each row of `draft_head`; None where it is the whole head."""
        return self.draft_vocabulary["ids"][...] if self.draft_vocabulary else self.llama.own_ids()

    def all_draft_logits(self, logits: jax.Array) -> jax.Array:
        """Logits [..., Vd] of all rows of the draft head, from those of this device's."""
        return logits if self.draft_shards == 1 else exchange.whole(logits)

    def over_vocabulary(self, logits: jax.Array) -> jax.Array:
        """Logits [B, Vd] of `draft_head`'s rows -> [B, V], minus infinity where nothing is drafted."""
        if not self.draft_vocabulary:
            return logits if self.llama.shards == 1 else exchange.whole(logits)
        full = jnp.full((logits.shape[0], self.llama.config.vocab_size), -jnp.inf, logits.dtype)
        return full.at[:, self.draft_vocabulary["ids"][...]].set(logits)


class Params(NamedTuple):
    """Every array of a `SpeculativeLlama`, by kind: nested dicts, a pytree."""

    base: Tree
    drafter: Tree
    lora_s: Tree
    lora_d: Tree


class Drafting(NamedTuple):
    """What the host asks of a drafter before every generation: kept, as a joined module takes milliseconds to make."""

    in_blocks: bool  # all drafts of a round in one pass
    most: int | None  # drafts of a round; None: as many as are asked for
    taps: tuple[int, ...]  # layers of the verifier that it looks at


class Definition:
    """All of a module but its arrays, and the devices that they lie on: static under jit.

    Its hash is kept. nnx walks the whole module for one, 0.4 ms at 30 layers, and jit asks for it in every call.
    """

    def __init__(self, graphdef: nnx.GraphDef, drafting: Drafting, mesh: Mesh | None = None):
        self.graphdef = graphdef
        self.drafting = drafting  # follows from the graph
        self.mesh = mesh  # None: one device
        self._hash = hash((graphdef, mesh))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Definition) and self.graphdef == other.graphdef and self.mesh == other.mesh
        )

    def sharded(self, body: Callable[..., Any], params: Params, specs: tuple[Any, ...], out_specs: Any) -> Any:
        """What `body(params, *others)` gives, as a function of those on all devices of the mesh.

        `specs`: where the others lie, prefixes of them; `out_specs`: where what comes out does (`mesh.py`).
        """
        if self.mesh is None:
            return body
        return run_sharded(self.mesh, body, (specs_of(params), *specs), out_specs)

    def on_all(self, tree: Any) -> Any:
        """Arrays of a jitted function whole on every device, so that the host of each can read them."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, WHOLE))


def split(model: SpeculativeLlama, mesh: Mesh | None = None) -> tuple[Definition, Params]:
    """Definition and arrays of `model`, which lie on the devices of `mesh`."""
    graphdef, *states = nnx.split(model, Base, DrafterParam, ShallowLoRA, DeepLoRA)
    drafter = model.drafter
    drafting = Drafting(isinstance(drafter, BlockDrafter), drafter.max_drafts, model.llama.taps)
    return Definition(graphdef, drafting, mesh), Params(*map(nnx.to_pure_dict, states))


def join(definition: Definition, params: Params) -> SpeculativeLlama:
    """The module again; use inside a jitted function."""
    return nnx.merge(definition.graphdef, *params)
