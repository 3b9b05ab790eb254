"""Command line of self-distillation: python -m dvi_jax.distill --model MODEL --data LOG --out DIR

The model replies to the log's questions, a drafter that suits its size learns from the replies, and what it brings is
measured. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from dataclasses import replace
from typing import Any

import jax
from rich.console import Console

from dvi_jax.checkpoint import DTYPES
from dvi_jax.command_line import AUTO_DRAFTS, add_kv_option, add_mesh_option, progress_bar
from dvi_jax.config import WHOLE_KV, DecodeConfig, DistillConfig, MeshConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.choosing import PlanChooser
from dvi_jax.decode.memory import readable
from dvi_jax.decode.plan import plan_for
from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli
from dvi_jax.evaluate.runner import PairedDecoder
from dvi_jax.evaluate.trace import FASTEST, PLAIN, SPECULATIVE
from dvi_jax.learn.recipe import Recipe, parameters
from dvi_jax.learn.replies import Progress
from dvi_jax.learn.self_distill import Estimate, SelfDistillation
from dvi_jax.loading import LoadedModel, enable_compilation_cache
from dvi_jax.processes import add_process_options, is_first, one_of_several
from dvi_jax.quantisation import WEIGHTS
from dvi_jax.train import GoingOn, notice, say

MINUTES = 15.0
COMPARED_PROMPTS, COMPARED_TOKENS = 8, 64
BY_THE_SAME = GoingOn(
    "the same command goes on", "the same command goes on", "the same command goes on from the replies"
)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, say what it will take, make the drafter, and say what it brings."""
    options = _parser().parse_args(arguments)
    for name in ("minutes", "passes"):
        if not 0 < getattr(options, name) < math.inf:  # not a number, too
            raise UserError(f"--{name} must be a number above 0, got {getattr(options, name):g}")
    with one_of_several(options):
        return _distill(options)


def _distill(options: argparse.Namespace) -> int:
    """Do what the options say; of several processes only the first one is heard."""
    enable_compilation_cache()
    console = Console()
    mesh = MeshConfig() if options.mesh is None else MeshConfig.parse(options.mesh)
    storage = {"dtype": options.dtype, "weights": options.weights, "kv": options.kv}
    work = SelfDistillation(options.model, options.data, options.out, **storage, mesh=mesh)
    if work.recipe is None:
        say(console, "measuring a batch of replies and an update; their programs are compiled first, about a minute")
        estimate = work.prepare(options.minutes, options.passes)
        assert work.recipe is not None
        for line in (*describe(work), *describe_estimate(estimate, work.recipe, options.minutes)):
            say(console, line)
        if options.estimate:
            return 0
        work.begin()
    else:
        for line in describe(work):
            say(console, line)
        say(console, f"{options.out} goes on with the settings it was begun with")
    reply(work, console)
    model = train(work, console)
    if not is_first():
        return 0
    if jax.process_count() > 1 and mesh.model > 1:
        say(console, "measured  not with parts of the model in other processes: measure with dvi evaluate")
    else:
        for line in compare(model, work.held_out_prompts(COMPARED_PROMPTS)):
            say(console, line)
    say(console, f"use it    {generate_command(options)}")
    return 0


def generate_command(options: argparse.Namespace) -> str:
    """What decodes with the drafter, the model kept as it was here; for a shell."""
    kept = {"--dtype": options.dtype, "--weights": options.weights, "--kv": options.kv.replace(WHOLE_KV, "")}
    storage = [part for name, value in kept.items() if value for part in (name, value)]
    command = ["dvi", "generate", "--checkpoint", options.model, "--drafter-from", options.out, *storage]
    return shlex.join([*map(str, command), "--plan", "auto", "--prompt", "Why is the sky blue?"])


def describe(work: SelfDistillation) -> list[str]:
    """The model, and the drafter that was chosen for it."""
    recipe, manifest = work.recipe, work.checkpoint.manifest
    assert recipe is not None
    size, device = parameters(work.checkpoint.config) / 1e6, jax.devices()[0].device_kind
    options = ", ".join(f"{name} {value}" for name, value in recipe.drafter_options.items())
    where = "" if recipe.exit_layer is None else f", exit layer {recipe.exit_layer}"
    kept = manifest.quantisation
    form = manifest.dtype if kept is None else f"{manifest.dtype} with matrices in {kept.weights}"
    return [
        f"model     {manifest.source}: {size:,.0f} million parameters, {form}, on {device}",
        f"drafter   {recipe.drafter}{where}, {options}",
    ]


