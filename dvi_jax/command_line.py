"""What the command lines share: the options that name a model, how it drafts and samples, and the progress bar."""

from __future__ import annotations

import argparse
import math

from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dvi_jax.checkpoint import DTYPES
from dvi_jax.compiling import tell_when_compiling
from dvi_jax.config import KV, WHOLE_KV, DecodeConfig, MeshConfig, SamplingConfig
from dvi_jax.decode.memory import GIB
from dvi_jax.decode.plan import Plan, drafts_of
from dvi_jax.errors import UserError, add_debug, notice
from dvi_jax.loading import LoadedModel, enable_compilation_cache, load
from dvi_jax.mesh import make_mesh
from dvi_jax.quantisation import WEIGHTS
from dvi_jax.texts import usual_drafting

AUTO = "auto"  # the plan is chosen while decoding
AUTO_DRAFTS = 6  # most drafts that it chooses from


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_model` reads, and --debug."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="a checkpoint; or a Hugging Face directory, a GGUF file or a cached org/name, which is imported once",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of such an import (default: float32 on CPUs, else bfloat16)"
    )
    parser.add_argument("--weights", choices=WEIGHTS, help="format of its matrices (default: the dtype)")
    add_kv_option(parser)
    parser.add_argument(
        "--drafter-from",
        metavar="DIR",
        help="draft with the trained drafter of another directory, or of the package by its name",
    )
    parser.add_argument("--any-drafter", action="store_true", help="accept one that was made for other weights")
    parser.add_argument("--draft-vocabulary", metavar="FILE.json", help="list of the only token ids to draft")
    parser.add_argument(
        "--exit-layer",
        type=int,
        metavar="K",
        help="layers below the split, of an untrained drafter (default: the checkpoint's)",
    )
    add_debug(parser)


def add_kv_option(parser: argparse.ArgumentParser) -> None:
    """Add --kv."""
    parser.add_argument(
        "--kv",
        choices=KV,
        default=WHOLE_KV,
        help="what the cache keeps keys and values in; dtype is the model's",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add those of `add_drafting_options`, and those that measure before decoding."""
    add_drafting_options(parser)
    parser.add_argument(
        "--adaptive", action="store_true", help="measure what a draft costs, and draft only while it pays"
    )
    parser.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="refuse to use more memory than this, of a device"
    )


def add_drafting_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_model` and `decode_settings` read, --max-new-tokens apart."""
    defaults = DecodeConfig()
    add_loading_options(parser)
    parser.add_argument(
        "--draft-steps",
        type=int,
        metavar="S",
        help=f"most drafts of a round (default: as in training, or {defaults.draft_steps}; --plan auto: {AUTO_DRAFTS})",
    )
    parser.add_argument(
        "--plan",
        metavar="PLAN",
        help="how rounds draft: auto, plain, chain:N, block:N, tree:ROWS[xLEVELS] or early-exit:N"
        " (default: as in training, else by device)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=defaults.threshold,
        metavar="TAU",
        help="stop drafting after a draft less probable than this",
    )
    add_mesh_option(parser)


def add_mesh_option(parser: argparse.ArgumentParser) -> None:
    """Add --mesh."""
    parser.add_argument(
        "--mesh", metavar="data=N,model=M", help="devices: N parts of a batch times M parts of the model (default: 1)"
    )


def mesh_of(options: argparse.Namespace) -> Mesh | None:
    """The devices of --mesh; None for one."""
    text = getattr(options, "mesh", None)  # not every command takes several
    return None if text is None else make_mesh(MeshConfig.parse(text))


def decode_settings(options: argparse.Namespace) -> DecodeConfig:
    """How the options say to decode; with `--plan auto` the plan is left open."""
    defaults = DecodeConfig()
    if options.plan in (None, AUTO):
        plan, drafts = None, AUTO_DRAFTS if options.plan == AUTO else defaults.draft_steps
        drafts = drafts if options.draft_steps is None else options.draft_steps
    else:
        parsed = Plan.parse(options.plan)
        plan, drafts = options.plan, drafts_of(parsed)
        if options.draft_steps not in (None, drafts):
            raise UserError(f"--plan {plan} says how far a round drafts: leave out --draft-steps {options.draft_steps}")
    return DecodeConfig(
        draft_steps=drafts, plan=plan, threshold=options.threshold, max_new_tokens=options.max_new_tokens
    )


def check_engine_options(options: argparse.Namespace, flag: str) -> None:
    """Raise `UserError` for options that say nothing where an engine decodes, as `flag` has it do."""
    usual = {"rejection": False, "adaptive": False, "threshold": DecodeConfig.threshold, "memory_limit": None}
    for name in (name for name, value in usual.items() if getattr(options, name, value) != value):
        raise UserError(
            f"with {flag} drafts follow --plan and samples their seeds: leave out --{name.replace('_', '-')}"
        )
    if options.plan == AUTO and options.draft_steps is not None:
        raise UserError(f"with {flag} --plan auto chooses how far a round drafts: leave out --draft-steps")
    if options.coordinator is not None and options.mesh is None:
        raise UserError(f"with {flag} several processes decode on one mesh of all their devices: add --mesh data=N")


def settings_for(model: LoadedModel, options: argparse.Namespace) -> DecodeConfig:
    """`decode_settings`, where they say how to draft; else as `usual_drafting`, told of where it is none."""
    settings = decode_settings(options)
    if options.plan is not None or options.draft_steps is not None:
        return settings
    if getattr(options, "adaptive", False) and not model.drafter_is_trained:  # not every command has it
        return settings
    settings = usual_drafting(model, settings)
    if not settings.draft_steps:
        notice(
            f"the drafter ({model.manifest.drafter}) is untrained: decoding plainly. dvi distill trains one;"
            " --plan or --draft-steps drafts all the same"
        )
    return settings


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `sampling_settings` reads."""
    defaults = SamplingConfig()
    group = parser.add_argument_group("sampling (greedy unless a temperature is given)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy, 1 the model's own distribution")
    group.add_argument(
        "--top-k", type=int, default=defaults.top_k, metavar="K", help="only the K best tokens; 0 for all"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=defaults.top_p,
        metavar="P",
        help="only the best tokens that together have this probability",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=defaults.min_p,
        metavar="P",
        help="only tokens at least this share as probable as the best",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=defaults.repetition_penalty,
        metavar="R",
        help="divide the logits of tokens that are there already",
    )
    group.add_argument("--seed", type=int, default=defaults.seed, metavar="N", help="seed of the noise")
    group.add_argument(
        "--rejection", action="store_true", help="accept by min(1, p/q): more drafts accepted, ids depend on the drafts"
    )


