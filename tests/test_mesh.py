"""Models over several devices, made up on the CPU: what they compute, decode, read and refuse."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.checkpoint import Checkpoint, Manifest, read_checkpoint, write_checkpoint
from dvi_jax.config import DecodeConfig, MeshConfig, SamplingConfig
from dvi_jax.decode.agreement import require_equal_bits
from dvi_jax.decode.batch import generate_batch, make_knobs, start
from dvi_jax.decode.memory import Sizes, check, estimate_memory
from dvi_jax.decode.plan import Plan
from dvi_jax.decode.prefix import make_prefix
from dvi_jax.decode.stream import Stream
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel, from_checkpoint, load, stored_parts
from dvi_jax.mesh import ROWS, WHOLE, collect, make_mesh, row_order, shard_config, specs_of, spread, to_host
from dvi_jax.model.llama import base_shapes, random_base
from dvi_jax.model.speculative_llama import join
from dvi_jax.presets import TINY

EVEN = replace(TINY, num_layers=2)  # 4 query heads, 2 KV heads
ODD = replace(EVEN, num_heads=6, num_kv_heads=3, model_type="qwen2", tie_word_embeddings=True)  # with biases
MESHES = ("model=2", "data=2", "data=2,model=2", "model=4")
PROMPTS = [[5, 9, 2], [7, 7, 1, 30]]
SETTINGS = DecodeConfig(draft_steps=3, max_new_tokens=20)


def mesh_of(text):
    return None if text is None else make_mesh(MeshConfig.parse(text))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(config): a checkpoint with weak deep layers, so that the untrained drafter is right now and then."""

    def write(config):
        path = tmp_path_factory.getbasetemp() / f"mesh-{config.num_heads}"
        if not path.exists():
            base = jax.tree.map(np.array, random_base(config, jax.random.key(0), std=0.3))
            for name in ("out", "down"):
                base["layers"]["1"][name] *= 0.4
            options = {"drafter": "exit_head", "drafter_config": {"rank": 4, "alpha": 4.0}}
            manifest = Manifest(source="random", source_sha256="", dtype="float32", exit_layer=1, **options)
            write_checkpoint(path, config, manifest, base)
        return path

    return write


@pytest.fixture(scope="module")
def models(written):
    """models(config, mesh): the same model on the devices of a mesh, None for one device."""
    made = {}

    def model(config, mesh) -> LoadedModel:
        if (config, mesh) not in made:
            made[config, mesh] = load(written(config), mesh=mesh_of(mesh))
        return made[config, mesh]

    return model


def logits_of(model, tokens):
    """Of a forward pass over tokens [B, T], from all devices."""

    def forward(params, tokens):
        llama = join(model.definition, params).llama
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _, _ = llama.shallow(tokens, None, positions)
        return llama.all_logits(llama.logits(llama.deep(hidden, None, positions)[0]))

    return to_host(jax.jit(model.definition.sharded(forward, model.params, (ROWS,), ROWS))(model.params, tokens))


