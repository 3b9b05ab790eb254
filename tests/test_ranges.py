"""Every number and every path is within what the arrays and files it ends up in can hold, or one line says so."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dvi_jax.checkpoint import Manifest
from dvi_jax.config import DistillConfig, LlamaConfig, SamplingConfig, TrainConfig
from dvi_jax.decode.batch import check_prompts
from dvi_jax.errors import UserError
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.loading import build_model
from dvi_jax.presets import TINY
from dvi_jax.settings import from_dict

ROOT = Path(__file__).parents[1]
BIG = 2**31

ONLINE = {"checkpoint": "c", "out": "o"}
DISTILL = ONLINE | {"data": ["d"]}
MANIFEST = {"source": "", "source_sha256": "", "dtype": "float32", "exit_layer": 1}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainConfig, ONLINE | {"seed": 2**32}, r"seed must be between 0 and 2\*\*32 - 1, got 4294967296"),
        (TrainConfig, ONLINE | {"seed": -1}, r"seed must be between 0 and 2\*\*32 - 1, got -1"),
        (TrainConfig, ONLINE | {"replay_capacity": BIG}, f"replay_capacity must be at most {BIG - 1}"),
        (TrainConfig, ONLINE | {"save_every": 10**30}, "save_every must be at most"),
        (TrainConfig, ONLINE | {"decode": {"max_new_tokens": BIG}}, "max_new_tokens must be at most"),
        (TrainConfig, ONLINE | {"optimizer": {"warmup": BIG}}, r"optimizer\.warmup must be 0 \(none\) or above, of 32"),
        (TrainConfig, ONLINE | {"optimizer": {"weight_decay": -1}}, r"optimizer\.weight_decay must be 0 or above"),
        (TrainConfig, ONLINE | {"optimizer": {"head_lr": 1e39}}, r"head_lr must be a number of 32 bits, got 1e\+39"),
        (TrainConfig, ONLINE | {"objective": {"unroll_steps": 10**6}}, r"objective\.unroll_steps must be at most 16"),
        (TrainConfig, ONLINE | {"objective": {"kl_max": -1}}, r"objective\.kl_max must be 0 or above"),
        (TrainConfig, ONLINE | {"slow": {"rank_d": 5000}}, r"slow\.rank_d must be at most 4096"),
        (TrainConfig, ONLINE | {"out": ""}, "out must be a path, without NUL characters, got ''"),
        (TrainConfig, ONLINE | {"checkpoint": "a\0b"}, "checkpoint must be a path, without NUL"),
        (TrainConfig, ONLINE | {"data": {"files": ["a", ""]}}, r"data\.files must be a path"),
        (DistillConfig, DISTILL | {"data": [""]}, "data must be a path"),
        (DistillConfig, DISTILL | {"warmup": BIG}, "warmup must be at most"),
        (DistillConfig, DISTILL | {"tokens": 2**60, "batch_rows": 1, "row_length": 1}, "tokens must be at most"),
        (SamplingConfig, {"top_k": BIG}, r"top_k must be 0 \(all tokens\) or above, of 32 bits"),
        (SamplingConfig, {"temperature": 1e39}, r"temperature must be 0 \(greedy\) or above"),
        (Manifest, MANIFEST | {"lora": {"rank_s": 1.5}}, r"rank_s must be a whole number, got 1\.5"),
        (Manifest, MANIFEST | {"lora": {"rank_d": "2"}}, "rank_d must be a whole number, got '2'"),
        (Manifest, MANIFEST | {"lora": {"alpha_d": [1]}}, r"alpha_d must be a number, got \[1\]"),
        (Manifest, MANIFEST | {"exit_layer": -1}, "exit_layer must be 0 or above, got -1"),
        (Manifest, MANIFEST | {"training_step": BIG}, "training_step must be at most"),
        (Manifest, MANIFEST | {"held_out_fraction": 1.0}, "held_out_fraction must be at least 0 and below 1"),
        (LlamaConfig, TINY.to_json() | {"rope_theta": 0.0}, "rope_theta must be above 0"),
        (LlamaConfig, TINY.to_json() | {"rope_theta": -1.0}, "rope_theta must be above 0"),
        (LlamaConfig, TINY.to_json() | {"head_dim": 7}, "head_dim must be even"),
        (LlamaConfig, TINY.to_json() | {"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0 and below 1"),
        (LlamaConfig, TINY.to_json() | {"eos_token_ids": [BIG]}, "eos_token_ids must be at most"),
        (LlamaConfig, TINY.to_json() | {"bos_token_id": -5}, "bos_token_id must be 0 or above"),
        (
            LlamaConfig,
            TINY.to_json() | {"rope_scaling": {"kind": "llama3", "factor": 2.0, "low_freq_factor": 4.0}},
            r"low_freq_factor/high_freq_factor must be above 0, and ascending, got \(4\.0, 4\.0\)",
        ),
    ],
)
def test_a_value_out_of_its_range_is_one_line(kind, values, message):
    with pytest.raises(UserError, match=message) as told:
        from_dict(kind, values, "here")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("options", [{"num_heads": 3}, {"num_heads": 64}, {"num_kv_heads": 3}])
def test_heads_that_a_drafter_cannot_have(make_tiny, options):
    """Of no whole, odd or no size."""
    base = make_tiny().params.base["llama"]
    manifest = replace(from_dict(Manifest, MANIFEST, ""), drafter="kangaroo", drafter_config=options)
    with pytest.raises(UserError, match=r"num_(kv_)?heads must be a divisor of"):
        build_model(TINY, manifest, {"norm": base["norm"]})


def test_empty_names_and_nul_in_paths():
    for name in ("", "a\0b"):
        with pytest.raises(UserError, match="a model's name must be a path, without NUL characters"):
            open_checkpoint(name)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (np.zeros((0, 3), np.int32), "a batch needs at least one prompt"),
        (np.array([[1, 64]]), "prompt ids must be between 0 and 63"),
        (np.array([[1.5, 2.0]]), "a prompt is token ids here, got array"),
        ([[2**70]], "prompt ids must be between 0 and 63"),
    ],
)
def test_prompts_of_numpy(make_tiny, prompts, message):
    check_prompts(make_tiny(), np.array([[1, 2], [3, 4]], np.int64), 1)
    check_prompts(make_tiny(), [np.array([1, 63], np.uint8), [2]], 1)
    with pytest.raises(UserError, match=message):
        check_prompts(make_tiny(), prompts, 1)


def test_64_bits_are_refused(byte_checkpoint):
    imports = "from dvi_jax.loading import load; from dvi_jax.errors import run_cli"
    code = f"{imports}; run_cli(lambda: load({str(byte_checkpoint)!r}))"
    variables = {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert ended.stderr == "error: JAX_ENABLE_X64 is set, and all counts and ids here have 32 bits: unset it\n"
