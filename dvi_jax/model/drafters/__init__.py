"""Drafters: what turns exit hidden states into draft logits. A new one is a file here and an entry in `DRAFTERS`."""

from __future__ import annotations

from typing import Any

import jax

from dvi_jax.config import LlamaConfig
from dvi_jax.errors import UserError
from dvi_jax.model.drafters.base import Committed, Drafter
from dvi_jax.model.drafters.exit_head import ExitHead
from dvi_jax.model.drafters.fused import Fused
from dvi_jax.model.drafters.kangaroo import Kangaroo

__all__ = ["DRAFTERS", "Committed", "Drafter", "ExitHead", "Fused", "Kangaroo", "build_drafter"]

DRAFTERS: dict[str, type[Drafter]] = {drafter.kind: drafter for drafter in (ExitHead, Kangaroo, Fused)}


def build_drafter(
    kind: str, config: LlamaConfig, options: dict[str, Any], *, key: jax.Array, norm: jax.Array
) -> Drafter:
    """A new drafter of `kind` with the manifest's `options`; unknown kinds and options raise `UserError`."""
    if kind not in DRAFTERS:
        raise UserError(f"unknown drafter {kind!r}; known: {', '.join(sorted(DRAFTERS))}")
    try:
        return DRAFTERS[kind](config, key=key, norm=norm, **options)
    except TypeError as error:
        raise UserError(f"drafter {kind}: {error}") from error
