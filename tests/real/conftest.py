"""SmolLM2-135M-Instruct, fetched once into the cache that the demo uses, and its answers by transformers 4.33.3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvi_jax.directories import cache_folder
from dvi_jax.loading import LoadedModel, load
from experiments.fetch import fetch_model

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2_dev.json"
CACHE = cache_folder()  # read before another test points DVI_JAX_CACHE elsewhere
EXIT_LAYER = 27  # of 30: even an untrained exit head is right now and then


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The GGUF imported as float32. Without cache and network this fails with the line a user would read."""
    from conversion.importing import import_model

    path = tmp_path_factory.mktemp("real") / "smollm2"
    import_model(fetch_model(CACHE), path, exit_layer=EXIT_LAYER)
    return path


@pytest.fixture(scope="session")
def model(checkpoint) -> LoadedModel:
    return load(checkpoint)


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Sixteen questions: `user`, `prompt_ids`, `greedy_ids`."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["rows"]
