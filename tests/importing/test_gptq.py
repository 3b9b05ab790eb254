"""GPTQ: outputs come nearer than by rounding to nearest, which it is where inputs do not depend on each other."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from conversion.importing import import_model
from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.errors import UserError
from dvi_jax.identity import hash_base
from dvi_jax.importing import calibration
from dvi_jax.importing.gptq import gptq, second_moments
from dvi_jax.importing.rounding import packed, rounded
from dvi_jax.quantisation import Quantisation
from tests.conversion.conftest import TINY, tiny_tensors

HOW = Quantisation(weights="int4", group=32)
ROWS, WIDTH, OUT = 1000, 128, 24


@pytest.fixture(scope="module")
def problem():
    """Inputs that depend on each other, as those of a model do, and a matrix for them."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(ROWS, WIDTH)) @ (rng.normal(size=(WIDTH, WIDTH)) * rng.random(WIDTH) ** 2)
    return inputs.astype(np.float32), rng.normal(size=(OUT, WIDTH)).astype(np.float32)


def calibrated(weight, moments):
    integers, scales = gptq(jnp.asarray(weight), moments, HOW.group)
    return rounded(weight, HOW)._replace(values=packed(np.asarray(integers)), scales=np.asarray(scales))


def test_outputs_come_nearer_than_by_rounding_to_nearest(problem):
    """Of all rows, though one, as at a position where attention rests, is ten thousand times as long."""
    inputs, weight = problem
    outlier = 1e4 * np.random.default_rng(1).normal(size=(1, WIDTH)).astype(np.float32)
    seen = np.concatenate([outlier, inputs])
    moments = second_moments(jnp.asarray(seen))
    alike = seen / np.linalg.norm(seen.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(moments, alike.T @ alike, rtol=1e-4, atol=1e-3)

    def error(quantised):
        return np.linalg.norm(inputs.astype(np.float64) @ (quantised.dequantised(np.float32) - weight).T)

    assert error(calibrated(weight, moments)) < 0.85 * error(rounded(weight, HOW))


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_nearest(problem):
    _, weight = problem
    np.testing.assert_array_equal(
        calibrated(weight, jnp.eye(WIDTH)).dequantised(np.float32), rounded(weight, HOW).dequantised(np.float32)
    )


def test_an_import_with_a_calibration(tmp_path, tokenizer_json, monkeypatch):
    """Whole models: what the layers give stays nearer, and the manifest says what it was rounded by."""
    config = TINY | {"vocab_size": 258, "num_hidden_layers": 2}
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text(tokenizer_json)
    tensors = {name: 0.3 * array if array.ndim == 2 else array for name, array in tiny_tensors(config).items()}
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    words = np.random.default_rng(0).choice(["tree", "moon", "river", "stone"], (12, 40))
    texts = [{"messages": [{"role": "user", "content": " ".join(line)}]} for line in words]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    monkeypatch.setattr(calibration, "ROW_TOKENS", 64)
    files = [str(tmp_path / "texts.jsonl")]
    import_model(source, tmp_path / "plain")
    import_model(source, tmp_path / "calibrated", quantisation=HOW, calibration=files)
    plain, kept = read_checkpoint(tmp_path / "plain"), read_checkpoint(tmp_path / "calibrated")
    assert kept.manifest.quantisation.calibration_tokens > 0
    assert kept.manifest.quantisation.source_sha256 == plain.manifest.base_sha256
    assert kept.manifest.base_sha256 == hash_base(kept.base)
    assert kept.base["layers"]["1"]["qkv"]["values"].dtype == np.uint8
    with pytest.raises(UserError, match="goes with --weights int4"):
        import_model(source, tmp_path / "bad", quantisation=Quantisation(weights="int8"), calibration=files)
    (tmp_path / "short.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hm"}]}) + "\n")
    with pytest.raises(UserError, match="no conversation of 64 tokens"):
        import_model(source, tmp_path / "bad", quantisation=HOW, calibration=[str(tmp_path / "short.jsonl")])
