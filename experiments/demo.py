"""The whole of it in one command: import a model, decode, learn online, decode again. `make demo` runs this.

    python -m experiments.demo [--model DIR_OR_GGUF_OR_CKPT] [--data FILE] [--out DIR] [--minutes M]

Without --model and --data it fetches SmolLM2-135M-Instruct and ShareGPT (`experiments/fetch.py`). Each demo trains in a
fresh directory under --out; the imported model is kept there and found again by the next one.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from conversion.importing import import_model
from dvi_jax.config import DecodeConfig, TrainConfig
from dvi_jax.data import ConversationStream, Message
from dvi_jax.decode.batch import Generation, choose_plan, make_knobs, read_generations, start
from dvi_jax.decode.plan import rows_alike
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import Knobs
from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli
from dvi_jax.evaluate.curve import plot_learning_curve
from dvi_jax.evaluate.trace import FASTEST, PLAIN, SPECULATIVE
from dvi_jax.learn.online import OnlineResult
from dvi_jax.loading import LoadedModel, enable_compilation_cache, load
from dvi_jax.text_files import read_json
from dvi_jax.train import GoingOn, run
from experiments.fetch import fetch_conversations, fetch_model
from experiments.objectives import online_config

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
KEPT = Path(__file__).parent / "results" / "drafters" / "smollm2-135m-instruct"
KEPT_SETTINGS = DecodeConfig(draft_steps=3, threshold=0.4, max_new_tokens=64)
KEPT_PROMPTS = 6
EXAMPLE = "What is the capital of France?"
ANEW = GoingOn("--minutes gives it more", "the next demo begins anew", "the next demo begins anew")
DIFFERENT = 1  # exit status when an output differs from plain decoding


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; exit status 1 if a speculative output differs from its plain one."""
    began = time.perf_counter()
    options = _parser().parse_args(arguments)
    if options.minutes is not None and options.minutes <= 0:
        raise UserError(f"--minutes must be above 0, got {options.minutes:g}")
    enable_compilation_cache()
    console, out = Console(), Path(options.out)
    source = Path(options.model) if options.model else fetch_model()
    data = Path(options.data) if options.data else fetch_conversations()
    ConversationStream(data)  # a path that cannot be read is an error now, not after the import
    say(console, f"model {source}\nconversations {data}")
    checkpoint = find_or_import(source, out / "models", console)
    config = demo_config(checkpoint, data, out, options.minutes)
    decode_example(checkpoint, config, began, console)
    say(
        console,
        f"training online for at most {config.max_minutes:g} minutes, exit layer {config.exit_layer or 'as trained'},"
        f" {config.rollout_batch} prompts a rollout, {config.updates_per_rollout} updates each",
    )
    result = run(config, resume=False, console=console, going_on=ANEW)
    say(console, f"stream: {result.stream['conversations']}")
    count = len(result.held_out)
    say(console, f"decoding the {count} held-out prompts again one by one, plainly and speculatively")
    prompts = [list(prompt.ids) for prompt in result.held_out]
    timing = compare(result.model, prompts, config.decode, config.data.max_prompt_tokens)
    show(result, timing, config, console)
    identical = timing.identical == count and show_kept_drafter(checkpoint, prompts[:KEPT_PROMPTS], console)
    say(console, f"the whole demo took {(time.perf_counter() - began) / 60:.1f} minutes")
    return 0 if identical else DIFFERENT


def find_or_import(source: Path, folder: Path, console: Console) -> Path:
    """The checkpoint for `source`: itself, or the one imported under `folder` by an earlier demo, or a new import."""
    if (source / "MANIFEST.json").is_file():
        return source
    # Half-precision matrix products are slow on CPUs without hardware for them.
    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    name = hashlib.sha256(f"{source.resolve()} {dtype}".encode()).hexdigest()[:8]
    checkpoint = folder / f"{source.resolve().name}-{name}"
    if not checkpoint.exists():
        say(console, f"importing as {dtype} ...")
        import_model(source, checkpoint, dtype=dtype)
    say(console, f"checkpoint {checkpoint}")
    return checkpoint


