"""Gradients and sums that several devices work out together (`mesh.py`)."""

from __future__ import annotations

from typing import Any

import jax

from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import DATA, MODEL, shards
from dvi_jax.model import exchange
from dvi_jax.model.speculative_llama import Definition


def over_rows(definition: Definition, sums: Any) -> Any:
    """Sums over the rows of this device -> over those of all, in one order: the same mesh gives the same bits again."""
    return sums if definition.mesh is None else exchange.sum_in_order(sums, DATA)


def over_devices(definition: Definition, gradient: Any) -> Any:
    """The gradient of a loss that every device along `model` works out from its part of the vocabulary.

    Going backward, what they exchanged comes to the sum of what each asks for, n times what it should be; so the mean
    over the devices is the gradient, whichever parts of it came from where.
    """
    n = shards(definition.mesh)
    return gradient if n == 1 else jax.tree.map(lambda x: x / n, exchange.sum_in_order(gradient, MODEL))


def check_learning(model: LoadedModel, *, slowly: bool) -> None:
    """Raise `UserError` where what is learned lies inside a model that is split; `slowly`: slow updates are to come."""
    if shards(model.definition.mesh) == 1:
        return
    if slowly:
        raise UserError("slow.every needs a whole model on every device: use mesh.data, with mesh.model=1")
    if any(path[0].key == "llama" for path, _ in jax.tree.leaves_with_path(model.params.lora_s)):
        raise UserError("a lora_S in the shallow layers needs a whole model on every device: use mesh.model=1")
