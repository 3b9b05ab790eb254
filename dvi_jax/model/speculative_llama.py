"""The model that decodes and learns: a Llama, its drafter, and where lora_S sits.

`split` takes it apart into a static definition and `Params`, plain dicts by variable kind. Jitted functions take both
and call `join`: dispatch over plain dicts is an order of magnitude cheaper than over modules.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import nnx

from dvi_jax.model.drafters import Drafter
from dvi_jax.model.llama import Llama
from dvi_jax.model.variables import Base, DeepLoRA, DrafterParam, ShallowLoRA

Tree = dict[Any, Any]


class SpeculativeLlama(nnx.Module):
    """`llama` verifies; its shallow half and `drafter` draft.

    With `separate_trunk`, lora_S also sits inside the shallow layers: the draft pass then has shallow caches of its own
    and the verifier recomputes the drafted rows with base weights, so that drafting never touches what it verifies.
    """

    def __init__(self, llama: Llama, drafter: Drafter, *, separate_trunk: bool = False):
        self.llama = llama
        self.drafter = drafter
        self.separate_trunk = separate_trunk


class Params(NamedTuple):
    """Every array of a `SpeculativeLlama`, by kind: nested dicts, a pytree."""

    base: Tree
    drafter: Tree
    lora_s: Tree
    lora_d: Tree


def split(model: SpeculativeLlama) -> tuple[nnx.GraphDef, Params]:
    """Definition (hashable, static under jit) and arrays of `model`."""
    graphdef, *states = nnx.split(model, Base, DrafterParam, ShallowLoRA, DeepLoRA)
    return graphdef, Params(*map(nnx.to_pure_dict, states))


def join(graphdef: nnx.GraphDef, params: Params) -> SpeculativeLlama:
    """The module again; use inside a jitted function."""
    return nnx.merge(graphdef, *params)
