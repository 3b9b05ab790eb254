"""What many tests use: tiny random models, the golden ones imported from their directories, a short training run."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import settings

from dvi_jax import train
from dvi_jax.checkpoint import Manifest
from dvi_jax.loading import LoadedModel, build_model, enable_compilation_cache, load
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import Params, split
from dvi_jax.presets import TINY
from experiments.tiny import byte_tokenizer_json, write_questions, write_tiny_model
from tests.compiling import begin, lightly_compiled, optimize

GOLDEN = Path(__file__).parent / "golden"
begin()
# Else jax has the path of the cache in the key of every program (as the place of a GPU's autotuning results), and
# processes whose paths differ, as those of the workers do, would share nothing.
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
# Meshes of GPUs are compiled by GSPMD (`mesh.make_mesh`), so those of made-up devices are, too.
jax.config.update("jax_use_shardy_partitioner", False)
# What is imported by now stays; traces leave many objects and little garbage, which need not be looked for that often.
gc.freeze()
gc.set_threshold(20_000, 20, 20)
# Hypothesis draws nearly the same examples every time (constants of what is imported are among them), so that what a
# run says is of the code. `--hypothesis-profile=search` draws others, or those of a `--hypothesis-seed`. What a plugin
# has loaded before, such as `experiments.no_shrinking`, stays.
settings.register_profile("search", settings.default, derandomize=False)
settings.register_profile("suite", settings.default, derandomize=True, database=None)
settings.load_profile("suite")


def tiny_model(
    dtype: str = "float32",
    seed: int = 0,
    lora: dict | None = None,
    model_type: str = "llama",
    layers: int = TINY.num_layers,
) -> LoadedModel:
    """A random model, half of it shallow; matrices are wide enough apart that greedy tokens vary."""
    config = replace(TINY, model_type=model_type, num_layers=layers)
    with lightly_compiled(weights=True):
        base = random_base(config, jax.random.key(seed), jnp.dtype(dtype), std=0.3)
    manifest = Manifest(
        source="random",
        source_sha256="",
        dtype=dtype,
        exit_layer=layers // 2,
        drafter="exit_head",
        drafter_config={"rank": 4, "alpha": 4.0},
        lora=lora or {},
    )
    with lightly_compiled(weights=True):
        return LoadedModel(config, manifest, *split(build_model(config, manifest, base, seed=seed)))


def shake(params: Params, *names: str, seed: int = 1, std: float = 0.2) -> Params:
    """`params` with noise on the named parts, as if they had been trained."""
    rng = np.random.default_rng(seed)

    def noisy(leaf: jax.Array) -> jax.Array:
        moved = np.asarray(leaf) + rng.normal(scale=std, size=leaf.shape).astype(leaf.dtype)  # no program for a shape
        # Committed to its devices only if it was: programs differ by that.
        return jax.device_put(moved, leaf.sharding if leaf.committed else None)

    return params._replace(**{name: jax.tree.map(noisy, getattr(params, name)) for name in names})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="tests marked `full` too, and all of the contract")
    parser.addoption("--programs", metavar="DIR", help="keep compiled programs for the next run; without, all are new")


# Modules that take more than ten seconds, the longest first: a worker must not be left alone with one at the end.
LONG = (
    "contract/test_contract",
    "real/test_smollm2",
    "decode/test_lossless",
    "tests/test_processes",
    "tests/test_mesh",
    "decode/test_tree",
    "decode/test_prefill",
    "serve/test_engine",
    "server/test_whole",
    "contract/test_taps",
    "decode/test_tree_sampling",
    "decode/test_sampling",
    "learn/test_distill",
    "learn/test_resume",
    "parity/test_random_models",
    "conversion/test_command_line",
    "experiments/test_kill",
    "decode/test_stream",
    "serve/test_learning_run",
    "parity/test_command_line",
    "tests/test_terminals",
    "learn/test_rollback",
    "experiments/test_learning",
    "tests/test_distill",
    "decode/test_tree_drafting",
    "model/test_tree_attention",
    "fuzz/test_parsers",
    "learn/test_fast_update",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Optimised modules come together, then the others, as programs of the one kind are not those of the other; long
    modules first. Tests marked `large` or `full` run where they are asked for: `-m large`, `--full`.
    """

    def place(item: pytest.Item) -> tuple[bool, int]:
        name = "/".join(item.path.with_suffix("").parts[-2:])
        return item.get_closest_marker("optimized") is None, LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)
    asked = {name: name in config.option.markexpr for name in ("large", "full")}
    asked["full"] |= config.getoption("--full")
    skips = {
        "large": pytest.mark.skip(reason="a large model: pytest -m large"),
        "full": pytest.mark.skip(reason="others show the same: pytest --full"),
    }
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name) and not asked[name]:
                item.add_marker(skip)


def forget_old(programs: Path, days: int = 14) -> None:
    """Nothing is kept for long, whether it is still used or not."""
    for path in programs.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the other worker was faster
            if time.time() - path.stat().st_mtime > days * 86400:
                path.unlink()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled programs are kept as the command lines keep them, but not in the home directory of who tests.

    The workers of one run share the programs, and nothing else: what one has compiled, the others load. So does a later
    run with the same `--programs`: jax finds a program by all of its text, its options and the compiler's version.
    """
    cache, root = tmp_path_factory.mktemp("cache"), tmp_path_factory.getbasetemp()
    kept = request.config.getoption("--programs")
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    programs = Path(kept).absolute() if kept else shared / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    forget_old(programs)
    (cache / "xla").symlink_to(programs, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVI_JAX_CACHE", str(cache))
        enable_compilation_cache()
        yield


@pytest.fixture(scope="module", autouse=True)
def optimizations(request: pytest.FixtureRequest) -> None:
    """Most only where a module asks for what users get (tests/compiling.py)."""
    marker = request.node.get_closest_marker("optimized")
    optimize(marker is not None, emitters=marker is not None and marker.kwargs.get("emitters", False))


@pytest.fixture(scope="session", autouse=True)
def without_curves() -> Iterator[None]:
    """The two pictures of a run take longer than the updates of one here: a test that looks at them sets this back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "plot_learning_curve", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., LoadedModel]:
    return tiny_model


@pytest.fixture(scope="session")
def train_noise() -> Callable[..., Params]:
    return shake


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A byte-level tokenizer: ids 0 and 1 are the special tokens, every other id is one byte."""
    return byte_tokenizer_json()


@pytest.fixture(scope="session")
def byte_checkpoint(tmp_path_factory) -> Path:
    """A tiny random model that speaks bytes, with room for 128 tokens: a shallow layer and a deep one."""
    path = tmp_path_factory.mktemp("bytes") / "tiny"
    write_tiny_model(path, layers=2)
    return path


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """300 different questions, one conversation each."""
    path = tmp_path_factory.mktemp("stream") / "conversations.jsonl"
    write_questions(path, 300)
    return path


@pytest.fixture(scope="session")
def write_configs(byte_checkpoint, conversations) -> Callable[..., Path]:
    """write_configs(folder, **changes) writes the settings of `folder/run`, 100 rollouts, and gives the file's path."""

    def write(folder: Path, **changes: object) -> Path:
        settings = {
            "checkpoint": str(byte_checkpoint),
            "out": str(folder / "run"),
            "prompts": 200,
            "rollout_batch": 2,
            "replayed_windows": 2,
            "updates_per_rollout": 2,
            "positions_per_update": 32,
            "replay_capacity": 8,
            "eval_every": 20,
            "save_every": 5,
            "data": {
                "files": [str(conversations)],
                "max_prompt_tokens": 48,
                "held_out_fraction": 0.1,
                "held_out_prompts": 4,
            },
            "decode": {"draft_steps": 2, "max_new_tokens": 8},
            "drafter_options": {"rank": 4, "alpha": 4},
            "objective": {"warmup": 20, "ramp": 40},
            "optimizer": {"lora_lr": 1e-2, "head_lr": 1e-2},
        }
        path = folder / f"config-{len(list(folder.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_config(write_configs, tmp_path) -> Callable[..., Path]:
    """write_config(out=..., **changes): the same in the test's folder."""
    return partial(write_configs, tmp_path)


@dataclass(frozen=True)
class Golden:
    """One golden directory: its runs, its stage arrays, and the model loaded from it."""

    path: Path
    exit_layer: int
    runs: list[dict]
    stages: dict[str, np.ndarray]
    model: LoadedModel


@pytest.fixture(scope="session", params=["mha", "gqa_tied"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Imported from the Hugging Face directory, exit head untrained."""
    from conversion.importing import import_model

    path = GOLDEN / request.param
    record = json.loads((path / "golden.json").read_text(encoding="utf-8"))
    out = tmp_path_factory.mktemp("golden") / request.param
    import_model(path / "base", out, exit_layer=record["exit_layer"])
    return Golden(path, record["exit_layer"], record["runs"], dict(np.load(path / "golden.npz")), load(out))
