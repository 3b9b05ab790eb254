"""Sampling: its distribution against an enumerated one, and what seeds, neighbours and drafters may change.

Every chi-square comparison alarms at ALARM. There are about 60 in this file, so a right program fails with probability
below 60 * ALARM = 6e-4 over the choice of seeds; seeds are fixed, so it fails always or never.
"""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dvi_jax.checkpoint import Manifest
from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.decode import sampling as sampling_module
from dvi_jax.decode import speculative
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.plan import Growth
from dvi_jax.decode.sampling import Purpose, Sampling, draw_draft, draw_verified, log_probs
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import Knobs
from dvi_jax.decode.tree import grow
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import join, split
from dvi_jax.presets import TINY

ALARM = 1e-5
SETTINGS = (
    SamplingConfig(),
    SamplingConfig(temperature=0.6, top_k=3),
    SamplingConfig(temperature=1.4, top_p=0.8),
    SamplingConfig(temperature=1.2, min_p=0.3),
    SamplingConfig(temperature=0.9, repetition_penalty=1.6),
    SamplingConfig(temperature=1.3, top_k=4, top_p=0.9, min_p=0.1, repetition_penalty=0.8),
)


def by_transformers(ids, logits, setting):
    """Probabilities [rows, V] after `ids` [rows, T] by the processors of transformers; min-p, which it lacks, here."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(setting.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(setting.temperature))
    if setting.top_k:
        processors.append(TopKLogitsWarper(setting.top_k))
    if setting.top_p < 1:
        processors.append(TopPLogitsWarper(setting.top_p))
    scores = processors(torch.tensor(np.array(ids)), torch.tensor(np.array(logits, np.float32)))
    p = torch.softmax(scores.double(), dim=-1).numpy()
    p = np.where(p >= setting.min_p * p.max(axis=-1, keepdims=True), p, 0)
    return p / p.sum(axis=-1, keepdims=True)


def p_value(counts, probability):
    """Of Pearson's chi-square test of counts [cells]; rare cells are pooled, an impossible one gives 0."""
    if counts[probability == 0].any():
        return 0.0
    order = np.argsort(probability)
    expected, observed = counts.sum() * probability[order], counts[order]
    pooled = max(int((expected < 5).sum()), int(np.searchsorted(np.cumsum(expected), 5)) + 1)
    expected = np.append(expected[:pooled].sum(), expected[pooled:])
    observed = np.append(observed[:pooled].sum(), observed[pooled:])
    return float(chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1))


# The distribution of one token.


def test_log_probs_equal_transformers():
    """Random logits, settings and tokens seen before, three rows of logits for each setting."""
    rng = np.random.default_rng(0)
    vocabulary, rows = 50, 3
    settings = [
        *SETTINGS,
        *(
            SamplingConfig(
                temperature=float(rng.uniform(0.2, 2)),
                top_k=int(rng.integers(0, 60)),
                top_p=float(rng.uniform(0.05, 1)),
                min_p=float(rng.choice([0, rng.uniform(0, 0.3)])),
                repetition_penalty=float(rng.uniform(0.7, 2)),
            )
            for _ in range(40)
        ),
    ]
    logits = rng.normal(scale=3, size=(len(settings), rows, vocabulary)).astype(np.float32)
    ids = rng.integers(0, vocabulary, (len(settings), rows, 9))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=-1)
    sampling = Sampling.make(settings, ids[:, 0], vocabulary)
    np.testing.assert_array_equal(sampling.seen, seen[:, 0])
    actual = np.exp(jax.jit(log_probs)(logits, sampling, seen))
    for index, setting in enumerate(settings):
        expected = by_transformers(ids[index], logits[index], setting)
        np.testing.assert_array_equal(actual[index] > 0, expected > 0)
        np.testing.assert_allclose(actual[index], expected, rtol=1e-4, atol=1e-7)


def one_row(logits, **setting):
    sampling = Sampling.make([SamplingConfig(**setting)], [[0]], len(logits))
    return np.asarray(log_probs(jnp.array([[logits]], jnp.float32), sampling, sampling.seen[:, None]))[0, 0]