def describe_estimate(estimate: Estimate, recipe: Recipe, minutes: float) -> list[str]:
    """What the work will take, and why where that is more than was asked for."""
    lines = [
        f"replies   to {estimate.prompts:,} prompts of the log, {estimate.tokens:,} tokens in all:"
        f" about {duration(estimate.reply_seconds)}",
        f"training  {recipe.passes} passes over them: about {duration(estimate.training_seconds)}",
        f"memory    {readable(estimate.reply_memory)} for the replies, {readable(estimate.training_memory)} for"
        f" training, {readable(estimate.free_memory)} are free",
        f"disk      at most {readable(estimate.disk)}, {readable(estimate.free_disk)} are free",
    ]
    if estimate.reply_seconds + estimate.training_seconds > 1.5 * 60 * minutes:
        lines.append(
            f"--minutes {minutes:g} is too little on this device: with less there would be nothing to learn from"
        )
    return lines


def duration(seconds: float) -> str:
    """Seconds for people: seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def reply(work: SelfDistillation, console: Console) -> None:
    """The replies, with a bar of their batches."""
    bar = progress_bar("batches", console)
    task = bar.add_task("replies", total=None, note="compiling")

    def show(progress: Progress) -> None:
        note = f"{progress.new_tokens / progress.seconds:,.0f} tokens/s"
        bar.update(task, completed=progress.batches, total=progress.of, note=note)
        if not console.is_terminal:
            say(console, f"replies   {progress.batches} of {progress.of} batches, {note}")

    with bar:
        work.reply(show)


def train(work: SelfDistillation, console: Console) -> LoadedModel:
    """The training run, with a bar of its updates: the model with its drafter."""
    config: DistillConfig = work.training()
    bar = progress_bar("updates", console)
    task = bar.add_task("training", total=config.steps, note="compiling")

    def show(kind: str, record: dict[str, Any]) -> None:
        line = notice(kind, record, BY_THE_SAME)
        if line:
            say(console, line)
            return
        agreement = " ".join(f"{rate:.1%}" for rate in record["agreement"])
        if kind == "eval":
            say(console, f"held out  agreement of drafts {agreement}")
            return
        bar.update(task, completed=record["step"], note=f"agreement {agreement}")
        if not console.is_terminal:
            say(console, f"training  update {record['step']} of {config.steps}, agreement {agreement}")

    with bar:
        return work.train(show).model


def compare(model: LoadedModel, prompts: list[list[int]]) -> list[str]:
    """Speed with the drafter, by the plan that is best here, against the fastest plain decoding of the same prompts."""
    room = model.config.context_length - AUTO_DRAFTS - 1
    tokens = min(COMPARED_TOKENS, room // 2)
    prompts = [prompt for prompt in prompts if len(prompt) + tokens <= room]
    if not prompts:
        return ["the log has too few questions to keep some apart: measure with dvi evaluate"]
    drafts = min(AUTO_DRAFTS, model.max_drafts or AUTO_DRAFTS)
    settings = DecodeConfig(draft_steps=drafts, max_new_tokens=tokens)
    chooser = PlanChooser.measured(model, settings, prompts[0])
    # What is accepted is known before the first choice, or a plan might not be tried at all.
    widest = plan_for(drafts, drafts_blocks=model.drafts_blocks)
    for prompt in prompts:
        (generation,), _ = generate_batch(model, [prompt], replace(settings, plan=str(widest)))
        chooser.note(widest, generation.accept_lengths, generation.drafted)
    decoder = PairedDecoder(model, settings, chooser=chooser)
    decoded, seconds, rounds = 0, {FASTEST: 0.0, SPECULATIVE: 0.0}, 0
    for turn, prompt in enumerate(prompts):
        timed = decoder.decode(prompt, turn)
        speculative = timed[SPECULATIVE].generation
        decoded += sum(speculative.accept_lengths)
        rounds += speculative.rounds
        seconds[SPECULATIVE] += timed[SPECULATIVE].seconds
        seconds[FASTEST] += min(timed[mode].seconds for mode in (FASTEST, PLAIN) if mode in timed)
    plan = chooser.begin().plan
    plain, fast = decoded / seconds[FASTEST], decoded / seconds[SPECULATIVE]
    measured = (
        f"measured  on {len(prompts)} held-out prompts: fastest plain {plain:,.0f} tokens/s, --plan auto"
        f" {fast:,.0f} ({fast / plain:.2f} times), {decoded / rounds:.2f} tokens a round"
    )
    if plan.drafts and fast > plain:
        return [measured, f"plan      {plan} is what auto chooses here"]
    return [measured, "plan      plain: with this drafter, drafting does not pay on this device"]


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m dvi_jax.distill", description="Make a drafter for a model from a log of conversations."
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a checkpoint, a Hugging Face directory, a GGUF file or a cached org/name",
    )
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help="conversations; their questions are used"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="directory for everything; --drafter-from takes it later"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the model (default: float32 on CPUs, else bfloat16)")
    parser.add_argument("--weights", choices=WEIGHTS, help="format of its matrices (default: the dtype)")
    add_kv_option(parser)
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help="minutes that it may take, roughly")
    parser.add_argument("--passes", type=int, default=8, metavar="N", help="passes over the replies in training")
    parser.add_argument("--estimate", action="store_true", help="say what it would take, and stop")
    add_mesh_option(parser)
    add_process_options(parser)
    add_debug(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
