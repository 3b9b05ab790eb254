"""Plain decoding against transformers on the CPU: milliseconds per token, same weights, same prompt, one run.

    python -m experiments.plain_cpu --hf DIR --new-tokens 64

Float32, greedy, batch 1; both take turns; medians over the repeats; prefill and compilation are not in the times. Needs
the `convert` extra (transformers 4.33.3). Exit status 1 if the token ids differ.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from conversion.importing import import_model
from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.loading import enable_compilation_cache, load
from experiments.measure import environment, write_result


def main() -> int:
    """Measure, print the table, write the JSON."""
    parser = ArgumentParser(prog="python -m experiments.plain_cpu", description=__doc__)
    parser.add_argument("--hf", required=True, type=Path, metavar="DIR")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 4], help="rows of the plain program")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    enable_compilation_cache()
    with tempfile.TemporaryDirectory() as scratch:
        import_model(options.hf, Path(scratch) / "model")
        model = load(Path(scratch) / "model")
    peer = load_peer(options.hf)
    prompt = list(range(100, 100 + options.prompt_tokens))
    settings = {
        f"width {width}": DecodeConfig(draft_steps=width - 1, max_new_tokens=options.new_tokens)
        for width in options.widths
    }
    times: dict[str, list[float]] = {name: [] for name in ("transformers", *settings)}
    ids: dict[str, list[int]] = {}
    for repeat in range(options.repeats + 1):
        ids["transformers"], seconds = decode_peer(peer, prompt, options.new_tokens)
        times["transformers"].append(seconds)
        for name, setting in settings.items():
            (generation,), seconds = generate_batch(model, [prompt], setting, plain=True, eos_ids=())
            ids[name] = generation.new_ids
            times[name].append(seconds)
        if not repeat:  # the first of each warms up
            times = {name: [] for name in times}
    per_token = {name: 1e3 * statistics.median(t) / (options.new_tokens - 1) for name, t in times.items()}
    equal = all(found == ids["transformers"] for found in ids.values())
    show(per_token, equal)
    if options.out:
        facts = environment() | {"torch": torch.__version__, "cores": os.cpu_count()}
        result = {"environment": facts, "ms_per_token": per_token, "seconds": times, "equal_ids": equal}
        write_result(options.out, result)
    return 0 if equal else 1


def load_peer(path: Path) -> Any:
    """transformers' own model, in float32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()


@torch.no_grad()
def decode_peer(peer: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
    """Greedy ids, and the seconds of every token after the first."""
    output = peer(torch.tensor([prompt]), use_cache=True)
    ids = [int(output.logits[0, -1].argmax())]
    began = time.perf_counter()
    while len(ids) < new_tokens:
        output = peer(torch.tensor([ids[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        ids.append(int(output.logits[0, -1].argmax()))
    return ids, time.perf_counter() - began


def show(per_token: dict[str, float], equal: bool) -> None:
    """One line each, with the ratio to transformers."""
    table = Table(title=f"plain decoding, float32, {os.cpu_count()} cores; ids {'equal' if equal else 'DIFFER'}")
    for column in ("", "ms / token", "against transformers"):
        table.add_column(column, justify="right")
    for name, milliseconds in per_token.items():
        table.add_row(name, f"{milliseconds:.1f}", f"{milliseconds / per_token['transformers']:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
