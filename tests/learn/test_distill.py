"""Distillation: the loss against a direct computation, what moves, packing, and whole runs on a tiny model."""

import json
import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.checkpoint import read_checkpoint, string_keys, write_checkpoint
from dvi_jax.config import DecodeConfig, DistillConfig, DistillLoss
from dvi_jax.decode.batch import generate_batch
from dvi_jax.errors import UserError
from dvi_jax.learn import distill as distill_module
from dvi_jax.learn import offline
from dvi_jax.learn.distill import distill_gradient, distill_metrics, distill_step, init_distill, learning_rate
from dvi_jax.learn.offline import expected_tokens, train_offline
from dvi_jax.learn.packing import Packed, load_packed, pack
from dvi_jax.loading import LoadedModel, build_model, load
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import join, split

CONFIG = DistillConfig("c", "o", ("d",), tokens=10**6, batch_rows=3, row_length=9, unroll_steps=2, lr=5e-3, warmup=1)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (3, 9)), jnp.int32)
MASK = jnp.asarray(np.random.default_rng(1).random((3, 9)) < 0.6)


@pytest.fixture(scope="module")
def fused(make_tiny) -> LoadedModel:
    tiny = make_tiny()
    manifest = replace(tiny.manifest, drafter="fused", drafter_config={})
    base = tiny.params.base["llama"]
    tree = string_keys(base)
    return LoadedModel(tiny.config, manifest, *split(build_model(tiny.config, manifest, tree)))


def test_loss_is_the_weighted_kl(fused, monkeypatch):
    """Against log-softmax in numpy over all positions at once; the chunks must not matter."""
    model = join(fused.definition, fused.params)

    @jax.jit
    def forward():
        positions = jnp.broadcast_to(jnp.arange(9), (3, 9))
        hidden, _, _ = model.llama.shallow(TOKENS, None, positions)
        final, _, _ = model.llama.deep(hidden, None, positions)
        return final, model.drafter.unroll(hidden, Features(final), positions, 2)

    final, drafts = forward()
    head = np.asarray(model.llama.head_weight(), np.float64)
    log_p = log_softmax(np.asarray(final, np.float64) @ head.T)
    weight = np.asarray(MASK)[:, 1:]
    kls = []
    for draft in drafts:
        log_q = log_softmax(np.asarray(draft, np.float64) @ head.T)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[:, :-1]
        kls.append((kl * weight).sum() / weight.sum())
    expected = (kls[0] + 0.8 * kls[1]) / 1.8
    for chunk in (4, 2048):
        monkeypatch.setattr(distill_module, "POSITIONS_AT_ONCE", chunk)
        distill_metrics.clear_cache()
        metrics = distill_metrics(fused.definition, fused.params, TOKENS, MASK, config=CONFIG)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
        np.testing.assert_allclose(metrics["kl"], kls, rtol=1e-4)
        observed = np.take_along_axis(log_p[:, :-1], np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
        np.testing.assert_allclose(metrics["verifier_ce"], -(observed * weight).sum() / weight.sum(), rtol=1e-4)


def test_a_draft_vocabulary_weighs_positions_by_what_it_holds(fused):
    """Sum over its tokens of p log(p / q), where q is over them alone, less the constant that p's own share makes."""
    ids = list(range(0, 64, 3))
    module = join(fused.definition, fused.params)
    module.restrict_drafts(ids)

    @jax.jit
    def forward():
        positions = jnp.broadcast_to(jnp.arange(9), (3, 9))
        hidden, _, _ = module.llama.shallow(TOKENS, None, positions)
        final, _, _ = module.llama.deep(hidden, None, positions)
        return final, module.drafter.unroll(hidden, Features(final), positions, 1)[0]

    final, draft = forward()
    head = np.asarray(module.llama.head_weight(), np.float64)
    log_p = log_softmax(np.asarray(final, np.float64) @ head.T)
    log_q = log_softmax(np.asarray(draft) @ head[ids].T)
    share = np.exp(log_p[..., ids]).sum(-1, keepdims=True)
    terms = (np.exp(log_p[..., ids]) * (log_p[..., ids] - np.log(share) - log_q)).sum(-1)
    weight = np.asarray(MASK)[:, 1:]
    metrics = distill_metrics(*split(module), TOKENS, MASK, config=replace(CONFIG, unroll_steps=1))
    np.testing.assert_allclose(metrics["kl"][0], (terms[:, :-1] * weight).sum() / weight.sum(), rtol=1e-4)
    agreed = np.asarray(ids)[log_q.argmax(-1)] == log_p.argmax(-1)
    np.testing.assert_allclose(metrics["agreement"][0], (agreed[:, :-1] * weight).sum() / weight.sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("drafter", "mix"), [pytest.param("fused", (0.0, 0.9, 0.1), marks=pytest.mark.full), ("block", (0.7, 0.2, 0.1))]
)
def test_the_gradient_is_that_of_the_loss(make_tiny, train_noise, monkeypatch, drafter, mix):
    """Against jax.grad of the loss written out, with total variation and cross-entropy too."""
    monkeypatch.setattr(distill_module, "POSITIONS_AT_ONCE", 4)
    config = replace(CONFIG, loss=DistillLoss(*mix))
    tiny = make_tiny()
    options = {"layers": 1, "block": 3, "markov_rank": 2} if drafter == "block" else {}
    exit_layer = 0 if drafter == "block" else tiny.manifest.exit_layer
    manifest = replace(tiny.manifest, drafter=drafter, drafter_config=options, exit_layer=exit_layer)
    definition, params = split(build_model(tiny.config, manifest, string_keys(tiny.params.base["llama"])))
    trainable = train_noise(params, "drafter").drafter

    def direct(trainable):
        model = join(definition, params._replace(drafter=trainable))
        positions = jnp.broadcast_to(jnp.arange(9), (3, 9))
        hidden, low, _ = model.llama.shallow(TOKENS, None, positions)
        final, high, _ = model.llama.deep(hidden, None, positions)
        drafts = model.drafter.unroll(hidden, Features.of(final, low + high), positions, 2)
        head, weight = model.llama.head_weight(), jnp.pad(MASK[:, 1:], ((0, 0), (0, 1)))
        target, losses = jax.nn.log_softmax(final @ head.T), []
        for draft in drafts:
            log_q = jax.nn.log_softmax(model.drafter.corrected(draft @ head.T, draft, TOKENS, None))
            kl = jnp.sum(jnp.exp(target) * (target - log_q), -1)
            tv = jnp.sum(jnp.abs(jnp.exp(target) - jnp.exp(log_q)), -1) / 2
            ce = -jnp.take_along_axis(log_q, jnp.argmax(target, -1)[..., None], -1)[..., 0]
            losses.append(jnp.sum((mix[0] * kl + mix[1] * tv + mix[2] * ce) * weight) / jnp.sum(weight))
        decay = 0.8 ** np.arange(len(losses))
        return sum(w * loss for w, loss in zip(decay, losses, strict=True)) / decay.sum()

    loss, expected = jax.jit(jax.value_and_grad(direct))(trainable)
    whole = {"drafter": trainable, "lora_s": params.lora_s}
    gradient = jax.jit(lambda *x: distill_gradient(definition, params, *x, config))
    grads, metrics = gradient(whole, TOKENS, MASK)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.any(x)), expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-3), grads["drafter"], expected)


