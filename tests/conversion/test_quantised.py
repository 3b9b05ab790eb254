"""Imports in fewer bits: what is rounded and what is kept, whose weights they are, and the way back."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from conversion.exporting import export_checkpoint, merge_verifier
from conversion.importing import import_model
from dvi_jax import load
from dvi_jax.checkpoint import MANIFEST, read_checkpoint, rewrite_checkpoint
from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.memory import tree_bytes
from dvi_jax.errors import UserError
from dvi_jax.identity import hash_base
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.importing.source import load_base, load_quantised_base, open_source
from dvi_jax.model.quantised import Quantised
from dvi_jax.model.speculative_llama import join
from dvi_jax.quantisation import Quantisation
from dvi_jax.trained_parts import with_drafter_from

BLOCKS = {Kind.Q8_0: "int8", Kind.Q4_0: "int4", Kind.Q4_1: "int4"}


def dequantised(tree):
    """A base tree with arrays in place of parts, in float32."""
    return {
        name: Quantised.of(node).dequantised(np.float32)
        if isinstance(node, dict) and "scales" in node
        else dequantised(node)
        if isinstance(node, dict)
        else node
        for name, node in tree.items()
    }


@pytest.fixture
def imported(make_hf, tmp_path):
    """imported(how) is the checkpoint of one model with matrices kept so; None for float32."""
    source = make_hf()

    def make(how=None, name="checkpoint"):
        import_model(source, tmp_path / name, quantisation=how)
        return read_checkpoint(tmp_path / name)

    return make


@pytest.mark.parametrize("weights", ["int8", "float8", "int4"])
def test_an_import_rounds_matrices_and_nothing_else(imported, weights):
    plain, kept = imported(name="plain"), imported(Quantisation(weights=weights, group=32, head=True))
    flat = jax.tree_util.tree_leaves_with_path(kept.base)
    dtypes = {jax.tree_util.keystr(path): leaf.dtype.name for path, leaf in flat}
    values = {"int8": "int8", "float8": "float8_e4m3fn", "int4": "uint8"}[weights]
    assert {dtype for name, dtype in dtypes.items() if name.endswith("['values']")} == {values}
    assert len([name for name in dtypes if name.endswith("['values']")]) == 3 * 4 + 1
    near, exact = dequantised(kept.base), plain.base
    for name in ("embed", "norm"):
        np.testing.assert_array_equal(near[name], exact[name])
    for got, wanted in zip(jax.tree.leaves(near), jax.tree.leaves(exact), strict=True):
        assert got.shape == wanted.shape
        assert np.sqrt(np.mean(np.square(got - wanted))) < 0.1 * max(wanted.std(), 0.01)
    # Whose they are: what they stand for now, and what they were rounded from.
    assert kept.manifest.base_sha256 == hash_base(kept.base) == hash_base(near)
    assert kept.manifest.quantisation.source_sha256 == plain.manifest.base_sha256
    assert kept.manifest.base_sha256 != plain.manifest.base_sha256


def test_a_tied_head_in_fewer_bits_lies_beside_the_embedding(make_hf, tmp_path, helpers):
    tensors = helpers.tensors(helpers.tiny)
    del tensors["lm_head.weight"]
    source = make_hf(tensors, tie_word_embeddings=True)
    import_model(source, tmp_path / "tied", quantisation=Quantisation(weights="int8", head=True))
    model = load(tmp_path / "tied")
    head = join(model.definition, model.params).llama.head_weight()
    assert isinstance(head, Quantised)
    embed = tensors["model.embed_tokens.weight"]
    assert np.abs(np.asarray(head.dequantised(jnp.float32)) - embed).max() < 0.6 * np.abs(embed).max() / 127


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_files_own_integers_are_kept(write_gguf, helpers, kind):
    """To the bit, rows of q and k in Hugging Face's order; logits are those of the dequantised model."""
    tensors = helpers.tensors(helpers.tiny)
    source = open_source(write_gguf(tensors, kind))
    kept = load_quantised_base(source, "float32", Quantisation(weights=BLOCKS[kind], head=True))
    assert dict(kept.forms) == {f"{BLOCKS[kind]} in groups of 32 as in the file": 3 * 4 + 1}
    exact = load_base(source, "float32")
    jax.tree.map(np.testing.assert_array_equal, dequantised(kept.tree), exact)
    assert kept.own.hexdigest() == kept.source.hexdigest() == hash_base(exact)
    expected = gguf.quants.dequantize(gguf.quants.quantize(tensors["lm_head.weight"], kind), kind)
    np.testing.assert_array_equal(exact["head"], expected)


