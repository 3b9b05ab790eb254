"""Times the PyTorch reference and the JAX port on the same weights, prompts and rounds, in one run.

    python -m experiments.kangaroo_speed --hf DIR [--adapter DIR]     a real model in float32
    python -m experiments.kangaroo_speed --shapes 7b                  random weights on the device, bfloat16

Both sides decode to exactly `--max-new-tokens`, and their accept lengths must be equal: exit status 1 if they are not.
Timed is decoding alone: prompts are prefilled and programs compiled before the clock starts, and both sides are waited
for before it stops. The two take turns, so that a busy machine slows both. On a CPU PyTorch gets one thread or all,
whichever is faster here: its threads wait for one another, which a busy machine makes ten times slower.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from rich.console import Console
from rich.table import Table

from conversion.parity.inputs import choose_prompts, make_case
from dvi_jax import presets
from dvi_jax.checkpoint import Manifest
from dvi_jax.config import DecodeConfig, LlamaConfig
from dvi_jax.decode.batch import read_generations, start
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import Knobs
from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli
from dvi_jax.importing.layout import HF_NAMES, base_slots
from dvi_jax.importing.tensors import get_path
from dvi_jax.loading import LoadedModel, build_model, load, restore_trained
from dvi_jax.model.llama import base_shapes
from dvi_jax.model.speculative_llama import split
from experiments.measure import write_result
from kangaroo_ref import KangarooModel, ModelConfig, build_kangaroo, load_kangaroo, prefill, spec_decode_step

SHAPES = {
    "7b": presets.SHAPES["7b"],
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_layers=4, num_heads=4, num_kv_heads=4,
        head_dim=64, max_position_embeddings=512,
    ),
}  # fmt: skip
DRAFTED_WRONGLY = 0.25  # share of the random models' tokens after which the drafter errs
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Pair:
    """The same weights on both sides, and what to decode with them."""

    name: str
    reference: KangarooModel
    model: LoadedModel
    prompts: list[list[int]]


@dataclass(frozen=True)
class Timing:
    """One side at one threshold: seconds to decode all prompts, per repeat, and the rounds it took."""

    seconds: list[float]
    accept_lengths: list[list[int]]  # one list per prompt

    @property
    def ms_per_round(self) -> float:
        """Median over the repeats."""
        return 1000 * statistics.median(self.seconds) / sum(map(len, self.accept_lengths))

    @property
    def tokens_per_second(self) -> float:
        """Tokens committed in rounds, median over the repeats."""
        return sum(map(sum, self.accept_lengths)) / statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Everything measured, and the two figures derived from it."""
        return {"ms_per_round": self.ms_per_round, "tokens_per_second": self.tokens_per_second, **asdict(self)}


