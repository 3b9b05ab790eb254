"""The tokens that matter for drafting: the most frequent ones of packed text, as a JSON list.

    python -m experiments.draft_vocabulary --packed replies.npz --size 8192 --out ids.json

`--draft-vocabulary ids.json` of generate and evaluate then drafts only these.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.learn.packing import load_packed


def main() -> int:
    """Count the tokens an assistant wrote, keep the most frequent, say how much of the text they cover."""
    parser = ArgumentParser(prog="python -m experiments.draft_vocabulary", description=__doc__)
    parser.add_argument("--packed", required=True, nargs="+")
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    packed = load_packed(options.packed)
    chosen, share = packed.frequent_tokens(options.size)
    options.out.write_text(json.dumps(chosen.tolist()) + "\n", encoding="utf-8")
    print(f"{len(chosen)} tokens cover {share:.2%} of {packed.mask.sum()}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
