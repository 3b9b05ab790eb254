"""Whose drafter it is, by the hash of the weights; the three forms it is kept in; lending it to another checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from conversion.exporting import export_checkpoint
from conversion.importing import import_model
from dvi_jax import load
from dvi_jax.checkpoint import read_checkpoint, rewrite_checkpoint
from dvi_jax.errors import UserError
from dvi_jax.identity import hash_base
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.loading import trained_parts
from dvi_jax.trained_parts import read_trained_parts, with_drafter_from
from experiments.families import cases

CASE = {case.name: case for case in cases()}["qwen2"]


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_equal(found, expected):
    assert flat(found).keys() == flat(expected).keys()
    for name, value in flat(expected).items():
        assert np.asarray(flat(found)[name]).dtype == np.asarray(value).dtype
        np.testing.assert_array_equal(flat(found)[name], value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The untrained import of one model, in float32."""
    folder = tmp_path_factory.mktemp("plain")
    import_model(CASE.write(folder / "source"), folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module", params=["exit_head", "fused", "kangaroo"])
def trained(request, plain, tmp_path_factory):
    """The same with a drafter as training leaves it: the exit head has a lora_S and a single number besides.

    `fused` is one without an exit layer.
    """
    checkpoint = read_checkpoint(plain)
    exit_layer = 0 if request.param == "fused" else checkpoint.manifest.exit_layer
    manifest = replace(checkpoint.manifest, drafter=request.param, exit_layer=exit_layer, training_step=7)
    if request.param == "exit_head":
        manifest = replace(manifest, drafter_config={"rank": 4, "alpha": 4.0})
    out = tmp_path_factory.mktemp("trained") / request.param
    rewrite_checkpoint(checkpoint, out / "untrained", manifest=manifest)
    model = load(out / "untrained")
    parts = jax.tree.map(lambda x: np.asarray(x + 0.25), trained_parts(model.params))
    manifest = replace(manifest, drafter_config=model.manifest.drafter_config, calibration=(0.8, 1.1))
    few = (3, 5, 8) if request.param == "fused" else None
    rewrite_checkpoint(checkpoint, out / "checkpoint", manifest=manifest, draft_vocabulary=few, **parts)
    return out / "checkpoint"


def test_hash_is_of_values_whatever_their_type():
    """A hand-made tree: the digest changes with a value, a name, a shape; not with the dtype, nor with a head apart."""
    base = {"embed": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "layers": {"0": {"qkv": np.ones((2, 4))}}}
    reference = hash_base(base)
    assert len(reference) == 64
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), base)
    assert hash_base(half) == reference
    assert hash_base(base | {"head": base["embed"].copy()}) == reference
    different = [
        base | {"head": base["embed"] + 1},
        base | {"embed": base["embed"].reshape(4, 3)},
        base | {"embed": np.where(base["embed"] == 1, 1.01, base["embed"])},
        base | {"layers": {"1": base["layers"]["0"]}},
        {"embed": base["embed"]},
    ]
    assert len({reference, *map(hash_base, different)}) == 6


def test_the_import_keeps_the_hash(plain, tmp_path):
    manifest = read_checkpoint(plain).manifest
    assert manifest.base_sha256 == hash_base(read_checkpoint(plain).base)
    half = import_model(CASE.write(tmp_path / "again", "bin shards"), tmp_path / "half", dtype="bfloat16")
    assert half.base_sha256 == manifest.base_sha256
    assert half.source_sha256 != manifest.source_sha256


def test_a_drafter_survives_export_and_import(trained, tmp_path):
    first = read_checkpoint(trained)
    export_checkpoint(trained, tmp_path / "hf", "hf")
    import_model(tmp_path / "hf", tmp_path / "again")
    for second in (read_checkpoint(tmp_path / "again"), open_checkpoint(tmp_path / "hf")):
        assert_equal(second.drafter, first.drafter)
        assert_equal(second.lora or {}, first.lora or {})
        assert_equal(second.base, first.base)
        assert second.draft_vocabulary == first.draft_vocabulary
        same = {"source": "", "source_sha256": ""}
        assert replace(second.manifest, **same) == replace(first.manifest, **same)
        load(second.path)
    with pytest.raises(UserError, match=r"--exit-layer 1: .* was trained (at exit layer 2|without)"):
        import_model(tmp_path / "hf", tmp_path / "other", exit_layer=1)
    config = tmp_path / "hf" / "drafter" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"exit_layer": 50}))
    with pytest.raises(UserError, match=r"must be in 1\.\."):
        import_model(tmp_path / "hf", tmp_path / "other")
    assert (tmp_path / "hf" / "adapter").exists() == (first.manifest.drafter == "kangaroo")