@dataclass(frozen=True)
class Measurement:
    """Both sides at one threshold."""

    threshold: float
    torch: Timing
    jax: Timing
    jax_compile_seconds: float

    @property
    def difference(self) -> str | None:
        """Where the accept lengths first differ, or None."""
        pairs = zip(self.torch.accept_lengths, self.jax.accept_lengths, strict=True)
        for prompt, (wanted, found) in enumerate(pairs, 1):
            for number in range(1, max(len(wanted), len(found)) + 1):
                if wanted[number - 1 : number] != found[number - 1 : number]:
                    return f"threshold {self.threshold:g}, prompt {prompt}, round {number}"
        return None


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print the table, write the JSON; 1 if the accept lengths differ."""
    options = _parser().parse_args(arguments)
    config = DecodeConfig(draft_steps=options.draft_steps, max_new_tokens=options.max_new_tokens)
    if options.repeats < 1 or options.limit < 1:
        raise UserError("--repeats and --limit must be at least 1")
    # Two frameworks share the card: JAX must not reserve most of it. Read when its backend starts, which is later.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with tempfile.TemporaryDirectory(prefix="kangaroo-speed-") as scratch:
        pair = _random_pair(options) if options.shapes else _pair_from_files(options, Path(scratch))
    _choose_torch_threads(pair, config)
    measurements = [measure(pair, config, threshold, options.repeats) for threshold in options.thresholds]
    _print(pair, measurements, options)
    path = options.out or RESULTS / f"kangaroo_speed_{_device_slug()}.json"
    _write(path, pair, measurements, options)
    differences = [m.difference for m in measurements if m.difference is not None]
    if differences:
        print(f"accept lengths differ, so the speeds do not compare: first at {differences[0]}")
    return 1 if differences else 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.kangaroo_speed", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face Llama, or a GGUF file")
    source.add_argument("--shapes", choices=SHAPES, help="random weights of these shapes")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="Kangaroo adapter (default: random, fixed seed)")
    parser.add_argument("--exit-layer", type=int, default=2, metavar="K")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt-ids", action="append", metavar="1,2,3", help="token ids; may be given several times")
    prompts.add_argument("--questions", type=Path, metavar="FILE", help="Spec-Bench question.jsonl")
    parser.add_argument("--limit", type=int, default=2, metavar="N", help="prompts to decode")
    parser.add_argument("--prompt-length", type=int, default=128, metavar="N", help="of the random prompt (--shapes)")
    parser.add_argument("--draft-steps", type=int, default=6, metavar="S")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.0, 1.1], metavar="TAU")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: experiments/results/")
    add_debug(parser)
    return parser


def measure(pair: Pair, config: DecodeConfig, threshold: float, repeats: int) -> Measurement:
    """Warm both sides up on every prompt, then time them in turn `repeats` times."""
    knobs = Knobs.make(config.draft_steps, threshold, ())
    began = time.perf_counter()
    programs = [
        decode_rounds.lower(
            pair.model.definition, pair.model.decode_params, start(pair.model, [prompt], config, knobs), knobs
        ).compile()
        for prompt in pair.prompts
    ]
    compile_seconds = time.perf_counter() - began
    _time_torch(pair, config, threshold)
    _time_jax(pair, config, knobs, programs)
    torch_runs, jax_runs = [], []
    for _ in range(repeats):
        torch_runs.append(_time_torch(pair, config, threshold))
        jax_runs.append(_time_jax(pair, config, knobs, programs))
    return Measurement(threshold, _as_timing(torch_runs), _as_timing(jax_runs), compile_seconds)


Run = tuple[float, list[list[int]]]  # seconds over all prompts, accept lengths of each


def _as_timing(runs: Sequence[Run]) -> Timing:
    return Timing([seconds for seconds, _ in runs], runs[0][1])


def _choose_torch_threads(pair: Pair, config: DecodeConfig) -> None:
    if pair.reference.device.type != "cpu":
        return
    short = replace(config, max_new_tokens=min(config.max_new_tokens, 2 * config.draft_steps + 2))
    seconds: dict[int, float] = {}
    for threads in {1, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        seconds[threads] = _time_torch(pair, short, 0.0)[0]
    torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))


@torch.no_grad()
def _time_torch(pair: Pair, config: DecodeConfig, threshold: float) -> Run:
    # The original's rounds under the port's stopping rule: the last rounds draft no more than there is room for.
    seconds, accept_lengths = 0.0, []
    for prompt in pair.prompts:
        state = prefill(pair.reference, prompt)
        remaining, lengths = config.max_new_tokens - 1, []
        _wait_for_torch(pair.reference)
        began = time.perf_counter()
        while remaining > 0:
            steps = min(config.draft_steps, remaining - 1)
            done = spec_decode_step(pair.reference, state, draft_steps=steps, threshold=threshold)
            lengths.append(done.accept_length)
            remaining -= done.accept_length
        _wait_for_torch(pair.reference)
        seconds += time.perf_counter() - began
        accept_lengths.append(lengths)
    return seconds, accept_lengths


def _wait_for_torch(reference: KangarooModel) -> None:
    if reference.device.type == "cuda":
        torch.cuda.synchronize()


def _time_jax(pair: Pair, config: DecodeConfig, knobs: Knobs, programs: Sequence[Any]) -> Run:
    seconds, accept_lengths = 0.0, []
    for prompt, program in zip(pair.prompts, programs, strict=True):
        state = jax.block_until_ready(start(pair.model, [prompt], config, knobs))
        began = time.perf_counter()
        state = jax.block_until_ready(program(pair.model.decode_params, state, knobs))
        seconds += time.perf_counter() - began
        accept_lengths.append(read_generations(state, [len(prompt)], ())[0].accept_lengths)
    return seconds, accept_lengths


def _pair_from_files(options: argparse.Namespace, scratch: Path) -> Pair:
    case = make_case(options.hf, scratch, adapter=options.adapter, exit_layer=options.exit_layer)
    prompts = choose_prompts(case, options, options.max_new_tokens)[: options.limit]
    reference = load_kangaroo(case.hf, case.adapter, case.exit_layer, device=_torch_device())
    return Pair(case.name, reference, load(case.checkpoint), prompts)


def _torch_device() -> str:
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise UserError("JAX runs on a GPU and PyTorch sees none: set JAX_PLATFORMS=cpu, or install a CUDA build")
    return "cuda" if on_gpu else "cpu"


def _random_pair(options: argparse.Namespace) -> Pair:
    config, device = SHAPES[options.shapes], _torch_device()
    base, drafter = random_weights(config, torch.bfloat16, device)
    reference = _reference(config, base, drafter, options.exit_layer, device)
    if device == "cuda":
        torch.cuda.synchronize()  # JAX reads the same memory on another stream
    options_ = {"num_heads": config.num_heads, "num_kv_heads": config.num_heads, "rms_norm_eps": config.rms_norm_eps}
    manifest = Manifest(
        source="random",
        source_sha256="",
        dtype="bfloat16",
        exit_layer=options.exit_layer,
        drafter="kangaroo",
        drafter_config=options_,
    )
    definition, params = split(build_model(config, manifest, jax.tree.map(jnp.from_dlpack, base)))
    params = restore_trained(params, jax.tree.map(jnp.from_dlpack, drafter), None, "the random adapter", config)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(config.vocab_size, (options.prompt_length,), generator=generator).tolist()
    return Pair(
        f"{options.shapes} shapes, random", reference, LoadedModel(config, manifest, definition, params), [prompt]
    )


def random_weights(
    config: LlamaConfig, dtype: torch.dtype, device: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Base and adapter trees of torch tensors whose accept lengths no rounding can change.

    Every token has one successor, whose head row is the token's embedding: the layers add too little to hide it. The
    first `DRAFTED_WRONGLY` of the tokens share half of their embedding with another token. The adapter's norm keeps
    only that half, in which the other's successor is the longer row, so the drafter errs after these and no others.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: tuple[int, ...], std: float) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(std)

    shapes, width = base_shapes(config), config.hidden_size
    std, weak, half = width**-0.5, 0.05 * width**-0.5, width // 2
    base: dict[str, Any] = {"embed": random(shapes["embed"], 1.0), "norm": random(shapes["norm"], 1.0)}
    base["layers"] = {
        index: {name: random(shape, weak if name in ("out", "down") else std) for name, shape in layer.items()}
        for index, layer in shapes["layers"].items()
    }
    hard = int(DRAFTED_WRONGLY * config.vocab_size)
    base["embed"][hard : 2 * hard, :half] = base["embed"][:hard, :half]
    rows = base["embed"] * std
    rows[hard : 2 * hard, :half] *= 1.5
    order = torch.randperm(config.vocab_size, generator=generator, device=device)
    base["head"] = torch.empty_like(rows)
    base["head"][order.roll(-1)] = rows[order]
    drafter = {
        "attn_norm": random((width,), 1.0),
        "qkv": random((3 * width, width), std),
        "out": random((width, width), weak),
        "norm": random((width,), 1.0),
    }
    drafter["norm"][half:] = 0
    return base, drafter


def _reference(
    config: LlamaConfig, base: dict[str, Any], drafter: dict[str, torch.Tensor], exit_layer: int, device: str
) -> KangarooModel:
    # Rows of the fused tensors, as views: both frameworks read one copy of the weights.
    sizes = ModelConfig(**{field.name: getattr(config, field.name) for field in fields(ModelConfig)})
    adapter_sizes = ModelConfig(**{**vars(sizes), "num_layers": 1, "num_kv_heads": config.num_heads})
    state = {slot.name: get_path(base, slot.path)[slot.rows] for slot in base_slots(config, HF_NAMES)}
    query, key, value = drafter["qkv"].chunk(3)
    layer = "layers.0.self_attn"
    adapter_state = {
        "norm.weight": drafter["norm"],
        "layers.0.input_layernorm.weight": drafter["attn_norm"],
        f"{layer}.q_proj.weight": query,
        f"{layer}.k_proj.weight": key,
        f"{layer}.v_proj.weight": value,
        f"{layer}.o_proj.weight": drafter["out"],
    }
    return build_kangaroo(sizes, state, adapter_sizes, adapter_state, exit_layer, dtype=torch.bfloat16, device=device)


def _device_slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def _print(pair: Pair, measurements: Sequence[Measurement], options: argparse.Namespace) -> None:
    table = Table(
        title=f"{pair.name}: {len(pair.prompts)} prompts, {options.max_new_tokens} new tokens,"
        f" {options.draft_steps} draft steps, exit layer {pair.model.manifest.exit_layer},"
        f" {pair.model.manifest.dtype}, {jax.devices()[0].device_kind}; medians of {options.repeats}"
    )
    headings = ("threshold", "", "ms per round", "tokens per second", "tokens per round", "rounds", "ratio")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "" else "right")
    for m in measurements:
        ratio = f"{m.jax.tokens_per_second / m.torch.tokens_per_second:.2f}"
        for name, timing, shown in (("PyTorch", m.torch, ""), ("JAX", m.jax, ratio)):
            rounds = sum(map(len, timing.accept_lengths))
            mean = sum(map(sum, timing.accept_lengths)) / rounds
            row = (f"{timing.ms_per_round:.2f}", f"{timing.tokens_per_second:.1f}", f"{mean:.2f}", str(rounds), shown)
            table.add_row(f"{m.threshold:g}", name, *row)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(f"{os.cpu_count()} cores, PyTorch on {torch.get_num_threads()} threads")
    console.print("JAX compiled and prefilled in " + ", ".join(f"{m.jax_compile_seconds:.1f} s" for m in measurements))


def _write(path: Path, pair: Pair, measurements: Sequence[Measurement], options: argparse.Namespace) -> None:
    result = {
        "model": pair.name,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "torch": torch.__version__},
        "dtype": pair.model.manifest.dtype,
        "exit_layer": pair.model.manifest.exit_layer,
        "draft_steps": options.draft_steps,
        "max_new_tokens": options.max_new_tokens,
        "prompt_lengths": [len(prompt) for prompt in pair.prompts],
        "thresholds": [
            {
                "threshold": m.threshold,
                "accept_lengths_equal": m.difference is None,
                "tokens_per_second_ratio": m.jax.tokens_per_second / m.torch.tokens_per_second,
                "jax_compile_seconds": m.jax_compile_seconds,
                "torch": m.torch.to_json(),
                "jax": m.jax.to_json(),
            }
            for m in measurements
        ],
    }
    write_result(path, result)


if __name__ == "__main__":
    sys.exit(run_cli(main))
