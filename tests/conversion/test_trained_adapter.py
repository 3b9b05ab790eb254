"""An adapter trained here leaves as upstream's files and comes back bit-equal."""

from __future__ import annotations

import jax
import numpy as np

from conversion.exporting import export_hf
from conversion.kangaroo import read_adapter
from dvi_jax.checkpoint import read_checkpoint, string_keys, write_checkpoint
from dvi_jax.config import DistillConfig
from dvi_jax.learn.offline import train_offline
from dvi_jax.learn.packing import pack
from dvi_jax.presets import TINY


def test_train_export_import(make_tiny, helpers, tmp_path):
    tiny = make_tiny()
    base = tiny.params.base["llama"]
    tree = string_keys(base)
    write_checkpoint(tmp_path / "model", TINY, tiny.manifest, jax.tree.map(np.asarray, tree))
    tokens = np.random.default_rng(0).integers(0, 64, 256).tolist()
    pack([(tokens, [1] * 256)], 16, 64).save(tmp_path / "text.npz")
    sizes = {"tokens": 128, "batch_rows": 4, "row_length": 16, "eval_rows": 4}
    settings = {"drafter": "kangaroo", "unroll_steps": 1} | sizes
    config = DistillConfig(str(tmp_path / "model"), str(tmp_path / "run"), (str(tmp_path / "text.npz"),), **settings)
    trained = read_checkpoint(train_offline(config).checkpoint)
    export_hf(trained, tmp_path / "hf")
    adapter, options = read_adapter(tmp_path / "hf" / "adapter", TINY, "float32")
    assert options == trained.manifest.drafter_config
    helpers.assert_equal(adapter, helpers.flat(trained.drafter))