def test_sgp_learns_the_text_through_the_shallow_layers(make_tiny):
    """With lora_S in the shallow layers and the text as target: every matrix moves, the exit's cross-entropy falls."""
    model = make_tiny(layers=2, lora={"rank_s": 3, "rank_d": 0})
    config = replace(CONFIG, targets="log", lr=1e-2)
    state, losses = init_distill(model.params, config), []
    before = jax.tree.map(np.asarray, state.trainable)
    for _ in range(40):
        state, metrics = distill_step(model.definition, model.params, state, TOKENS, MASK, config=config)
        losses.append((float(metrics["loss"]), float(metrics["verifier_ce"])))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.tree.map(np.asarray, state.trainable))
    assert all(jax.tree.leaves(moved))
    assert losses[-1][0] < 0.7 * losses[0][0]
    assert losses[-1][1] == losses[0][1]  # the verifier is not touched


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_every_drafter_weight_moves_and_nothing_else(fused, own_text):
    state, batches = init_distill(fused.params, own_text), load_packed(own_text.data).batches(32, 0)
    before = jax.tree.map(np.asarray, state.trainable)
    for _ in range(2):  # the first step of a warm-up has rate 0
        state, _ = distill_step(fused.definition, fused.params, state, *next(batches), config=own_text)
    after = jax.tree.map(np.asarray, state.trainable)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, after)))
    assert set(state.trainable) == {"drafter", "lora_s"}


def test_pack_is_the_concatenation():
    sequences = [([1, 2, 3], [0, 1, 1]), ([4, 5], [1, 0]), ([6, 7, 8, 9], [1, 1, 0, 0])]
    packed = pack(sequences, 4, 64)
    np.testing.assert_array_equal(packed.tokens, [[1, 2, 3, 4], [5, 6, 7, 8]])
    np.testing.assert_array_equal(packed.mask, [[0, 1, 1, 1], [0, 1, 1, 0]])
    with pytest.raises(UserError, match="9 tokens, not enough for one row of 10"):
        pack(sequences, 10, 64)


