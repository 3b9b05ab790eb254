"""transformers on the same device and shape: what plain decoding is measured against.

    python -m experiments.peers --shape 7b --out peers_7b.json

Random weights, greedy, batch 1, medians after two warm-ups. Three ways to decode: `generate` as it comes; `generate`
with a static cache, which compiles the decoding pass (mode "reduce-overhead", CUDA graphs); and the loop that
transformers' guide recommends for speed, a compiled single-token step over a static cache. Prefill is not in the times.
A way that fails here (no compiler, an older transformers) gives a row with the reason instead of a time.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

from dvi_jax.config import LlamaConfig
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.presets import SHAPES
from experiments.measure import settings_of, write_result

COMPILE_MODE = "reduce-overhead"
# What a missing compiler, an older transformers and a device that is too small raise; a defect of ours still shows.
FAILURES = (RuntimeError, ImportError, ValueError, OSError)


def main() -> int:
    """Measure every way, print the table, write the JSON after each row."""
    parser = ArgumentParser(prog="python -m experiments.peers", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), nargs="+", default=["7b"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if options.new_tokens < 2:
        raise UserError(f"--new-tokens must be at least 2, got {options.new_tokens}")
    result: dict[str, Any] = {"environment": environment(), "settings": settings_of(options), "rows": []}
    for shape in options.shape:
        peer = Peer(SHAPES[shape], getattr(torch, options.dtype), options.prompt, options.new_tokens)
        for way in options.ways:
            row = {"shape": shape, "way": way} | attempt(partial(WAYS[way], peer, options.repeats))
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
            if options.out:
                write_result(options.out, result)
        del peer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    show(result)
    return 0


def environment() -> dict[str, str]:
    """Device and versions; nothing here may touch JAX's devices, which would take the memory."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, **versions, "python": platform.python_version()}


class Peer:
    """transformers' Llama with random weights on the device, and the prompt it continues."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, prompt: int, new_tokens: int):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:  # made where they are used: the CPU would take minutes to draw 7B weights
                self.model = LlamaForCausalLM(peer_config(config)).eval()
        finally:
            torch.set_default_dtype(before)
        self.prompt = torch.randint(3, config.vocab_size, (1, prompt), device=self.device)
        self.new_tokens = new_tokens

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any]) -> float:
        """How long one call takes, the device waited for on both sides."""
        self.wait()
        began = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - began


def peer_config(config: LlamaConfig) -> transformers.LlamaConfig:
    """The same shape for transformers, without a token that ends a sequence."""
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The measurement, or the first line of why there is none."""
    try:
        return measure()
    except FAILURES as error:
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0]}"}


def eager_generate(peer: Peer, repeats: int) -> dict[str, Any]:
    """`generate` with a growing cache, nothing compiled."""
    return time_generate(peer, repeats, {})


def static_generate(peer: Peer, repeats: int) -> dict[str, Any]:
    """`generate` with a static cache and the decoding pass compiled by it."""
    compiled = transformers.generation.configuration_utils  # CompileConfig is newer than transformers 4.33
    if not hasattr(compiled, "CompileConfig"):
        raise ImportError(f"transformers {transformers.__version__} has no static cache to compile over")
    setting = compiled.CompileConfig(mode=COMPILE_MODE)
    setting._compile_all_devices = True  # transformers' own switch for devices other than GPUs
    return time_generate(peer, repeats, {"cache_implementation": "static", "compile_config": setting})


@torch.no_grad()
def time_generate(peer: Peer, repeats: int, options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds per token of `generate`, a prefill subtracted."""
    mask = torch.ones_like(peer.prompt)

    def generate() -> None:
        count = {"min_new_tokens": peer.new_tokens, "max_new_tokens": peer.new_tokens}
        ids = peer.model.generate(peer.prompt, attention_mask=mask, do_sample=False, **count, **options)
        assert ids.shape[1] == peer.prompt.shape[1] + peer.new_tokens

    def prefill() -> None:
        peer.model(peer.prompt, attention_mask=mask, use_cache=True)

    first = peer.seconds(generate)
    peer.seconds(generate)
    whole = [peer.seconds(generate) for _ in range(repeats)]
    before = statistics.median([peer.seconds(prefill) for _ in range(repeats + 1)][1:])
    return summary(peer, first, [seconds - before for seconds in whole])


@torch.no_grad()
def static_step(peer: Peer, repeats: int) -> dict[str, Any]:
    """A compiled single-token step over a static cache, called in a loop that never waits for the device."""
    from transformers import StaticCache

    model = peer.model
    cache = StaticCache(config=model.config, max_cache_len=peer.prompt.shape[1] + peer.new_tokens)

    def step(token: torch.Tensor) -> torch.Tensor:
        logits = model(token, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(dim=-1, keepdim=True)

    compiled = torch.compile(step, mode=COMPILE_MODE, fullgraph=True)

    def decode(token: torch.Tensor) -> None:
        for _ in range(peer.new_tokens - 1):
            torch.compiler.cudagraph_mark_step_begin()
            token = compiled(token).clone()  # the graph's output lies where its next replay writes

    times = []
    for _ in range(repeats + 2):
        cache.reset()
        token = step(peer.prompt)
        times.append(peer.seconds(partial(decode, token)))
    return summary(peer, times[0], times[2:])


def summary(peer: Peer, first: float, times: list[float]) -> dict[str, Any]:
    """A row: medians of decoding every token after the first."""
    per_token = statistics.median(times) / (peer.new_tokens - 1)
    spread = (max(times) - min(times)) / (peer.new_tokens - 1)
    return {
        "ms_per_token": 1e3 * per_token,
        "spread_ms": 1e3 * spread,
        "tokens_per_second": 1 / per_token,
        "first_call_seconds": first,
    }


WAYS: dict[str, Callable[[Peer, int], dict[str, Any]]] = {
    "eager generate": eager_generate,
    "static compiled generate": static_generate,
    "static compiled step": static_step,
}


def show(result: dict[str, Any]) -> None:
    """One line per way."""
    facts = result["environment"]
    table = Table(title=f"{facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}")
    for column in ("shape", "way", "ms / token", "spread", "tokens/s", "first call s"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        if "failed" in row:
            table.add_row(row["shape"], row["way"], row["failed"])
            continue
        numbers = row["ms_per_token"], row["spread_ms"], row["tokens_per_second"], row["first_call_seconds"]
        table.add_row(row["shape"], row["way"], *(f"{number:.2f}" for number in numbers))
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