def test_ids_and_logits_of_a_kept_file_are_those_of_the_dequantised(write_gguf, helpers, tmp_path, capsys):
    # As small as a model's matrices are: with large ones attention makes a great deal of every rounding.
    tensors = helpers.tensors(helpers.tiny)
    tensors |= {name: 0.2 * array for name, array in tensors.items() if "_proj" in name}
    path = write_gguf(tensors, Kind.Q4_0)
    import_model(path, tmp_path / "kept", quantisation=Quantisation(weights="int4"))
    assert "int4 in groups of 32 as in the file" in capsys.readouterr().err
    import_model(path, tmp_path / "float", quantisation=None)
    kept, whole = load(tmp_path / "kept"), load(tmp_path / "float")
    settings = DecodeConfig(max_new_tokens=64, draft_steps=2)
    (ours,), (theirs,) = (generate_batch(model, [[1, 5, 9]], settings)[0] for model in (kept, whole))
    assert ours.new_ids == theirs.new_ids
    assert len(ours.new_ids) == 64
    tokens = jnp.asarray([ours.output_ids])
    positions = jnp.arange(tokens.shape[1])[None]

    def logits(model):
        @jax.jit
        def forward(params):
            llama = join(model.definition, params).llama
            return llama.logits(llama.deep(llama.shallow(tokens, None, positions)[0], None, positions)[0])

        return forward(model.params)

    found, expected = logits(kept), logits(whole)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * float(jnp.abs(expected).max()))
    # Five bits a weight with its scales: what the memory count sees too.
    assert tree_bytes(kept.params.base) < 0.45 * tree_bytes(whole.params.base)


def test_more_bits_than_asked_for_are_rounded(write_gguf, helpers):
    source = open_source(write_gguf(helpers.tensors(helpers.tiny), Kind.Q8_0))
    forms = load_quantised_base(source, "float32", Quantisation(weights="int4")).forms
    assert forms == {"int4 in groups of 32": 9, "int4 in groups of 64": 3}  # those of 32 inputs, and `down`
    assert load_quantised_base(source, "float32", Quantisation(weights="float8")).forms == {"float8": 12}


def test_an_import_takes_little_memory_beside_its_output(make_hf, helpers, monkeypatch):
    """At most 1.3 times the largest tensor, in float32 as it is read."""
    monkeypatch.setattr("dvi_jax.importing.tensors.CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr("dvi_jax.identity._CHUNK", 1 << 16)
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2}
    config = helpers.tiny | sizes
    source = open_source(make_hf(helpers.tensors(config), **sizes))
    how = Quantisation(weights="int4")
    load_quantised_base(source, "bfloat16", how)  # what is imported on the way has been
    tracemalloc.start()
    try:
        tree = load_quantised_base(source, "bfloat16", how).tree
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    output = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert peak - output < 1.3 * 2048 * 512 * 4


def test_exports_are_the_floating_point_weights(imported, tmp_path, capsys):
    kept = imported(Quantisation(weights="int4", group=32, head=True))
    export_checkpoint(kept.path, tmp_path / "hf", "hf")
    assert "matrices kept in int4 are written as float32" in capsys.readouterr().err
    import_model(tmp_path / "hf", tmp_path / "again")
    again = read_checkpoint(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.base, dequantised(kept.base))
    assert again.manifest.base_sha256 == kept.manifest.base_sha256
    assert again.manifest.quantisation is None