def test_packed_files(tmp_path):
    packed = pack([(list(range(40)), [i % 3 == 0 for i in range(40)])], 8, 64)
    packed.save(tmp_path / "a.npz")
    again = load_packed([tmp_path / "a.npz", tmp_path / "a.npz"])
    np.testing.assert_array_equal(again.tokens, np.concatenate([packed.tokens] * 2))
    np.testing.assert_array_equal(again.mask, np.concatenate([packed.mask] * 2))
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(UserError, match=r"b\.npz is not packed data"):
        load_packed([tmp_path / "b.npz"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": np.ones((2, 9), int)}, "mask is not an array in the archive"),
        ({"tokens": np.ones(9, int), "mask": np.ones(2, np.uint8)}, r"rows of ids, got int64 \[9\]"),
        ({"tokens": np.ones((2, 9)), "mask": np.ones((2, 2), np.uint8)}, r"rows of ids, got float64 \[2, 9\]"),
        ({"tokens": -np.ones((2, 9), int), "mask": np.ones((2, 2), np.uint8)}, "rows of ids"),
        ({"tokens": np.ones((0, 9), int), "mask": np.ones((0, 2), np.uint8)}, "rows of ids"),
        ({"tokens": np.ones((2, 9), int), "mask": np.ones((2, 9), bool)}, r"a bit for each token, got bool \[2, 9\]"),
        ({"tokens": np.ones((2, 9), int), "mask": np.ones((2, 1), np.uint8)}, "a bit for each token"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=rf"x\.npz is not packed data .*{message}"):
        load_packed([tmp_path / "x.npz"])


def test_batches_cover_every_row_each_epoch_and_can_skip():
    packed = Packed(np.arange(12).reshape(6, 2), np.ones((6, 2), bool))
    batches = packed.batches(2, seed=5)
    first = [next(batches)[0] for _ in range(6)]
    for epoch in (first[:3], first[3:]):
        assert sorted(np.concatenate(epoch)[:, 0].tolist()) == [0, 2, 4, 6, 8, 10]
    assert not np.array_equal(np.concatenate(first[:3]), np.concatenate(first[3:]))  # a new order every epoch
    skipped = packed.batches(2, seed=5, skip=4)
    np.testing.assert_array_equal(next(skipped)[0], first[4])


def test_learning_rate_by_hand():
    """It rises over `warmup` updates and falls along half a cosine to a tenth."""
    config = DistillConfig("c", "o", ("d",), tokens=100 * 8, batch_rows=1, row_length=8, lr=0.2, warmup=20)
    rate = learning_rate(config)
    np.testing.assert_allclose([rate(done) for done in (0, 1, 10, 20)], [0.0, 0.01, 0.1, 0.2], rtol=1e-6)
    last = 0.02 + 0.18 * (1 + np.cos(np.pi * 79 / 80)) / 2
    np.testing.assert_allclose([rate(60), rate(99), rate(100)], [0.11, last, 0.02], rtol=1e-6)


def test_expected_tokens():
    assert expected_tokens([0.5, 0.4, 0.1]) == pytest.approx(1 + 0.5 + 0.2 + 0.02)


PROMPTS = np.random.default_rng(0).integers(3, 64, (40, 3)).tolist()
DECODE = DecodeConfig(draft_steps=3, max_new_tokens=29)


@pytest.fixture(scope="module")
def own_text(make_tiny, fused, tmp_path_factory) -> DistillConfig:
    """A run of 45 updates on the model's own text."""
    tiny, folder = make_tiny(), tmp_path_factory.mktemp("distill")
    tree = string_keys(tiny.params.base["llama"])
    write_checkpoint(folder / "model", tiny.config, tiny.manifest, jax.tree.map(np.asarray, tree))
    texts, _ = generate_batch(fused, PROMPTS, DECODE, plain=True, eos_ids=())
    pack([(g.output_ids, [1] * 32) for g in texts], 32, 64).save(folder / "own.npz")
    return DistillConfig(
        str(folder / "model"),
        str(folder / "run"),
        (str(folder / "own.npz"),),
        exit_layer=1,  # random weights say more of the next token there than in the embedding
        tokens=32 * 32 * 45,
        batch_rows=32,
        row_length=32,
        unroll_steps=2,
        eval_rows=8,
        save_every=15,
        lr=5e-3,
    )


def test_run_learns_resumes_and_stays_lossless(own_text, tmp_path):
    """Drafts get accepted, output stays; cut in two it ends at the same weights."""
    config = replace(own_text, out=str(tmp_path / "whole"))
    result = train_offline(config)
    assert result.after[0] > result.before[0] + 0.1
    model = load(result.checkpoint)
    assert (model.manifest.drafter, model.manifest.training_step, model.manifest.draft_steps) == ("fused", 45, 2)
    fast, _ = generate_batch(model, PROMPTS, DECODE, eos_ids=())
    plain, _ = generate_batch(model, PROMPTS, DECODE, plain=True, eos_ids=())
    assert [g.output_ids for g in fast] == [g.output_ids for g in plain]
    assert sum(g.accepted for g in fast) > 0

    class Stop(Exception):  # noqa: N818
        pass

    def stop(kind, record):
        if kind == "train" and record["step"] == 40:
            raise Stop

    with pytest.raises(Stop):
        train_offline(replace(config, out=str(tmp_path / "cut")), report=stop)
    resumed = train_offline(replace(config, out=str(tmp_path / "cut")), resume=True)
    again = train_offline(replace(config, out=str(tmp_path / "cut")), resume=True)  # nothing is left to do
    assert again.checkpoint == resumed.checkpoint
    whole, cut = (read_checkpoint(r.checkpoint).drafter for r in (result, resumed))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    metrics = [without_timings(tmp_path / out / "metrics.jsonl") for out in ("whole", "cut")]
    assert metrics[0] == metrics[1]


def without_timings(path):
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("second")} for line in lines]


