"""The verifier's own replies to many prompts, as packed text for distillation.

    python -m experiments.self_generate --checkpoint CKPT --prompts prompts.npz --out replies.npz

Greedy replies are what a drafter has to predict at run time; text of other writers is further from it. `prompts.npz`
holds `lengths` int32 [N] and `ids`, all prompts end to end (experiments/pack.py writes it).
"""

from __future__ import annotations

import sys
import time

import numpy as np

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.generate import generate
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.learn.packing import pack
from dvi_jax.load import enable_compilation_cache, load


def main() -> int:
    """Decode batch by batch, prompts of like length together, and save prompt + reply with the reply marked."""
    parser = ArgumentParser(prog="python -m experiments.self_generate", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--limit", type=int, default=0, help="prompts to use, 0 for all")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--max-seconds", type=float, default=1e9)
    options = parser.parse_args()
    enable_compilation_cache()
    model = load(options.checkpoint)
    prompts = read_prompts(options.prompts, options.limit)
    settings = DecodeConfig(0, 0.0, options.new_tokens)
    sequences, new_tokens, began = [], 0, time.perf_counter()
    batches = [prompts[i : i + options.batch] for i in range(0, len(prompts) - options.batch + 1, options.batch)]
    order = np.random.default_rng(0).permutation(len(batches))
    for done, index in enumerate(order):
        batch = batches[index]
        generations, _ = generate(model, batch, settings, plain=True, longest_prompt=len(prompts[-1]))
        for prompt, generation in zip(batch, generations, strict=True):
            mask = [False] * len(prompt) + [True] * len(generation.new_ids)
            sequences.append((generation.output_ids, mask))
            new_tokens += len(generation.new_ids)
        seconds = time.perf_counter() - began
        if done % 10 == 0:
            print(
                f"{done + 1} of {len(batches)} batches, {new_tokens} tokens, {new_tokens / seconds:.0f} tokens/s",
                flush=True,
            )
        if seconds > options.max_seconds:
            break
    packed = pack(sequences, options.row_length, model.config.vocab_size)
    packed.save(options.out)
    print(f"{options.out}: {packed.tokens.shape[0]} rows of {options.row_length}, {packed.mask.mean():.0%} replies")
    return 0


def read_prompts(path: str, limit: int) -> list[list[int]]:
    """The prompts, longest last, so that batches hold like lengths."""
    with np.load(path) as file:
        ends = np.cumsum(file["lengths"])
        prompts = np.split(file["ids"], ends[:-1])
    return sorted((prompt.tolist() for prompt in (prompts[:limit] if limit else prompts)), key=len)


if __name__ == "__main__":
    sys.exit(run_cli(main))
