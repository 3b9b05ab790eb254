"""The kinds of variable in a model. Splitting, gradients, optimisers and checkpoints all select by these types."""

from __future__ import annotations

from flax import nnx


class Base(nnx.Variable):
    """A weight of the imported Llama: frozen, always."""


class ShallowLoRA(nnx.Variable):
    """`lora_S`: adapters of the draft side, moved by the fast update."""


class DeepLoRA(nnx.Variable):
    """`lora_D`: adapters of the verifier, moved by the slow update only."""


class DrafterParam(nnx.Variable):
    """A drafter's own weight, moved by the fast update."""