def test_extreme_settings_stay_finite():
    """The best token always stays, and a top_p of 1 cuts nothing, however little the tail holds."""
    logits = [30.0, 1.0, 0.0, 30.0]
    only_best = [0, -np.inf, -np.inf, -np.inf]
    np.testing.assert_array_equal(one_row(logits, temperature=0), only_best)  # the first of the best, as argmax
    np.testing.assert_array_equal(one_row([3.0, 2.9, 2.0, -9.0], top_p=1e-50), only_best)
    np.testing.assert_array_equal(one_row([3.0, 2.9, 2.0, -9.0], temperature=1e-40), only_best)
    np.testing.assert_array_equal(one_row([3.0, 2.9, 2.0, -9.0], min_p=1), only_best)
    np.testing.assert_allclose(one_row(logits), np.array([0, -29, -30, 0]) - np.log(2), rtol=1e-6)
    drafted = one_row([-np.inf, 1.0, -np.inf, 0.0], top_k=3, repetition_penalty=1.3)  # a draft vocabulary of 1 and 3
    np.testing.assert_allclose(drafted, [-np.inf, -np.log1p(np.exp(-1)), -np.inf, -np.log1p(np.exp(1))], rtol=1e-6)


# One draft and its verification, without a model.

DRAWS = 20_000
ERROR = 4.5 / np.sqrt(4 * DRAWS)  # 4.5 standard errors of a proportion: one in 150,000
P = np.log([0.45, 0.3, 0.15, 0.08, 0.02])
DRAFTERS = {
    "right": P,
    "close": np.log([0.4, 0.25, 0.2, 0.1, 0.05]),
    "opposite": np.log([0.02, 0.08, 0.15, 0.3, 0.45]),
    "of two tokens": np.array([-np.inf, 0.0, -np.inf, -np.inf, 0.5]),
}


def make_rows(*, coupled):
    """Settings of DRAWS rows with different seeds, all at position 7."""
    rows = [SamplingConfig(seed=seed, coupled=coupled) for seed in range(DRAWS)]
    return Sampling.make(rows, [[2]] * DRAWS, 5), jnp.full(DRAWS, 7)


def draft_and_verify(log_q, sampling, position):
    """One draft of each row and what the verifier makes of it: tokens [DRAWS], twice."""
    pending = jnp.tile(jnp.array([2, -1]), (DRAWS, 1))
    draft, q = draw_draft(jnp.tile(log_q, (DRAWS, 1)), sampling, position, pending)
    logits = jnp.tile(jnp.asarray(P, jnp.float32), (DRAWS, 2, 1))
    q = None if sampling.coupled else jnp.stack([q, jnp.zeros_like(q)], axis=1)
    return draft, draw_verified(logits, sampling, position, pending.at[:, 1].set(draft), q)[:, 0]


compiled_once = jax.jit(draft_and_verify)


def first_tokens(log_q, *, coupled, program=compiled_once):
    """The token that a round of each row commits first, and whether it was the draft."""
    draft, verified = map(np.asarray, program(jnp.asarray(log_q, jnp.float32), *make_rows(coupled=coupled)))
    return verified, verified == draft


def total_variation(log_q):
    q = np.exp(log_q) / np.exp(log_q).sum()
    return np.abs(np.exp(P) - q).sum() / 2


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_first_token_and_how_often_the_draft_is_it(drafter):
    """The verifier's distribution in both modes; accepted with 1 - TV, coupled at least (1 - TV) / (1 + TV)."""
    distance = total_variation(DRAFTERS[drafter])
    accepted = {}
    for coupled in (True, False):
        tokens, is_draft = first_tokens(DRAFTERS[drafter], coupled=coupled)
        assert p_value(np.bincount(tokens, minlength=5), np.exp(P)) > ALARM
        accepted[coupled] = is_draft.mean()
    assert abs(accepted[False] - (1 - distance)) < ERROR
    assert (1 - distance) / (1 + distance) - ERROR < accepted[True] < 1 - distance + ERROR
    assert drafter != "right" or accepted == {True: 1, False: 1}


