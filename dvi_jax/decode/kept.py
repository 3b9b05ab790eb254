"""Where it is kept what was found out about a model's programs on this device: their costs, and whose bits agree."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import jax

from dvi_jax.directories import cache_folder
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel


def kept_path(folder: str, model: LoadedModel, *more: object) -> Path | None:
    """A place in `folder` of the cache, named by all that programs depend on: device, compiler, code, model, `more`.

    None for a user without a home, who finds it out at each start.
    """
    manifest, mesh = model.manifest, model.definition.mesh
    facts = [
        *(jax.devices()[0].device_kind, jax.__version__, _code(), None if mesh is None else sorted(mesh.shape.items())),
        *(repr(model.config), manifest.dtype, repr(manifest.quantisation), manifest.exit_layer),
        *(model.kv, manifest.drafter, sorted(manifest.drafter_config.items()), str(manifest.lora), *more),
    ]
    try:
        return cache_folder() / folder / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    except UserError:
        return None


@cache
def _code() -> str:
    """A digest of the code that rounds are made of: what was found out with another says nothing."""
    package = Path(__file__).parents[1]
    sources = sorted([*package.glob("model/**/*.py"), *package.glob("decode/*.py"), package / "serve" / "slots.py"])
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()
