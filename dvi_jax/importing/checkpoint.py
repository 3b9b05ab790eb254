"""From an opened source to a checkpoint directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dvi_jax.checkpoint import Manifest, write_checkpoint
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.directories import require_new
from dvi_jax.errors import UserError, notice
from dvi_jax.identity import hash_base
from dvi_jax.importing import tokenizer
from dvi_jax.importing.calibration import calibration_rows
from dvi_jax.importing.files import sha256_of
from dvi_jax.importing.gptq import rounded_base
from dvi_jax.importing.quantising import described, report
from dvi_jax.importing.source import SourceModel, load_base, load_quantised_base
from dvi_jax.importing.tensors import DTYPES, Tree
from dvi_jax.model.drafters import drafter_class
from dvi_jax.quantisation import Quantisation
from dvi_jax.trained_parts import TrainedParts, read_safetensors_parts

DEFAULT_EXIT_LAYER = 2


def write_import(
    source: Path,
    out: Path,
    model: SourceModel,
    *,
    trained: TrainedParts | None = None,
    dtype: str = "float32",
    exit_layer: int | None = None,
    quantisation: Quantisation | None = None,
    calibration: Sequence[str] = (),
) -> Manifest:
    """Write the checkpoint directory `out` from `model`, opened at `source`.

    Weights are stored as `dtype` ("float32" or "bfloat16"), matrices as `quantisation` says if given; int4 by GPTQ with
    the conversations of the files `calibration`, which takes the whole model into memory. A drafter that lies in the
    source, as `export --to hf` puts it there, comes along unless another is given (`trained`). The exit layer is the
    drafter's, or else 2. An exit layer outside 1 .. L-1 (0 where the drafter was trained without one) or a file that
    does not belong raises `UserError`.
    """
    require_new(out)
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    if trained is None and source.is_dir():
        trained = read_safetensors_parts(source)
    exit_layer = _exit_layer(exit_layer, model.config.num_layers, trained)
    base, own_hash, quantisation = _read_base(source, model, dtype, quantisation, calibration)
    kept = (
        Manifest(source="", source_sha256="", dtype=dtype, exit_layer=exit_layer)
        if trained is None
        else trained.manifest
    )
    manifest = replace(
        kept,
        source=source.absolute().name,  # a link's own: in Hugging Face's cache it leads to a hash
        source_sha256=sha256_of(model.weights.files),
        base_sha256=own_hash,
        dtype=dtype,
        exit_layer=exit_layer,
        quantisation=quantisation,
    )
    if kept.base_sha256 not in ("", manifest.base_sha256, quantisation.source_sha256 if quantisation else ""):
        raise UserError(f"{source}: its drafter was trained for other weights than those beside it; remove drafter/")
    write_checkpoint(
        out,
        model.config,
        manifest,
        base,
        drafter=trained.drafter if trained else None,
        lora=trained.lora if trained else None,
        draft_vocabulary=trained.vocabulary if trained else None,
        tokenizer_json=model.tokenizer_json,
        chat_template=model.chat_template,
        special_tokens=model.special_tokens,
    )
    _report_template(model)
    return manifest


def _calibrated(
    model: SourceModel, dtype: str, quantisation: Quantisation, files: Sequence[str]
) -> tuple[Tree, str, Quantisation]:
    """`_read_base` with a calibration."""
    own = _tokenizer(model)
    if own is None:
        raise UserError("--calibration needs a tokenizer, and the source has none")
    rows = calibration_rows(own, files)
    base = load_base(model, dtype)
    notice(
        f"rounding {model.config.num_layers} layers one after the other, by what they do to {rows.size:,} tokens: this"
        " takes minutes on a CPU"
    )
    tree = rounded_base(model.config, base, rows, quantisation)
    made = replace(quantisation, source_sha256=hash_base(base), calibration_tokens=rows.size)
    return tree, hash_base(tree), made


def _tokenizer(model: SourceModel) -> Tokenizer | None:
    if model.tokenizer_json is None:
        return None
    return Tokenizer(
        model.tokenizer_json,
        model.chat_template,
        bos_token_id=model.config.bos_token_id,
        eos_token_ids=model.config.eos_token_ids,
        special_tokens=model.special_tokens,
    )


def _report_template(model: SourceModel) -> None:
    """Say what is wrong with the chat template, if there is one."""
    own = _tokenizer(model)
    if own is not None:
        tokenizer.report_template(own)


def _read_base(
    source: Path, model: SourceModel, dtype: str, quantisation: Quantisation | None, calibration: Sequence[str]
) -> tuple[Tree, str, Quantisation | None]:
    """The base tree, the hash of what it stands for, and what the manifest says of its matrices."""
    if calibration and (quantisation is None or quantisation.weights != "int4"):
        raise UserError("--calibration is what int4 is rounded by: it goes with --weights int4")
    if quantisation is None:
        base = load_base(model, dtype)
        return base, hash_base(base), None
    if calibration:
        return _calibrated(model, dtype, quantisation, calibration)
    quantised = load_quantised_base(model, dtype, quantisation)
    report(quantised, str(source))
    return quantised.tree, quantised.own.hexdigest(), described(quantisation, quantised)


def _exit_layer(exit_layer: int | None, num_layers: int, trained: TrainedParts | None) -> int:
    settled = None if trained is None else trained.manifest.exit_layer
    if trained is not None and not settled and drafter_class(trained.manifest.drafter).needs_exit_layer:
        settled = None  # an adapter does not say for which it was made
    if settled is not None:
        if exit_layer not in (None, settled):
            trained_at = f"at exit layer {settled}" if settled else "without an exit layer"
            raise UserError(f"--exit-layer {exit_layer}: the drafter was trained {trained_at}")
        exit_layer = settled
    if exit_layer is None:
        return min(DEFAULT_EXIT_LAYER, num_layers - 1)
    if not (0 if settled == 0 else 1) <= exit_layer < num_layers:
        raise UserError(f"--exit-layer must be in 1..{num_layers - 1} for {num_layers} layers, got {exit_layer}")
    return exit_layer