def demo_config(checkpoint: Path, data: Path, out: Path, minutes: float | None) -> TrainConfig:
    """experiments/configs/demo.yaml for this model and these conversations, in a new run directory."""
    overrides = [
        f"checkpoint={_quoted(checkpoint)}",
        f"out={_quoted(out / time.strftime('run-%Y%m%d-%H%M%S'))}",
        f"data.files=[{_quoted(data)}]",
    ]
    if minutes is not None:
        overrides.append(f"max_minutes={minutes}")
    config = online_config(CONFIG, overrides)
    if (checkpoint / "drafter").exists():
        return online_config(CONFIG, [*overrides, "exit_layer=null"])
    layers = read_json(checkpoint / "config.json")["num_layers"]
    if config.exit_layer >= layers:
        return online_config(CONFIG, [*overrides, f"exit_layer={max(1, layers // 4)}"])
    return config


def decode_example(checkpoint: Path, config: TrainConfig, began: float, console: Console) -> None:
    """Load the model, answer one question, and say how long that took from the start of the demo."""
    model = load(checkpoint, exit_layer=config.exit_layer)
    if model.tokenizer is None:
        raise UserError(f"{checkpoint} has no tokenizer, which conversations need: import the model with one")
    prompt = model.tokenizer.chat([Message("user", EXAMPLE)])
    program, state, knobs = _prepare(model, prompt, config.decode, config.data.max_prompt_tokens, plain=True)
    say(console, f"decoding after {time.perf_counter() - began:.1f} s (a second run finds its programs compiled)")
    (generation,) = read_generations(program(model.decode_params, state, knobs), [len(prompt)], model.eos_ids)
    answer = model.tokenizer.decode(generation.new_ids).strip()
    say(console, f"  {EXAMPLE} -> {answer!r}")


@dataclass(frozen=True)
class Comparison:
    """Plain against speculative decoding of the same prompts, one at a time, prefill not counted.

    By mode as in `evaluate/trace.py`: `plain` has the bits of `speculative`, `fastest_plain` may be narrower.
    """

    identical: int  # outputs of the first two
    seconds: dict[str, list[float]]  # of each prompt
    tokens: dict[str, int]  # decoded, the prefill's own not counted
    rounds: int  # speculative ones

    def rate(self, mode: str) -> float:
        """Tokens per second."""
        return self.tokens[mode] / sum(self.seconds[mode])

    @property
    def fastest(self) -> str:
        """The faster way of decoding plainly."""
        return max((mode for mode in self.seconds if mode != SPECULATIVE), key=self.rate)

    @property
    def round_cost(self) -> float:
        """Time of a round over the time of the fastest plain token: tokens per round must exceed it to gain."""
        return sum(self.seconds[SPECULATIVE]) / self.rounds * self.rate(self.fastest)


def compare(
    model: LoadedModel, prompts: Sequence[list[int]], settings: DecodeConfig, longest_prompt: int
) -> Comparison:
    """Decode every prompt in every mode; which goes first alternates."""
    modes = {PLAIN: (settings, True), SPECULATIVE: (settings, False)}
    if not rows_alike(settings.width, model.config, model.manifest.dtype):
        modes[FASTEST] = (replace(settings, draft_steps=0), True)
    for own, plain in modes.values():  # untimed: compiles each program and runs it once
        program, state, knobs = _prepare(model, prompts[0], own, longest_prompt, plain=plain)
        jax.block_until_ready(program(model.decode_params, state, knobs))
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    tokens, identical, rounds = dict.fromkeys(modes, 0), 0, 0
    for index, prompt in enumerate(prompts):
        found: dict[str, Generation] = {}
        for mode in modes if index % 2 else reversed(modes):
            own, plain = modes[mode]
            program, state, knobs = _prepare(model, prompt, own, longest_prompt, plain=plain)
            began = time.perf_counter()
            state = jax.block_until_ready(program(model.decode_params, state, knobs))
            seconds[mode].append(time.perf_counter() - began)
            (found[mode],) = read_generations(state, [len(prompt)], model.eos_ids)
            tokens[mode] += sum(found[mode].accept_lengths)
        identical += found[PLAIN].output_ids == found[SPECULATIVE].output_ids
        rounds += found[SPECULATIVE].rounds
    return Comparison(identical, seconds, tokens, rounds)


