"""What share of the device's matrix rate a prefill reaches.

    python -m experiments.prefill_rate --shape 7b --prompt 2048

Floating-point operations by formula (two for every weight of a layer and token, attention's products over the causal
half) over the median time, beside a large square product in the same process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from dvi_jax.config import LlamaConfig
from dvi_jax.decode.prefill import cache_slots, prefill
from dvi_jax.decode.state import Knobs
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.loading import enable_compilation_cache
from dvi_jax.presets import SHAPES
from experiments.measure import environment, median_seconds, random_model, settings_of, write_result


def main() -> int:
    """Measure one prefill and one product."""
    parser = ArgumentParser(prog="python -m experiments.prefill_rate", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--square", type=int, default=8192, help="size of the product")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    enable_compilation_cache()
    model = random_model(SHAPES[options.shape], options.dtype, 1)
    prompt = jax.random.randint(jax.random.key(0), (1, options.prompt), 3, model.config.vocab_size, jnp.int32)
    length, eos_ids = jnp.array([options.prompt]), Knobs.make(0, 0.0, ()).eos_ids
    slots = cache_slots(options.prompt + 8)
    arrays = (model.decode_params, prompt, length, length + 8, eos_ids)
    seconds = median_seconds(lambda: prefill(model.definition, *arrays, slots=slots, width=1))
    rate = operations(model.config, options.prompt) / seconds
    square = jnp.ones((options.square, options.square), options.dtype)
    multiply = jax.jit(jnp.matmul)
    best = 2 * options.square**3 / median_seconds(lambda: multiply(square, square), 10)
    row = {
        "prompt": options.prompt,
        "milliseconds": 1e3 * seconds,
        "teraflops": 1e-12 * rate,
        "square_teraflops": 1e-12 * best,
        "share": rate / best,
    }
    print(row)
    if options.out:
        write_result(options.out, {"environment": environment(), "settings": settings_of(options), "rows": [row]})
    return 0


def operations(config: LlamaConfig, tokens: int) -> int:
    """Floating-point operations of a causal forward pass over so many tokens; the head runs on the last one alone."""
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * query + 2 * kv) + 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (2 * layer * tokens + 2 * query * tokens**2)


if __name__ == "__main__":
    sys.exit(run_cli(main))