def test_all_forms_are_lent_to_the_same_weights_alone(trained, plain, tmp_path):
    export_checkpoint(trained, tmp_path / "hf", "hf")
    export_checkpoint(trained, tmp_path / "drafter", "drafter")
    receiver, first = read_checkpoint(plain), read_checkpoint(trained)
    for form in (trained, tmp_path / "hf", tmp_path / "hf" / "drafter", tmp_path / "drafter"):
        lent = with_drafter_from(receiver, form)
        assert lent.manifest.drafter == first.manifest.drafter
        assert (lent.manifest.source, lent.manifest.dtype) == ("source", "float32")
        assert flat(lent.drafter).keys() == flat(first.drafter).keys()
        assert lent.draft_vocabulary == first.draft_vocabulary
        assert lent.manifest.calibration == (0.8, 1.1)
    other = replace(receiver, base={**receiver.base, "norm": receiver.base["norm"] * 2}, path=tmp_path)
    other = replace(other, manifest=replace(other.manifest, base_sha256=hash_base(other.base)))
    with pytest.raises(UserError, match="another model than source by their weights; --any-drafter takes it"):
        with_drafter_from(other, tmp_path / "hf")
    lent = with_drafter_from(other, tmp_path / "hf", any_model=True).manifest
    assert lent.base_sha256 == other.manifest.base_sha256
    assert lent.calibration == ()  # it was fitted to what the first verifier accepts


def test_a_drafter_of_another_model_is_refused_where_a_model_is_loaded(trained, plain, tmp_path):
    receiver = read_checkpoint(plain)
    base = {**receiver.base, "norm": receiver.base["norm"] * 2}
    manifest = replace(receiver.manifest, base_sha256=hash_base(base))
    rewrite_checkpoint(replace(receiver, base=base), tmp_path / "other", manifest=manifest)
    with pytest.raises(UserError, match="another model"):
        load(tmp_path / "other", drafter_from=trained)
    load(tmp_path / "other", drafter_from=trained, any_drafter=True)
    with pytest.raises(UserError, match=r"the drafter was trained at exit layer \d, not 3"):
        load(trained, exit_layer=3)


def test_before_there_were_hashes(trained, plain):
    """An old checkpoint's weights are hashed when it matters; an old drafter goes by the file it was made from."""
    receiver = read_checkpoint(plain)
    old = replace(receiver, manifest=replace(receiver.manifest, base_sha256=""))
    assert with_drafter_from(old, trained).drafter is not None
    altered = replace(old, base={**old.base, "norm": old.base["norm"] * 2})
    with pytest.raises(UserError, match="another model"):
        with_drafter_from(altered, trained)
    document = json.loads((trained / "MANIFEST.json").read_text())
    kept = trained.parent / "old"
    rewrite_checkpoint(read_checkpoint(trained), kept)
    changed = {key: value for key, value in document.items() if key not in ("checksums", "base_sha256")}
    (kept / "MANIFEST.json").write_text(json.dumps(changed))
    assert load(kept).manifest.base_sha256 == ""
    assert with_drafter_from(receiver, kept).drafter is not None
    (kept / "MANIFEST.json").write_text(json.dumps(changed | {"source_sha256": "0"}))
    with pytest.raises(UserError, match="another model"):
        with_drafter_from(receiver, kept)


def test_damaged_safetensors_parts(trained, tmp_path):
    export_checkpoint(trained, tmp_path / "hf", "hf")
    config = tmp_path / "hf" / "drafter" / "config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps(document | {"base_sha256": "1" * 64}))
    with pytest.raises(UserError, match="its drafter was trained for other weights than those beside it"):
        import_model(tmp_path / "hf", tmp_path / "a")
    config.write_text(json.dumps(document | {"exit_layer": "two"}))
    with pytest.raises(UserError, match="exit_layer"):
        import_model(tmp_path / "hf", tmp_path / "a")
    config.write_text(json.dumps({"hidden_size": 4}))  # of some other tool
    assert import_model(tmp_path / "hf", tmp_path / "a").drafter == "exit_head"
    with pytest.raises(UserError, match="holds no drafter"):
        read_trained_parts(tmp_path / "hf")
