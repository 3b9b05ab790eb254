"""A checkpoint of random weights in a published shape, with another checkpoint's tokenizer: for speed over HTTP.

    python -m experiments.random_checkpoint --shape 7b --tokenizer-from CKPT --out DIR

The vocabulary is the tokenizer's, as long as that is larger than the shape's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dvi_jax.checkpoint import Manifest, write_checkpoint
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import ArgumentParser, add_debug, run_cli
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.presets import SHAPES
from experiments.measure import random_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the weights on the device and write them."""
    options = _parse(arguments)
    spoken, shape = open_checkpoint(options.tokenizer_from), SHAPES[options.shape]
    config = replace(
        shape,
        vocab_size=max(shape.vocab_size, Tokenizer.from_checkpoint(spoken).vocab_size),
        bos_token_id=spoken.config.bos_token_id,
        eos_token_ids=spoken.config.eos_token_ids,
    )
    manifest = Manifest(
        source="random", source_sha256="0" * 64, dtype=options.dtype, exit_layer=2, drafter_config={"rank": 0}
    )
    write_checkpoint(
        options.out,
        config,
        manifest,
        random_weights(config, manifest),
        tokenizer_json=spoken.tokenizer_json,
        chat_template=spoken.chat_template,
        special_tokens=spoken.special_tokens,
    )
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m experiments.random_checkpoint", description=__doc__)
    parser.add_argument("--shape", required=True, choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--tokenizer-from", required=True, metavar="CKPT")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a directory that is not there yet")
    add_debug(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_cli(main))
