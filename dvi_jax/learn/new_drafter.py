"""Which drafter a training run begins with: the checkpoint's trained one, or a new one as the settings describe it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dvi_jax.checkpoint import Checkpoint
from dvi_jax.errors import UserError
from dvi_jax.model.drafters import BlockDrafter, drafter_class

USUAL_EXIT_LAYER = 2  # of a new step drafter in a checkpoint that names none


def kept_or_new_drafter(
    checkpoint: Checkpoint, kind: str | None, options: dict[str, Any], exit_layer: int | None
) -> Checkpoint:
    """`checkpoint` with its trained drafter, or with an untrained one of `kind` (None: the manifest's).

    Settings that a trained drafter does not have are a `UserError`: online learning goes on with what there is.
    """
    manifest = checkpoint.manifest
    if checkpoint.drafter is None:
        return with_new_drafter(checkpoint, kind or manifest.drafter, options, exit_layer)
    if kind not in (None, manifest.drafter):
        raise UserError(f"drafter {kind}: the checkpoint's drafter was trained as {manifest.drafter}")
    if exit_layer not in (None, manifest.exit_layer):
        raise UserError(f"exit_layer {exit_layer}: the checkpoint's drafter was trained at layer {manifest.exit_layer}")
    for name, value in options.items():
        if manifest.drafter_config.get(name) != value:
            trained = manifest.drafter_config.get(name)
            raise UserError(f"drafter_options.{name} {value}: the checkpoint's drafter was trained with {trained}")
    return checkpoint


def matching_or_new_drafter(
    checkpoint: Checkpoint, kind: str, options: dict[str, Any], exit_layer: int | None, shallow_rank: int = 0
) -> Checkpoint:
    """`checkpoint` with its trained drafter if that is what the settings describe, else with an untrained one.

    `shallow_rank` gives a new drafter a lora_S inside the shallow layers.
    """
    manifest = checkpoint.manifest
    same_kind = manifest.drafter == kind and exit_layer in (None, manifest.exit_layer)
    if checkpoint.drafter is not None and same_kind and manifest.drafter_config == manifest.drafter_config | options:
        return checkpoint
    new = replace(with_new_drafter(checkpoint, kind, options, exit_layer), draft_vocabulary=None)
    lora = {"rank_s": shallow_rank, "rank_d": 0} if shallow_rank else {}
    manifest = replace(
        new.manifest, training_step=0, lora=lora, run_digest="", held_out_fraction=0.0, plan="", draft_steps=0
    )
    return replace(new, manifest=manifest, drafter=None, lora=None)


def with_new_drafter(checkpoint: Checkpoint, kind: str, options: dict[str, Any], exit_layer: int | None) -> Checkpoint:
    """`checkpoint` whose manifest asks for an untrained drafter of `kind`; one of blocks usually has no exit layer."""
    manifest = checkpoint.manifest
    if issubclass(drafter_class(kind), BlockDrafter):
        exit_layer = exit_layer or 0
    elif exit_layer is None:
        does_without = manifest.drafter == kind and not drafter_class(kind).needs_exit_layer
        usual = 0 if does_without else min(USUAL_EXIT_LAYER, checkpoint.config.num_layers - 1)
        exit_layer = manifest.exit_layer or usual
    inherited = manifest.drafter_config if manifest.drafter == kind else {}
    manifest = replace(
        manifest, drafter=kind, drafter_config=inherited | options, exit_layer=exit_layer, calibration=()
    )
    return replace(checkpoint, manifest=manifest)
