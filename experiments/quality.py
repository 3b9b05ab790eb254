"""What fewer bits cost in quality: perplexity on held-out conversations, and how far predictions move.

    python -m experiments.quality --checkpoint MODEL --data sharegpt.json --out quality.json
    python -m experiments.quality --checkpoint MODEL --data sharegpt.json --formats --kv int8 float8 --row-length 8192

`MODEL` is a source that can be imported (a Hugging Face directory, a GGUF file, org/name); each format is imported once
into the cache, and with `--kv` the source's own weights keep keys and values in 8 bits. What it is compared with are
the source's weights, dequantised, in the device's dtype. Rows are packed from conversations whose first question is
held out from every training; at each of their positions are measured the probability of the next token, whether the
most probable token is the same, and the divergence KL(before || after).
"""

from __future__ import annotations

import math
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import KV, WHOLE_KV
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import HELD_OUT_SALT, is_held_out
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.memory import tree_bytes
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.learn.packing import pack
from dvi_jax.loading import LoadedModel, load
from dvi_jax.model.llama import Llama
from dvi_jax.model.speculative_llama import Definition, Params, join
from dvi_jax.quantisation import BFLOAT16, FORMATS
from experiments.domains import HELD_OUT_FRACTION, question_of
from experiments.measure import environment, settings_of, write_result
from experiments.pack import encoded

SOURCE = "source"  # the name of what is compared with
POSITIONS = 256  # whose logits are there at a time


def main() -> int:
    """Measure the source and every format, a line each."""
    parser = ArgumentParser(prog="python -m experiments.quality", description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="MODEL")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="conversations")
    parser.add_argument("--formats", nargs="*", choices=(BFLOAT16, *FORMATS), default=list(FORMATS))
    parser.add_argument("--kv", nargs="+", choices=KV[1:], default=[], help="the source with such keys and values")
    parser.add_argument("--also", nargs="+", default=[], metavar="CKPT", help="checkpoints made of it in other ways")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPUs, else bfloat16")
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    source = load(options.checkpoint, dtype=options.dtype)
    rows = held_out_rows(source, options)
    options.data = [Path(name).name for name in options.data]
    result: dict[str, Any] = {"environment": environment(), "settings": settings_of(options), "formats": {}}
    kept = {f"kv {kv}": source.with_kv(kv) for kv in options.kv}
    for weights in (SOURCE, *kept, *options.formats, *options.also):
        model = source if weights == SOURCE else kept.get(weights) or other(weights, options)
        found = compared(source, model, rows)
        before = result["formats"].get(SOURCE, found)["perplexity"]
        found |= {"perplexity_change": found["perplexity"] / before - 1, "base_bytes": tree_bytes(model.params.base)}
        result["formats"][weights] = found
        print(
            f"{weights}: perplexity {found['perplexity']:.4f} ({found['perplexity_change']:+.2%}), same first choice"
            f" {found['same_first']:.2%}, KL {found['kl']:.5f}, {found['base_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )
        if options.out:
            write_result(options.out, result)
    return 0


def other(weights: str, options: Any) -> LoadedModel:
    """The model in a format, or a checkpoint by its name."""
    if weights in options.also:
        return load(weights)
    return load(options.checkpoint, dtype=None if weights == BFLOAT16 else options.dtype, weights=weights)


def held_out_rows(model: LoadedModel, options: Any) -> np.ndarray:
    """int32 [rows, row length], from conversations that nothing trains on."""
    tokenizer: Tokenizer = model.need_tokenizer(f"{options.checkpoint} has no tokenizer, and texts need one")
    held_out = (
        conversation
        for conversation in ConversationStream(options.data)
        if is_held_out(question_of(conversation), HELD_OUT_FRACTION, HELD_OUT_SALT)
    )
    # A conversation has some hundred tokens: twice as many as pieces of 512 are enough, and reading stops there.
    sequences = islice(encoded(held_out, tokenizer), 2 * options.rows * -(-options.row_length // 512))
    return pack(sequences, options.row_length, model.config.vocab_size).tokens[: options.rows].astype(np.int32)


def compared(source: LoadedModel, model: LoadedModel, rows: np.ndarray) -> dict[str, float]:
    """Means over all positions of `rows` [rows, T]: of `model`, and of it against `source`."""
    sums = np.zeros(3)
    for row in rows:
        sums += np.asarray(
            _row(source.definition, source.params, model.definition, model.params, row[None]), np.float64
        )
    loss, same, divergence = sums / (rows.size - len(rows))
    return {"perplexity": math.exp(loss), "same_first": float(same), "kl": float(divergence), "positions": rows.size}


@partial(jax.jit, static_argnums=(0, 2))
def _row(before: Definition, params: Params, after: Definition, others: Params, tokens: jax.Array) -> jax.Array:
    """float32 [3], summed over the positions of tokens [1, T] that have a next one: loss, equal first choices, KL."""
    models = join(before, params).llama, join(after, others).llama
    finals = [final_states(llama, tokens)[0, :-1] for llama in models]
    behind = -len(finals[0]) % POSITIONS  # rows that fill up the last piece

    def cut(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, behind), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, POSITIONS, *x.shape[1:])

    def piece(given: tuple[jax.Array, ...]) -> jax.Array:
        *states, following, is_real = given
        left, right = (jax.nn.log_softmax(llama.logits(x)) for llama, x in zip(models, states, strict=True))
        loss = -jnp.take_along_axis(right, following[:, None], axis=1)[:, 0]
        same = (jnp.argmax(left, axis=1) == jnp.argmax(right, axis=1)).astype(jnp.float32)
        divergence = jnp.sum(jnp.exp(left) * (left - right), axis=1)
        return jnp.stack([loss, same, divergence]) @ is_real

    following, is_real = tokens[0, 1:], jnp.ones(len(finals[0]), jnp.float32)
    return jax.lax.map(piece, tuple(map(cut, (*finals, following, is_real)))).sum(axis=0)


def final_states(llama: Llama, tokens: jax.Array) -> jax.Array:
    """The verifier's states behind its last norm, of tokens [B, T]: [B, T, D]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # Without caches nothing is kept, and so nothing is read in fewer bits.
    shallow, deep = (None, None) if llama.kv == WHOLE_KV else llama.init_caches(*tokens.shape)
    hidden = llama.shallow(tokens, shallow, positions, fresh=True)[0]
    return llama.deep(hidden, deep, positions, fresh=True)[0]


if __name__ == "__main__":
    sys.exit(run_cli(main))
