"""The verifier's own replies to many prompts, as packed text for distillation (`dvi_jax/learn/replies.py`).

    python -m experiments.self_generate --checkpoint CKPT --prompts prompts.npz --row-length 1024 --out replies.npz

`prompts.npz` holds `lengths` int32 [N] and `ids`, all prompts end to end (experiments/prompts.py writes it). The same
command goes on where it was killed or ran out of `--max-seconds`. `python -m dvi_jax.distill` makes replies to a log
and distils them in one go; this command is for prompts of one's own making, and for sampled replies.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dvi_jax.archives import DAMAGED_NPZ, read_npz
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.learn.replies import Progress, ReplyConfig, by_length, make_replies
from dvi_jax.loading import enable_compilation_cache, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Reply to the prompts and save the rows."""
    options = parse(arguments)
    enable_compilation_cache()
    model = load(options.checkpoint)
    prompts = read_prompts(options.prompts, options.limit)
    too_long = len(prompts) - sum(map(len, by_length(prompts, options.lengths).values()))
    print(f"{len(prompts) - too_long} prompts, {too_long} longer than {max(options.lengths)} tokens left out")
    config = ReplyConfig(
        lengths=tuple(options.lengths),
        new_tokens=options.new_tokens,
        batch_tokens=options.batch_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    packed, replies = make_replies(
        model, prompts, options.out, config, options.row_length, max_seconds=options.max_seconds, report=show
    )
    rows, share = len(packed.tokens), packed.mask.mean()
    print(f"{options.out}: {replies} replies in {rows} rows of {options.row_length}, {share:.0%} reply tokens")
    return 0


def show(progress: Progress) -> None:
    """A line for every batch."""
    print(
        f"{progress.batches} of {progress.of} batches, {progress.new_tokens} tokens, {progress.seconds:.0f} s",
        flush=True,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    defaults = ReplyConfig()
    parser = ArgumentParser(prog="python -m experiments.self_generate", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=0, help="prompts to use, 0 for all")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(defaults.lengths), help="length classes")
    parser.add_argument("--batch-tokens", type=int, default=defaults.batch_tokens, help="positions of a batch")
    parser.add_argument("--new-tokens", type=int, default=defaults.new_tokens)
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="stop then; the same command goes on")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0: greedy replies")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of sampled replies")
    return parser.parse_args(arguments)


def read_prompts(path: str, limit: int) -> list[list[int]]:
    """The first `limit` prompts (0: all) as token ids."""
    try:
        arrays = read_npz(path, "lengths", "ids")
    except DAMAGED_NPZ as error:
        raise UserError(f"{path} does not hold prompts (.npz with lengths and ids): {error}") from error
    lengths, ids = arrays["lengths"], arrays["ids"]
    whole = all(array.ndim == 1 and array.size and array.dtype.kind in "iu" for array in (lengths, ids))
    if not whole or lengths.min() < 1 or lengths.sum() != len(ids) or ids.min() < 0:
        raise UserError(f"{path} does not hold prompts: lengths of 1 or more must add up to the number of ids")
    prompts = np.split(ids, np.cumsum(lengths)[:-1])
    return [prompt.tolist() for prompt in (prompts[:limit] if limit else prompts)]


if __name__ == "__main__":
    sys.exit(run_cli(main))