def sampling_settings(options: argparse.Namespace) -> SamplingConfig | None:
    """How the options say to sample; None is greedy."""
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0
        defaults = SamplingConfig()
        names = ("top_k", "top_p", "min_p", "seed")
        given = [name for name in names if getattr(options, name) != getattr(defaults, name)]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} needs a --temperature above 0: decoding is greedy without")
        if options.repetition_penalty == defaults.repetition_penalty:
            return None
    return SamplingConfig(
        temperature=temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        coupled=not options.rejection,
    )


def load_model(options: argparse.Namespace) -> LoadedModel:
    """The model that the options name; compiled programs are kept on disk from here on."""
    enable_compilation_cache()
    tell_when_compiling()
    return load(
        options.checkpoint,
        dtype=options.dtype,
        weights=options.weights,
        any_drafter=options.any_drafter,
        exit_layer=options.exit_layer,
        drafter_from=options.drafter_from,
        draft_vocabulary=options.draft_vocabulary,
        kv=options.kv,
        mesh=mesh_of(options),
    )


def memory_limit(options: argparse.Namespace) -> int | None:
    """Bytes of --memory-limit; None where the device's own memory is the limit."""
    if options.memory_limit is None:
        return None
    if not 0 < options.memory_limit < math.inf:
        raise UserError(f"--memory-limit must be a number of GiB above 0, got {options.memory_limit}")
    return int(options.memory_limit * GIB)


def progress_bar(things: str, console: Console) -> Progress:
    """A bar counting `things`, with a free `note`; silent where the console is not a terminal."""
    return Progress(
        TextColumn(things),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )
