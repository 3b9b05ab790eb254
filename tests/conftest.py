"""Models that many tests use: a tiny random one, and the golden ones imported from their directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.checkpoint import Manifest
from dvi_jax.load import LoadedModel, build_model, load
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import Params, split
from dvi_jax.presets import TINY

GOLDEN = Path(__file__).parent / "golden"


def tiny_model(dtype: str = "float32", seed: int = 0, lora: dict | None = None) -> LoadedModel:
    """A random model; matrices are wide enough apart that greedy tokens vary."""
    base = random_base(TINY, jax.random.key(seed), jnp.dtype(dtype), std=0.3)
    manifest = Manifest("random", "", dtype, 2, "exit_head", {"rank": 4, "alpha": 4.0}, lora or {})
    return LoadedModel(TINY, manifest, *split(build_model(TINY, manifest, base, seed=seed)))


def shake(params: Params, *names: str, seed: int = 1, std: float = 0.2) -> Params:
    """`params` with noise on the named parts, as if they had been trained."""
    rng = np.random.default_rng(seed)

    def noisy(leaf: jax.Array) -> jax.Array:
        return leaf + jnp.asarray(rng.normal(scale=std, size=leaf.shape), leaf.dtype)

    return params._replace(**{name: jax.tree.map(noisy, getattr(params, name)) for name in names})


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., LoadedModel]:
    return tiny_model


@pytest.fixture(scope="session")
def train_noise() -> Callable[..., Params]:
    return shake


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