def test_a_signal_stops_it_with_a_snapshot(own_text, tmp_path):
    def stop(kind, record):
        if kind == "eval" and record["step"] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    config = replace(own_text, out=str(tmp_path / "run"))
    with pytest.raises(SystemExit) as ended:
        train_offline(config, report=stop)
    assert ended.value.code == 143
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["0"]
    with pytest.raises(UserError, match=r"holds an earlier run \(snapshots/0\): pass --resume"):
        train_offline(config)


def test_weights_that_are_no_numbers_are_rolled_back(own_text, tmp_path, monkeypatch):
    """Seen when the metrics are next read, 17 updates later; it goes back to before it happened, and on."""

    def overflow(definition, params, state, *rest, **options):
        new, values = distill_step(definition, params, state, *rest, **options)
        if int(new.step) == 23:
            new = new.replace(trainable=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), new.trainable))
        return new, values

    monkeypatch.setattr(offline, "distill_step", overflow)
    told = []
    result = train_offline(
        replace(own_text, out=str(tmp_path / "run")), report=lambda kind, record: told.append({"kind": kind} | record)
    )
    (rollback,) = [record for record in told if record["kind"] == "rollback"]
    assert (rollback["step"], rollback["snapshot"], rollback["reason"]) == (40, 15, "17 non-finite updates in a row")
    drafter = read_checkpoint(result.checkpoint).drafter
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(drafter))
    assert result.after[0] > result.before[0]


def test_a_held_out_row_is_never_learned_from():
    """Not even where the file that holds it was given twice."""
    once = Packed(np.arange(24, dtype=np.uint16).reshape(6, 4), np.ones((6, 4), bool))
    twice = Packed(np.concatenate([once.tokens, once.tokens]), np.concatenate([once.mask, once.mask]))
    learned, held_out = twice.hold_out(2)
    assert held_out.tokens.tolist() == once.tokens[-2:].tolist()
    assert learned.tokens.tolist() == once.tokens[:4].tolist() * 2
    assert learned.mask.shape == learned.tokens.shape


def test_tokens_per_second_count_the_device(own_text, tmp_path, monkeypatch):
    """A clock that moves while the host waits for an update, and at no other time, must be what rates are told by."""
    now = [0.0]

    def wait(values):
        now[0] += 10.0
        return values

    monkeypatch.setattr(offline.jax, "block_until_ready", wait)
    monkeypatch.setattr(offline.time, "perf_counter", lambda: now[0])
    config = replace(own_text, out=str(tmp_path / "run"), log_every=5, draft_vocabulary=20)
    told = []
    result = train_offline(config, report=lambda kind, record: told.append(record) if kind == "train" else None)
    per_log = 5 * config.batch_rows * config.row_length
    assert [record["tokens_per_second"] for record in told] == [pytest.approx(per_log / 10)] * 9
    assert result.seconds == 90.0
    learned, _ = load_packed(config.data).hold_out(config.eval_rows)
    often = np.bincount(learned.tokens.ravel(), minlength=64)
    chosen = read_checkpoint(result.checkpoint).draft_vocabulary  # the most frequent tokens stay with the drafter
    assert len(chosen) == 20
    assert often[list(chosen)].min() >= np.delete(often, chosen).max()
    assert load(result.checkpoint).params.base["draft_vocabulary"]["ids"].tolist() == list(chosen)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_learned_comes_first(share):
    """In NumPy's stable order."""
    learned = np.random.default_rng(0).random(200) < share
    order, count = distill_module.learned_first(jnp.asarray(learned))
    np.testing.assert_array_equal(order, np.argsort(~learned, kind="stable"))
    assert int(count) == learned.sum()
