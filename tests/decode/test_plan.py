"""What a plan says, reads back, and refuses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import choose_plan
from dvi_jax.decode.plan import PLAIN, Plan, plan_for, row_class, rows_alike
from dvi_jax.errors import UserError
from dvi_jax.presets import SHAPES


@pytest.mark.parametrize("text", ["plain", "chain:1", "chain:16", "block:4", "early-exit:6"])
def test_text_and_back(text):
    plan = Plan.parse(text)
    assert str(plan) == text
    assert plan.rows == (1 if text == "plain" else int(text.split(":")[1]) + 1)


@pytest.mark.parametrize(
    "text",
    ["", "chain", "chain:", "chain:0", "chain:17", "chain:-1", "chain:two", "plain:1", "tree", "chain:²"],
)
def test_other_text_is_refused(text):
    with pytest.raises(UserError, match="plan"):
        Plan.parse(text)


def test_the_plan_that_suits_a_device(monkeypatch):
    assert plan_for(0, drafts_blocks=False) == PLAIN
    assert plan_for(3, drafts_blocks=True) == Plan("block", 3)
    assert plan_for(3, drafts_blocks=False) == Plan("early-exit", 3)  # on the CPU, where this runs
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert plan_for(3, drafts_blocks=False) == Plan("chain", 3)


def test_row_classes(monkeypatch):
    config = SHAPES["smollm2"]
    assert not rows_alike(1, config, jnp.bfloat16)
    assert row_class(2, 4, config, jnp.float32) == "2x4"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert rows_alike(64, config, jnp.bfloat16)
    assert not rows_alike(64, config, jnp.float32)
    assert not rows_alike(64, replace(config, head_dim=96), jnp.bfloat16)  # heads of 96: no kernel for attention
    assert row_class(4, 16, config, jnp.bfloat16) == "any"
    assert row_class(64, 16, config, jnp.bfloat16) == "64x16"  # more rows than the kernels take


def test_plain_decoding_has_a_program_where_drafting_cannot_be_left_out(make_tiny):
    model = make_tiny()
    assert choose_plan(model, DecodeConfig(plan="chain:3"), plain=True) == PLAIN
    assert choose_plan(model, DecodeConfig(plan="early-exit:3"), plain=True) == Plan("early-exit", 3)
    with pytest.raises(UserError, match="chain:5 makes more than draft_steps 3"):
        choose_plan(model, DecodeConfig(plan="chain:5"))
