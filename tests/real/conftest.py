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
KEPT = Path(__file__).parents[2] / "experiments" / "results" / "drafters" / "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The GGUF imported as float32. Without cache and network this fails with the line a user would read."""
    from conversion.importing import import_model

    path = tmp_path_factory.mktemp("real") / "smollm2"
    import_model(fetch_model(CACHE), path, exit_layer=1)
    return path


@pytest.fixture(scope="session")
def model(checkpoint) -> LoadedModel:
    """With the drafter that is kept for it: often right, and one shallow layer is quickly compiled."""
    return load(checkpoint, drafter_from=KEPT)


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Sixteen questions: `user`, `prompt_ids`, `greedy_ids`."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["rows"]