def test_merging_lora_keeps_what_was_learned(imported):
    kept = imported(Quantisation(weights="int8"))
    pair = {"a": np.ones((1, 32), np.float32), "b": np.full((32, 1), 2.0**-9, np.float32)}
    lora = {"lora_d": {"llama": {"layers": {2: {"lora": {"out": pair}}}}}}
    manifest = replace(kept.manifest, lora={"rank_s": 0, "rank_d": 1})
    merged = merge_verifier(replace(kept, lora=lora, manifest=manifest)).base["layers"]["2"]
    expected = dequantised(kept.base)["layers"]["2"]["out"] + np.float32(2.0**-9)
    np.testing.assert_array_equal(merged["out"], expected)
    assert isinstance(merged["down"], dict)


def test_a_drafter_fits_the_weights_it_was_made_for_in_fewer_bits_too(imported, tmp_path):
    plain, kept = imported(name="plain"), imported(Quantisation(weights="int8"))
    drafter = {"norm": np.ones(32, np.float32)}
    rewrite_checkpoint(plain, tmp_path / "trained", drafter=drafter)
    lent = with_drafter_from(kept, tmp_path / "trained")
    assert lent.manifest.base_sha256 == kept.manifest.base_sha256
    assert lent.manifest.quantisation == kept.manifest.quantisation
    rewrite_checkpoint(kept, tmp_path / "trained in fewer", drafter=drafter)
    assert with_drafter_from(plain, tmp_path / "trained in fewer").manifest.quantisation is None
    other = replace(kept.manifest.quantisation, source_sha256="0" * 64)
    stranger = replace(kept, manifest=replace(kept.manifest, quantisation=other, base_sha256="1" * 64))
    with pytest.raises(UserError, match="another model"):
        with_drafter_from(stranger, tmp_path / "trained")


def test_a_name_is_imported_in_fewer_bits_once(make_hf, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DVI_JAX_CACHE", str(tmp_path / "cache"))
    source = make_hf()
    first = open_checkpoint(source, weights="int4")
    assert first.manifest.quantisation.weights == "int4"
    assert "as float32-int4 into" in capsys.readouterr().err
    assert open_checkpoint(source, weights="int4").path == first.path
    assert open_checkpoint(source, weights="bfloat16").manifest.dtype == "bfloat16"
    assert open_checkpoint(source).manifest.quantisation is None
    assert len(list((tmp_path / "cache" / "models").glob("model-*"))) == 3
    with pytest.raises(UserError, match="holds matrices in int4; give its source to get int8"):
        open_checkpoint(first.path, weights="int8")
    with pytest.raises(UserError, match="--weights bfloat16 and --dtype float32 ask for two things"):
        open_checkpoint(source, "float32", "bfloat16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts | {"scales": parts["scales"][:-1]}, "do not fit each other"),
        (lambda parts: parts | {"values": parts["values"][:, :-8]}, "do not fit each other"),
        (lambda parts: parts | {"values": parts["values"].astype(np.int32)}, "are no matrix"),
        (lambda parts: parts | {"scales": parts["scales"].astype(np.int32)}, "must be float16 or float32"),
        (lambda parts: {"values": parts["values"]}, "has values and scales"),
        (lambda parts: parts | {"zeros": parts["scales"]}, "has values and scales"),
        (lambda parts: {name: part[:-1] for name, part in parts.items()}, r"has shape \(63, 32\), expected \(64, 32\)"),
    ],
)
def test_parts_that_are_no_matrix_are_refused(imported, tmp_path, change, message):
    kept = imported(Quantisation(weights="int4", group=32))
    layer = kept.base["layers"]["1"]
    layers = kept.base["layers"] | {"1": layer | {"qkv": change(layer["qkv"])}}
    rewrite_checkpoint(replace(kept, base=kept.base | {"layers": layers}), tmp_path / "bad")
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "bad")


def test_a_manifest_of_no_known_weights_is_refused(imported):
    kept = imported(Quantisation(weights="int8"))
    document = json.loads((kept.path / MANIFEST).read_text())
    del document["checksums"]
    document["quantisation"]["weights"] = "int3"
    (kept.path / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(UserError, match="quantisation: weights must be int8, int4 or float8, got 'int3'"):
        read_checkpoint(kept.path)