@pytest.mark.parametrize("config", [EVEN, ODD], ids=["even", "odd"])
def test_logits_are_those_of_one_device(models, config):
    """Also where KV heads do not divide (3 for 2 devices), or are fewer than devices (2 for 4)."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 8)).astype(np.int32)
    expected = logits_of(models(config, None), tokens)
    for mesh in MESHES if config is EVEN else ("model=2",):
        np.testing.assert_allclose(logits_of(models(config, mesh), tokens), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[] if mesh == "data=2,model=2" else pytest.mark.full) for mesh in MESHES]
)
def test_speculative_equals_plain(models, mesh):
    """And both are what one device decodes, where no two tokens are within rounding of each other, as here."""
    model = models(EVEN, mesh)
    fast, plain = (generate_batch(model, PROMPTS, SETTINGS, plain=plain)[0] for plain in (False, True))
    assert [g.output_ids for g in fast] == [g.output_ids for g in plain]
    assert len({length for g in fast for length in g.accept_lengths}) > 2
    assert plain[0].rounds == SETTINGS.max_new_tokens - 1
    assert fast == generate_batch(models(EVEN, None), PROMPTS, SETTINGS)[0]


@pytest.mark.parametrize("plan", [pytest.param("chain:3", marks=pytest.mark.full), "tree:4"])
def test_other_plans_have_the_bits_of_plain(models, plan):
    """Keys and values of every layer, round by round (`require_equal_bits`), with KV heads that do not divide."""
    model = models(ODD, "model=2")
    state = start(model, PROMPTS, SETTINGS, make_knobs(SETTINGS, ()))
    require_equal_bits(model, state, Plan.parse(plan))


def test_sampled_streamed_behind_a_prefix(models):
    """The very tokens that one device draws, whether they come in pieces or not."""
    sampling = SamplingConfig(temperature=0.8, top_p=0.9, seed=3)
    prompts = [[40, 3, *prompt] for prompt in PROMPTS]
    drawn = []
    for mesh in (None, "data=2,model=2"):
        model = models(EVEN, mesh)
        prefix = make_prefix(model, [40, 3])
        drawn.append(generate_batch(model, prompts, SETTINGS, sampling=sampling, prefix=prefix)[0])
    assert drawn[0] == drawn[1]
    stream = Stream(model, prompts, SETTINGS, sampling=sampling, prefix=prefix, every=3)
    pieces = [piece for each in stream for piece in each]
    assert stream.generations == drawn[1]
    for index, generation in enumerate(drawn[1]):
        assert [token for piece in pieces if piece.sequence == index for token in piece.ids] == generation.new_ids


@pytest.mark.parametrize("config", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("n", [2, 4])
def test_each_device_has_its_own_heads(config, n):
    """Rows of qkv and gate_up, told by the formula: device i has heads i N/n .. and the KV heads that those read."""
    if config.num_heads % n:
        with pytest.raises(UserError, match=r"mesh model=4: the model's num_heads 6 does not divide by 4"):
            shard_config(config, mesh_of("model=4"))
        return
    part, size = shard_config(config, mesh_of(f"model={n}")), config.head_dim
    heads = row_order("qkv", config, n).reshape(n, -1, size)[..., 0] // size
    group, own_group = config.num_heads // config.num_kv_heads, part.num_heads // part.num_kv_heads
    for device, own in enumerate(heads):
        queries, keys, values = np.split(own, [part.num_heads, part.num_heads + part.num_kv_heads])
        assert queries.tolist() == list(range(device * part.num_heads, (device + 1) * part.num_heads))
        assert [keys[q // own_group] for q in range(part.num_heads)] == [config.num_heads + q // group for q in queries]
        assert (values - keys == config.num_kv_heads).all()
    f, order = config.intermediate_size, row_order("gate_up", config, n).reshape(n, 2, -1)
    assert (order[:, 1] - order[:, 0] == f).all()
    assert order[:, 0].ravel().tolist() == list(range(f))


def test_checkpoints_under_any_mesh(tmp_path, train_noise, written):
    """LoRA sets and drafter, trained on one mesh, are written as one device writes them, and read under another."""
    plain = read_checkpoint(written(ODD))
    adapted = replace(plain, manifest=replace(plain.manifest, lora={"rank_s": 2, "rank_d": 2}))
    model = from_checkpoint(adapted)
    model = model.with_params(train_noise(model.params, "drafter", "lora_s", "lora_d"))
    parts = jax.device_get(stored_parts(model))
    write_checkpoint(tmp_path / "trained", ODD, adapted.manifest, plain.base, **parts)
    there = load(tmp_path / "trained", mesh=mesh_of("data=2,model=2"))
    jax.tree.map(np.testing.assert_array_equal, stored_parts(there), parts)
    base = collect(there.definition.mesh, ODD, there.params.base)["llama"]
    for name in ("embed", "norm"):
        np.testing.assert_array_equal(base[name], plain.base[name])
    for name, weight in plain.base["layers"]["0"].items():
        np.testing.assert_array_equal(base["layers"][0][name], weight)


def test_each_device_gets_its_part_alone(written, models):
    """The base is read array by array, and of a split array no device ever holds more than its part."""
    lazy = read_checkpoint(written(EVEN), lazy=True)
    assert not any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(lazy.base))
    params = models(EVEN, "model=2").params.base["llama"]
    shapes = base_shapes(shard_config(EVEN, mesh_of("model=2")))
    for name in ("qkv", "gate_up", "out", "down"):
        parts = {shard.data.shape for shard in params["layers"][0][name].addressable_shards}
        assert parts == {shapes["layers"]["0"][name]}


def test_a_bare_array_is_copied():
    """It has no name, so nothing says how to cut it."""
    assert specs_of(jnp.ones(3)) == WHOLE
    np.testing.assert_array_equal(spread(mesh_of("data=2,model=2"), jnp.ones(3)), np.ones(3))


def test_memory_of_each_device(models):
    one, four = (estimate_memory(models(EVEN, mesh), Sizes(4, 128, 4, 16)) for mesh in (None, "data=2,model=2"))
    assert four.caches["deep"] * 4 == one.caches["deep"]
    d, copied = EVEN.hidden_size, EVEN.num_layers * 2 + 1  # norms
    assert four.weights["base"] * 2 == one.weights["base"] + copied * d * 4
    with pytest.raises(UserError, match=r"batch 4 with 128 cache slots needs .* but the limit is 0.0 MiB"):
        check(four, 1000)


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("model=5", "mesh data=1,model=5 needs 5 devices, there are 4"),
        ("model=0", "must look like data=1,model=2"),
        ("model=2,model=3", "must look like data=1,model=2"),
        ("rows=2", "must look like data=1,model=2"),
    ],
)
def test_meshes_that_cannot_be(mesh, said):
    with pytest.raises(UserError, match=said):
        mesh_of(mesh)


def test_models_and_batches_that_do_not_divide(models, written):
    checkpoint: Checkpoint = read_checkpoint(written(EVEN))
    for change, said in (({"vocab_size": 63}, "vocab_size 63"), ({"intermediate_size": 49}, "intermediate_size 49")):
        with pytest.raises(UserError, match=f"mesh model=2: the model's {said} does not divide by 2"):
            shard_config(replace(checkpoint.config, **change), mesh_of("model=2"))
    with pytest.raises(UserError, match="mesh data=2: a batch of 3 does not divide among 2 devices"):
        generate_batch(models(EVEN, "data=2"), [*PROMPTS, [3]], SETTINGS)
    with pytest.raises(UserError, match="mesh data=2: a batch of 1 does not divide among 2 devices"):
        estimate_memory(models(EVEN, "data=2"), Sizes(1, 128, 4, 16))
    with pytest.raises(UserError, match="mesh model=4: the model's num_heads 6 does not divide by 4"):
        load(written(ODD), mesh=mesh_of("model=4"))