def test_a_wrong_residual_is_noticed(monkeypatch):
    """Rejected drafts replaced by a draw from p instead of the positive part of p - q: the test above must fail."""
    original = sampling_module.draw

    def from_p(log_p, sampling, position, purpose=Purpose.TOKEN):
        by_row = isinstance(purpose, jax.Array)  # the verifier's own token, where a draft was rejected or not
        return original(jnp.broadcast_to(P, log_p.shape) if by_row else log_p, sampling, position, purpose)

    monkeypatch.setattr(sampling_module, "draw", from_p)
    anew = jax.jit(lambda *rows: draft_and_verify(*rows))
    tokens, _ = first_tokens(DRAFTERS["close"], coupled=False, program=anew)
    assert p_value(np.bincount(tokens, minlength=5), np.exp(P)) < ALARM


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("drafts", [2, 3])
def test_several_drafts_of_one_position(drafter, drafts):
    """Drawn from q, none twice, and tried in that order: what comes out is p.

    And one of them more often than of a single draft, unless p lies nowhere else than one would reach in any case.
    """
    sampling, position = make_rows(coupled=False)
    log_q = jnp.asarray(DRAFTERS[drafter], jnp.float32)

    @jax.jit
    def tried(sampling):
        q = jnp.broadcast_to(jax.nn.log_softmax(log_q), (DRAWS, 1, 5))
        noise = sampling_module.gumbel(sampling, position[:, None], 5, Purpose.DRAFT)
        best, tokens = jax.lax.top_k(q + noise, drafts)
        tokens = jnp.where(best > -jnp.inf, tokens, -1)
        log_p = jnp.broadcast_to(jax.nn.log_softmax(jnp.asarray(P, jnp.float32)), (DRAWS, 1, 5))
        return tokens[:, 0], sampling_module.reject(log_p, q, tokens, sampling, position[:, None])[:, 0]

    drawn, tokens = map(np.asarray, tried(sampling))
    assert p_value(np.bincount(tokens, minlength=5), np.exp(P)) > ALARM
    kept = (drawn == tokens[:, None]).any(axis=1).mean()
    assert kept > 1 - total_variation(DRAFTERS[drafter]) + (ERROR if drafter in ("close", "opposite") else -ERROR)


