"""Which drafter a training run begins with: the checkpoint's trained one, or a new one as the settings describe it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dvi_jax.checkpoint import Checkpoint
from dvi_jax.errors import UserError
from dvi_jax.model.drafters import drafter_class

USUAL_EXIT_LAYER = 2  # of a new drafter that takes one, in a checkpoint that names none


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
    lora = {"rank_s": shallow_rank, "rank_d": 0} if shallow_rank else {}
    manifest = replace(
        manifest, training_step=0, lora=lora, run_digest="", held_out_fraction=0.0, plan="", draft_steps=0
    )
    untrained = replace(checkpoint, manifest=manifest, drafter=None, lora=None, draft_vocabulary=None)
    return with_new_drafter(untrained, kind, options, exit_layer)


def with_new_drafter(checkpoint: Checkpoint, kind: str, options: dict[str, Any], exit_layer: int | None) -> Checkpoint:
    """`checkpoint` whose manifest asks for an untrained drafter of `kind`.

    `exit_layer` None: that of the manifest if it describes a drafter of this kind, else none. A drafter that needs one,
    and one with a lora_S in the shallow layers, takes the manifest's whatever it describes, or else the usual one.
    """
    manifest = checkpoint.manifest
    same_kind = manifest.drafter == kind
    takes_one = drafter_class(kind).needs_exit_layer or manifest.lora.get("rank_s")
    if exit_layer is None:
        if takes_one:
            exit_layer = manifest.exit_layer or min(USUAL_EXIT_LAYER, checkpoint.config.num_layers - 1)
        else:
            # Every draft pays for the layers below an exit, and what they tell such a drafter is worth less. An import
            # names a layer for an exit head, which is no wish of this drafter's.
            exit_layer = manifest.exit_layer if same_kind else 0
    inherited = manifest.drafter_config if same_kind else {}
    manifest = replace(
        manifest, drafter=kind, drafter_config=inherited | options, exit_layer=exit_layer, calibration=()
    )
    return replace(checkpoint, manifest=manifest)
