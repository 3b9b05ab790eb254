"""From a Hugging Face directory or a GGUF file, with a Kangaroo adapter if there is one, to a checkpoint directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conversion import kangaroo
from dvi_jax.checkpoint import Manifest
from dvi_jax.importing.checkpoint import write_import
from dvi_jax.importing.source import open_source
from dvi_jax.quantisation import Quantisation
from dvi_jax.trained_parts import TrainedParts


def import_model(
    source: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    dtype: str = "float32",
    exit_layer: int | None = None,
    quantisation: Quantisation | None = None,
    calibration: Sequence[str] = (),
) -> Manifest:
    """Write the checkpoint directory `out` from `source`, with the Kangaroo adapter of `adapter` if given.

    Otherwise as `dvi_jax.importing.checkpoint.write_import`.
    """
    model = open_source(source)
    trained = None
    if adapter is not None:
        drafter, options = kangaroo.read_adapter(adapter, model.config, dtype)
        # An adapter does not say for which exit layer or weights it was made.
        manifest = Manifest(
            source="", source_sha256="", dtype=dtype, exit_layer=0, drafter="kangaroo", drafter_config=options
        )
        trained = TrainedParts(manifest, drafter, None, None)
    return write_import(
        source,
        out,
        model,
        trained=trained,
        dtype=dtype,
        exit_layer=exit_layer,
        quantisation=quantisation,
        calibration=calibration,
    )