def test_a_rejected_draft_of_the_right_distribution():
    """Where p exceeds q nowhere, as rounding may leave it, a rejected draft is replaced by a token that p allows."""
    logits = jnp.tile(jnp.array([-jnp.inf, 0.0, 0.0, 0.0, 0.0]), (DRAWS, 2, 1))
    log_q = jax.nn.log_softmax(logits) + 0.05
    rows = jnp.tile(jnp.array([1, 2]), (DRAWS, 1))
    tokens = jax.jit(draw_verified)(logits, *make_rows(coupled=False), rows, log_q)[:, 0]
    assert set(np.asarray(tokens).tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("coupled", [True, False])
def test_a_position_drafted_again(coupled):
    """Coupled: the same noise and token. Else: fresh noise, as the first draft may have set how far is drafted."""
    sampling, position = make_rows(coupled=coupled)
    draw_jitted = jax.jit(draw_draft)
    second, first = (
        draw_jitted(jnp.zeros((DRAWS, 5)), sampling, position, jnp.tile(jnp.array(tokens), (DRAWS, 1)))[0]
        for tokens in ([2, 1], [1, -1])
    )
    agree = np.asarray(first == second).mean()
    assert agree == 1 if coupled else abs(agree - 1 / 5) < ERROR


@pytest.mark.parametrize("coupled", [True, False])
def test_a_position_drafted_again_in_a_tree(coupled):
    """As in a chain: the second draft of a round, and the first of the next round, at one position."""
    sampling, position = make_rows(coupled=coupled)
    zeros = jnp.zeros((DRAWS, 4), jnp.int32)

    @jax.jit
    def drafts(sampling, length):
        state = SimpleNamespace(
            tokens=jnp.full((DRAWS, 12), 2),
            length=length,
            limit=length + 9,
            done=jnp.zeros(DRAWS, bool),
            accept_lengths=zeros,
            drafted=zeros,
            sampling=sampling,
        )
        model = SimpleNamespace(over_vocabulary=lambda logits: logits)
        flat = jnp.zeros((DRAWS, 1, 5))
        knobs = Knobs.make(2, 0.0, ())
        return grow(model, state, knobs, 3, Growth(2, 1, 1), lambda level, frontier: flat).tokens[:, 1:]

    agree = np.asarray(drafts(sampling, position)[:, 1] == drafts(sampling, position + 1)[:, 0]).mean()
    assert agree == 1 if coupled else abs(agree - 1 / 5) < ERROR


# Whole generations of a model whose distribution is enumerated.

PROMPT, NEW, ROWS, STEPS = [1, 3], 4, 2000, 3  # ROWS: generations for each setting
SMALL = replace(
    TINY, vocab_size=5, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)


@pytest.fixture(scope="module")
def models():
    """`untrained` and `opposite` differ in the drafter alone; `right` has a verifier that ends at the exit layer."""
    base = random_base(SMALL, jax.random.key(4), std=0.5)
    manifest = Manifest(
        source="random",
        source_sha256="",
        dtype="float32",
        exit_layer=1,
        drafter="exit_head",
        drafter_config={"rank": 2, "alpha": 2.0},
    )
    untrained = LoadedModel(SMALL, manifest, *split(build_model(SMALL, manifest, base)))
    drafter = {"drafter": untrained.params.drafter["drafter"] | {"scale": jnp.float32(-2)}}
    deep = base["layers"]["1"]
    shallow = {**base, "layers": {**base["layers"], "1": {**deep, "out": 0 * deep["out"], "down": 0 * deep["down"]}}}
    module = join(untrained.definition, untrained.params)
    module.restrict_drafts([0, 3])
    return {
        "untrained": untrained,
        "opposite": untrained.with_params(untrained.params._replace(drafter=drafter)),
        "right": untrained.with_params(split(build_model(SMALL, manifest, shallow))[1]),
        "restricted": LoadedModel(SMALL, manifest, *split(module)),
    }


@pytest.fixture(scope="module")
def exact(models):
    """exact(name)[s]: the probability of every continuation [5**NEW] with SETTINGS[s], from passes without a cache."""
    known = {}
    sequences = np.indices((5,) * NEW).reshape(NEW, -1).T
    ids = np.concatenate([np.tile(PROMPT, (len(sequences), 1)), sequences], axis=1)

    @jax.jit
    def forward(params):
        llama = join(models["untrained"].definition, params).llama
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return llama.logits(llama.deep(llama.shallow(jnp.asarray(ids), None, positions)[0], None, positions)[0])

    def sequence_probability(logits, setting):
        probability = np.ones(1)
        for done in range(NEW):
            prefix, length = slice(None, None, 5 ** (NEW - done)), len(PROMPT) + done
            following = by_transformers(ids[prefix, :length], logits[prefix, length - 1], setting)
            probability = (probability[:, None] * following).ravel()
        return probability

    def lookup(name):
        verifier = "right" if name == "right" else "untrained"
        if verifier not in known:
            logits = np.asarray(forward(models[verifier].params))
            known[verifier] = [sequence_probability(logits, setting) for setting in SETTINGS]
        return known[verifier]

    return lookup


def sample(model, *, coupled, stops=(0.0, 0.0), plain=False, plan=None):
    """ROWS generations for each setting, as one batch: new ids [settings, ROWS, NEW], and the share of drafts kept.

    stops: threshold and draft_cost. A tree has 8 rows, whose paths branch at every node.
    """
    settings = [
        replace(setting, seed=ROWS * index + row, coupled=coupled)
        for index, setting in enumerate(SETTINGS)
        for row in range(ROWS)
    ]
    options = {"plain": plain, "eos_ids": (), "sampling": settings}
    generations, _ = generate_batch(
        model,
        [PROMPT] * len(settings),
        DecodeConfig(
            draft_steps=7 if plan else STEPS,
            plan=plan,
            threshold=stops[0],
            max_new_tokens=NEW,
            draft_cost=stops[1],
        ),
        **options,
    )
    drafted = sum(sum(generation.drafted) for generation in generations)
    kept = sum(generation.accepted for generation in generations) / max(drafted, 1)
    return np.array([generation.new_ids for generation in generations]).reshape(-1, ROWS, NEW), kept


def p_values(ids, exact_probability):
    cells = ids @ 5 ** np.arange(NEW)[::-1]
    counts = [np.bincount(setting, minlength=5**NEW) for setting in cells]
    return np.array([p_value(c, p) for c, p in zip(counts, exact_probability, strict=True)])


@pytest.fixture(scope="module")
def plain_ids(models):
    return {name: sample(models[name], coupled=True, plain=True)[0] for name in ("untrained", "right")}


@pytest.mark.parametrize("name", ["untrained", "right"])
def test_plain_distribution(plain_ids, exact, name):
    assert (p_values(plain_ids[name], exact(name)) > ALARM).all()


@pytest.mark.parametrize(
    ("name", "stops", "least", "most"),
    [("opposite", (0.0, 0.0), 0, 0.3), ("untrained", (0.5, 0.1), 0.5, 0.9), ("right", (0.0, 0.0), 1, 1)],
)
def test_speculative_distribution(models, plain_ids, exact, name, stops, least, most):
    """Rejection has plain sampling's distribution; coupled has its very tokens."""
    ids, kept = sample(models[name], coupled=False, stops=stops)
    assert (p_values(ids, exact(name)) > ALARM).all()
    assert least <= kept <= most
    ids, kept_coupled = sample(models[name], coupled=True, stops=stops)
    np.testing.assert_array_equal(ids, plain_ids["right" if name == "right" else "untrained"])
    assert kept_coupled <= kept


@pytest.mark.parametrize(("name", "stops"), [("opposite", (0.0, 0.0)), ("untrained", (0.3, 0.1))])
def test_distribution_with_a_tree(models, exact, name, stops):
    """Several drafts of each position, which are tried one after the other."""
    ids, kept = sample(models[name], coupled=False, stops=stops, plan="tree:8")
    assert (p_values(ids, exact(name)) > ALARM).all()
    assert kept > sample(models[name], coupled=False, stops=stops)[1]


def test_a_coupled_tree_of_a_right_drafter_is_right(models, plain_ids):
    """Drafts are ranked with the noise of their positions, so the first choice is the verifier's token."""
    ids, kept = sample(models["right"], coupled=True, plan="tree:8")
    np.testing.assert_array_equal(ids, plain_ids["right"])
    assert kept > 0.999  # the draft pass has other shapes: its rounding may decide a tie the other way


def test_distribution_with_a_draft_vocabulary(models, exact):
    """Two of five tokens are ever drafted; all are sampled as often as they should be."""
    ids, kept = sample(models["restricted"], coupled=False)
    assert (p_values(ids, exact("restricted")) > ALARM).all()
    assert kept > 0.1


def test_a_wrong_acceptance_is_noticed(models, exact, monkeypatch):
    """Every draft accepted; no other test meets the program that is traced here."""
    original = speculative.draw_verified

    def accept_all(logits, sampling, position, rows, log_q):
        drafts = jnp.pad(rows[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        return jnp.where(drafts < 0, original(logits, sampling, position, rows, log_q), drafts)

    monkeypatch.setattr(speculative, "draw_verified", accept_all)
    decode_rounds.clear_cache()
    ids, kept = sample(models["untrained"], coupled=False)
    decode_rounds.clear_cache()
    assert kept == 1
    assert (p_values(ids, exact("untrained")) < ALARM).all()


# Bad input.


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_bad_settings(setting):
    (name,) = setting
    with pytest.raises(UserError, match=f"^{name} must be .*, got [^\n]*$"):
        SamplingConfig(**setting)
