"""`python -m conversion import|export`: the command line over `importing` and `exporting`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli
from dvi_jax.quantisation import GROUPS, WEIGHTS, Quantisation, chosen_storage


def main() -> int:
    """Parse the arguments and run one conversion."""
    args = _parser().parse_args()
    # Imported here, so that --help does not wait for jax.
    if args.command == "import":
        from conversion.importing import import_model
        from dvi_jax.importing.cache import named_source

        dtype, quantisation = _storage(args)
        manifest = import_model(
            named_source(args.source),
            args.out,
            adapter=args.adapter,
            dtype=dtype or "float32",
            exit_layer=args.exit_layer,
            quantisation=quantisation,
            calibration=args.calibration,
        )
        kept = f" with matrices in {quantisation.weights}" if quantisation else ""
        missing = "" if (args.out / "tokenizer.json").exists() else "; no tokenizer in the source: only token ids work"
        what = f"{manifest.dtype}{kept}, exit layer {manifest.exit_layer}, drafter {manifest.drafter}"
        print(f"{args.out}: {what}{missing}")
    else:
        from conversion.exporting import export_checkpoint

        export_checkpoint(args.source, args.out, args.to, merge=args.merge_lora)
        print(f"{args.out}: {args.to} export of {args.source}")
    return 0


def _storage(args: argparse.Namespace) -> tuple[str | None, Quantisation | None]:
    """The dtype and quantisation that an import's options ask for together."""
    if args.group is not None and args.weights != "int4":
        raise UserError("--group is of int4's scales: it goes with --weights int4")
    if args.quantise_head and args.weights in (None, "bfloat16"):
        raise UserError("--quantise-head needs --weights int8, int4 or float8, which it is kept in")
    options = {} if args.group is None else {"group": args.group}
    return chosen_storage(args.weights, args.dtype, head=args.quantise_head, **options)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m conversion", description="Weights in and out.")
    commands = parser.add_subparsers(dest="command", required=True)
    what = "Hugging Face directory or GGUF file -> checkpoint"
    importer = commands.add_parser("import", help=what, description=what)
    importer.add_argument("--adapter", type=Path, metavar="DIR", help="Kangaroo adapter to draft with")
    importer.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (default: float32)")
    importer.add_argument("--weights", choices=WEIGHTS, help="format of its matrices (default: the dtype)")
    importer.add_argument("--group", type=int, choices=GROUPS, help="inputs that share a scale of int4 (default: 64)")
    importer.add_argument(
        "--calibration", nargs="+", default=[], metavar="FILE", help="conversations to round int4 by (GPTQ)"
    )
    importer.add_argument("--quantise-head", action="store_true", help="keep the LM head in as few bits too")
    importer.add_argument(
        "--exit-layer",
        type=int,
        metavar="K",
        help="layers below the split (default: those of a drafter that comes along, else 2)",
    )
    what = "checkpoint -> Hugging Face directory, orbax export, or its drafter alone"
    exporter = commands.add_parser("export", help=what, description=what)
    exporter.add_argument("--to", required=True, choices=("orbax", "hf", "drafter"), help="form of the export")
    exporter.add_argument("--merge-lora", action="store_true", help="fold lora_D into the base weights first")
    model, trained = "a Hugging Face directory, a GGUF file or a cached org/name", "a checkpoint"
    for command, source in ((importer, model), (exporter, trained)):
        command.add_argument("--from", dest="source", metavar="SOURCE", type=Path, required=True, help=source)
        command.add_argument(
            "--out", metavar="DIR", type=Path, required=True, help="directory to write; must not exist"
        )
        add_debug(command)
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
