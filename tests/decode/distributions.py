"""What the tests of sampling compare with: the distribution of one token, and of a small model's generations.

Every chi-square comparison alarms at ALARM. There are about 60 in the tests, so a right program fails with probability
below 60 * ALARM = 6e-4 over the choice of seeds; seeds are fixed, so it fails always or never.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

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
from dvi_jax.decode import batch as batch_module
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.sampling import Sampling
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


# One token of many rows: what a verifier says of it, and what drafters do.

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


def total_variation(log_q):
    q = np.exp(log_q) / np.exp(log_q).sum()
    return np.abs(np.exp(P) - q).sum() / 2


# Whole generations of a model whose distribution is enumerated.

PROMPT, NEW, ROWS, STEPS = [1, 3], 4, 1000, 3  # ROWS: generations for each setting
SLOTS = 32  # of the caches: a padded prompt of 16, what is new and a round; every slot more is 6,000 rows' work
SMALL = replace(
    TINY, vocab_size=5, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)


def five_token_models():
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


class FiveTokens:
    """The models, their exact distributions and what was sampled from them, each computed once."""

    def __init__(self):
        self.models = five_token_models()
        sequences = np.indices((5,) * NEW).reshape(NEW, -1).T
        self.ids = np.concatenate([np.tile(PROMPT, (len(sequences), 1)), sequences], axis=1)

    @cache  # noqa: B019 - there is one, and it lives as long as the tests
    def exact(self, name):
        """The probability of every continuation with each of SETTINGS, from a pass without a cache: [5**NEW] each."""
        if name in ("opposite", "restricted"):
            return self.exact("untrained")  # one verifier
        model = self.models[name]

        @jax.jit
        def forward(params):
            llama = join(model.definition, params).llama
            positions = jnp.broadcast_to(jnp.arange(self.ids.shape[1]), self.ids.shape)
            hidden = llama.shallow(jnp.asarray(self.ids), None, positions)[0]
            return llama.logits(llama.deep(hidden, None, positions)[0])

        logits = np.asarray(forward(model.params))
        return [self._of_sequences(logits, setting) for setting in SETTINGS]

    def _of_sequences(self, logits, setting):
        probability = np.ones(1)
        for done in range(NEW):
            prefix, length = slice(None, None, 5 ** (NEW - done)), len(PROMPT) + done
            following = by_transformers(self.ids[prefix, :length], logits[prefix, length - 1], setting)
            probability = (probability[:, None] * following).ravel()
        return probability

    def p_values(self, name, ids):
        """Of `ids` [settings, ROWS, NEW] against the exact distribution of each setting."""
        cells = ids @ 5 ** np.arange(NEW)[::-1]
        counts = [np.bincount(setting, minlength=5**NEW) for setting in cells]
        return np.array([p_value(c, p) for c, p in zip(counts, self.exact(name), strict=True)])

    def plain(self, name):
        """New ids of plain decoding."""
        return self.sampled(name, coupled=True, plain=True)[0]

    @cache  # noqa: B019
    def sampled(self, name, **how):
        return sample(self.models[name], **how)


def sample(model, *, coupled, stops=(0.0, 0.0), plain=False, plan=None, rows=ROWS):
    """`rows` generations for each setting, as one batch: new ids [settings, rows, NEW], and the share of drafts kept.

    stops: threshold and draft_cost. A tree has 8 rows, whose paths branch at every node.
    """
    settings = [
        replace(setting, seed=ROWS * index + row, coupled=coupled)
        for index, setting in enumerate(SETTINGS)
        for row in range(rows)
    ]
    decoding = DecodeConfig(
        draft_steps=7 if plan else STEPS, plan=plan, threshold=stops[0], max_new_tokens=NEW, draft_cost=stops[1]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "cache_slots", lambda longest: SLOTS)
        generations, _ = generate_batch(
            model, [PROMPT] * len(settings), decoding, plain=plain, eos_ids=(), sampling=settings
        )
    drafted = sum(sum(generation.drafted) for generation in generations)
    kept = sum(generation.accepted for generation in generations) / max(drafted, 1)
    return np.array([generation.new_ids for generation in generations]).reshape(-1, rows, NEW), kept
