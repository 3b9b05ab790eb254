"""Row classes: are a row's bits the same however many rows are computed beside it?

    python -m experiments.row_classes --shape smollm2 --passes 1x1 6x1 16x1 4x8 16x4 8x32
    python -m experiments.row_classes --shape 7b --layers 8 --trees --passes 1x1 16x1 64x1 32x8
    python -m experiments.row_classes --shape 7b --layers 8 --weights int4

B sequences are decoded in passes of W rows of each (all but one of them wrong drafts). They differ in what they go on
with and in where they stand. With `--trees` passes of more than one row are trees.
Every bit of the verifier's final hidden state, of every sequence at every position, must be what the first pass in the
list gives; if that has fewer sequences, it is run for others until all are known.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import KV, MOST_DRAFTS, WHOLE_KV, DecodeConfig
from dvi_jax.decode.batch import start
from dvi_jax.decode.plan import MOST_TREE_ROWS, PLAIN, Plan, row_class, rows_alike
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.loading import LoadedModel, enable_compilation_cache
from dvi_jax.presets import SHAPES
from dvi_jax.quantisation import BFLOAT16, WEIGHTS, chosen_storage
from experiments.lossless import final_bits, scripted
from experiments.measure import environment, random_model, settings_of, write_result


def main() -> int:
    """Run the check; exit status 1 if passes of one row class differ."""
    parser = ArgumentParser(prog="python -m experiments.row_classes", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--layers", type=int, metavar="L", help="fewer than the shape has")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--weights", choices=WEIGHTS, default=BFLOAT16, help="what matrices are kept in")
    parser.add_argument("--passes", nargs="+", default=["1x1", "4x1", "16x1", "4x4"], metavar="WxB")
    parser.add_argument("--trees", action="store_true", help="verify trees in place of chains")
    parser.add_argument("--kv", choices=KV, default=WHOLE_KV, help="what keys and values are kept in")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    most = MOST_TREE_ROWS if options.trees else MOST_DRAFTS + 1
    passes = [parse_pass(text, most) for text in options.passes]
    enable_compilation_cache()
    config = SHAPES[options.shape]
    config = replace(config, num_layers=options.layers or config.num_layers)
    _, how = chosen_storage(options.weights, None)
    model = scripted(random_model(config, options.dtype, 1, quantisation=how).with_kv(options.kv))
    prompt = np.random.default_rng(0).integers(3, config.vocab_size, options.prompt).tolist()
    rows: list[dict[str, Any]] = []
    most = max(batch for _, batch in passes)
    known = None
    for width, batch in passes:
        plan = Plan("tree" if options.trees else "chain", width - (not options.trees)) if width > 1 else PLAIN
        count = most if known is None else batch
        found = decoded(model, prompt, plan, batch, options.new_tokens, count)
        known = found if known is None else known
        rows.append(
            {"width": width, "batch": batch, "row_class": row_class(batch, width, config, options.dtype)}
            | compared(found, known)
        )
        print(rows[-1], flush=True)
    if options.out:
        write_result(options.out, {"environment": environment(), "settings": settings_of(options), "rows": rows})
    return 0 if all(row["equal"] for row in rows if row["row_class"] == rows[0]["row_class"]) else 1


def decoded(model: LoadedModel, prompt: list[int], plan: Plan, batch: int, new_tokens: int, count: int) -> np.ndarray:
    """Bits of the final hidden states that rounds gave `count` sequences, so many side by side as `batch` says.

    One row a new position: [count, new tokens - 1, D].
    """
    alike = rows_alike(batch * plan.rows, model.config, model.manifest.dtype)
    settings = DecodeConfig(draft_steps=plan.drafts if alike else plan.rows - 1, max_new_tokens=new_tokens)
    knobs = Knobs.make(plan.drafts, 0.0, ())
    prefilled = start(model, [prompt], settings, knobs, record=True)
    found: list[np.ndarray] = []
    for first in range(0, count, batch):
        state = _sequences(prefilled, range(first, first + batch), model.config.vocab_size)
        after = np.asarray(state.length)[:, None] + np.arange(new_tokens - 1)
        state = decode_rounds(model.definition, model.decode_params, state, knobs, plan)
        found += list(np.take_along_axis(final_bits(state), after[..., None], axis=1))
    return np.stack(found[:count])


def compared(found: np.ndarray, known: np.ndarray) -> dict[str, Any]:
    """What is said of sequences [B, positions, D] beside those that are known, the first B of which they are."""
    differing = (found != known[: len(found)]).any(axis=-1)
    earliest = np.argwhere(differing.T)[:1, ::-1].tolist()
    return {
        "positions": differing.size,
        "equal": not differing.any(),
        "differing_sequences": int(differing.any(axis=1).sum()),
        "first_difference": dict(zip(("sequence", "position"), earliest[0], strict=True)) if earliest else None,
    }


def _sequences(state: DecodeState, numbers: range, vocab_size: int) -> DecodeState:
    """Sequences of these numbers from a state of one: each goes on from another token, and up to half a prompt earlier.

    What lies in the caches behind that is stale, as rejected drafts are.
    """
    length, new_tokens = int(state.length[0]), int(state.limit[0] - state.length[0])
    pending = [np.random.default_rng(number).integers(3, vocab_size) for number in numbers]
    lengths = np.array([length - number * 7 % max(length // 2, 1) for number in numbers], np.int32)
    state = jax.tree.map(lambda x: jnp.repeat(jnp.copy(x), len(numbers), axis=0) if x.ndim else jnp.copy(x), state)
    return state.replace(
        tokens=state.tokens.at[np.arange(len(numbers)), lengths - 1].set(np.array(pending, np.int32)),
        length=jnp.asarray(lengths),
        limit=jnp.asarray(lengths + new_tokens),
        drafter=jnp.full((len(numbers), state.tokens.shape[1]), 1),  # drafts token 1: right by accident at most
    )


def parse_pass(text: str, most: int) -> tuple[int, int]:
    """WxB: rows of each sequence, at most so many, and sequences; `UserError` for anything else."""
    width, _, batch = text.partition("x")
    if not (width.isdecimal() and batch.isdecimal() and 1 <= int(width) <= most and int(batch) >= 1):
        raise UserError(f"--passes {text}: it must be rows by sequences, such as 6x1, at most {most} rows")
    return int(width), int(batch)


if __name__ == "__main__":
    sys.exit(run_cli(main))
