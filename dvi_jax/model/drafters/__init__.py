"""Drafters: what proposes tokens. A new one is a file here and an entry in `DRAFTERS`."""

from __future__ import annotations

from typing import Any

from dvi_jax.errors import UserError
from dvi_jax.model.drafters.base import BlockDrafter, BranchRows, Committed, Drafter, Origin, StepDrafter
from dvi_jax.model.drafters.block import ContextBlock
from dvi_jax.model.drafters.exit_head import ExitHead
from dvi_jax.model.drafters.fused import Fused
from dvi_jax.model.drafters.kangaroo import Kangaroo
from dvi_jax.model.drafters.medusa import Medusa
from dvi_jax.settings import from_dict

__all__ = [
    "DRAFTERS",
    "BlockDrafter",
    "BranchRows",
    "Committed",
    "ContextBlock",
    "Drafter",
    "ExitHead",
    "Fused",
    "Kangaroo",
    "Medusa",
    "Origin",
    "StepDrafter",
    "build_drafter",
    "drafter_class",
]

DRAFTERS: dict[str, type[Drafter]] = {
    drafter.kind: drafter for drafter in (ExitHead, Kangaroo, Fused, Medusa, ContextBlock)
}


def drafter_class(kind: str) -> type[Drafter]:
    """The class of that kind; an unknown one raises `UserError`."""
    if kind not in DRAFTERS:
        raise UserError(f"unknown drafter {kind!r}; known: {', '.join(sorted(DRAFTERS))}")
    return DRAFTERS[kind]


def build_drafter(kind: str, options: dict[str, Any], origin: Origin) -> Drafter:
    """A new drafter of `kind` with the options that a manifest or a setting names; unknown ones raise `UserError`."""
    cls = drafter_class(kind)
    return cls(origin, from_dict(cls.Options, options, f"drafter {kind}"))