def _prepare(
    model: LoadedModel, prompt: list[int], settings: DecodeConfig, longest_prompt: int, *, plain: bool
) -> tuple[Any, Any, Knobs]:
    """The compiled loop (jax keeps it), the prefilled state and the knobs of one generation."""
    knobs = make_knobs(settings, model.eos_ids, plain=plain)
    state = jax.block_until_ready(start(model, [prompt], settings, knobs, longest_prompt=longest_prompt))
    return (
        decode_rounds.lower(
            model.definition, model.decode_params, state, knobs, choose_plan(model, settings, plain=plain)
        ).compile(),
        state,
        knobs,
    )


def show(result: OnlineResult, timing: Comparison, config: TrainConfig, console: Console) -> None:
    """The closing table, what it means for speed here, and where everything lies."""
    before, after = result.before, result.after
    table = Table(title=f"{len(result.held_out)} held-out prompts, {result.updates} updates")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("accept rate", f"{before.accept_rate:.1%}", f"{after.accept_rate:.1%}")
    table.add_row("tokens per round", f"{before.tokens_per_round:.3f}", f"{after.tokens_per_round:.3f}")
    table.add_section()
    table.add_row("", "[bold]fastest plain[/]", "[bold]speculative[/]")
    rates = [timing.rate(mode) for mode in (timing.fastest, SPECULATIVE)]
    table.add_row("tokens per second", *(f"{rate:.1f}" for rate in rates))
    medians = [statistics.median(timing.seconds[mode]) for mode in (timing.fastest, SPECULATIVE)]
    table.add_row("median seconds a prompt", *(f"{median:.2f}" for median in medians))
    table.add_section()
    table.add_row("outputs identical", "", f"{timing.identical} of {len(result.held_out)}")
    console.print(table)
    say(
        console,
        f"Here a round of up to {config.decode.draft_steps} drafts takes as long as {timing.round_cost:.2f} tokens of"
        f" the fastest plain decoding, so speculation gains speed above {timing.round_cost:.2f} tokens per round;"
        f" it has {timing.tokens[SPECULATIVE] / timing.rounds:.2f}.",
    )
    try:
        plot_learning_curve(f"{config.out}/metrics.jsonl", f"{config.out}/curve.png", break_even=timing.round_cost)
    except UserError as error:  # matplotlib is an extra
        say(console, f"no curve: {error}")
    for name, path in (
        ("metrics", f"{config.out}/metrics.jsonl"),
        ("curve", f"{config.out}/curve.png"),
        ("checkpoint", result.checkpoint),
    ):
        say(console, f"{name:10} {path}")


def show_kept_drafter(checkpoint: Path, prompts: Sequence[list[int]], console: Console) -> bool:
    """Where the model is the one that the kept drafter was made for: how it decodes. False if an output differs."""
    theirs, ours = (read_json(path / "MANIFEST.json") for path in (KEPT, checkpoint))
    if theirs["source_sha256"] != ours["source_sha256"]:
        return True
    say(console, f"decoding {len(prompts)} of these prompts with the drafter kept in this repository")
    model = load(checkpoint, drafter_from=KEPT)
    timing = compare(model, prompts, KEPT_SETTINGS, max(map(len, prompts)))
    say(
        console,
        f"With that drafter, trained on 100 million tokens:"
        f" {timing.tokens[SPECULATIVE] / timing.rounds:.2f} tokens per round; fastest plain"
        f" {timing.rate(timing.fastest):.1f}, speculative {timing.rate(SPECULATIVE):.1f} tokens per second;"
        f" {timing.identical} of {len(prompts)} outputs identical to plain decoding of the same width",
    )
    return timing.identical == len(prompts)


def say(console: Console, text: str) -> None:
    """Print a line as it is: not wrapped, so that paths can be copied."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _quoted(path: Path) -> str:
    """A YAML string that reads back as the path, whatever is in it."""
    return "'" + str(path).replace("'", "''") + "'"


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.demo", description="Import, decode, learn, decode again.")
    parser.add_argument("--model", metavar="DIR_OR_GGUF_OR_CKPT", help="Llama to use (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", metavar="FILE", help="conversations to learn from (default: ShareGPT)")
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder of models and runs")
    parser.add_argument("--minutes", type=float, metavar="M", help="longest time to train (default: as in demo.yaml)")
    add_debug(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
