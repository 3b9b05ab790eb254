"""What a plan says, reads back, and refuses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import check_rows, choose_plan
from dvi_jax.decode.plan import PLAIN, Plan, check_plan, plan_for, row_class, rows_alike
from dvi_jax.errors import UserError
from dvi_jax.presets import SHAPES


@pytest.mark.parametrize(
    ("text", "rows", "drafts"),
    [
        ("plain", 1, 0),
        ("chain:1", 2, 1),
        ("chain:16", 17, 16),
        ("block:4", 5, 4),
        ("early-exit:6", 7, 6),
        ("tree:2", 2, 1),
        ("tree:16", 16, 3),
        ("tree:64", 64, 4),
        ("tree:16x5", 16, 5),
    ],
)
def test_text_and_back(text, rows, drafts):
    plan = Plan.parse(text)
    assert (str(plan), plan.rows, plan.drafts) == (text, rows, drafts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "chain",
        "chain:",
        "chain:0",
        "chain:17",
        "chain:-1",
        "chain:two",
        "plain:1",
        "tree",
        "tree:1",
        "tree:65",
        "chain:²",
        "chain:3x2",
        "tree:16x",
        "tree:16x0",
        "tree:4x4",
    ],
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
    model = make_tiny(layers=2)
    assert choose_plan(model, DecodeConfig(plan="chain:3"), plain=True) == PLAIN
    assert choose_plan(model, DecodeConfig(plan="early-exit:3"), plain=True) == Plan("early-exit", 3)
    with pytest.raises(UserError, match="chain:5 makes more than draft_steps 3"):
        choose_plan(model, DecodeConfig(plan="chain:5"))


def test_how_many_rows_a_tree_may_have(make_tiny, monkeypatch):
    """As many as a chain where bits depend on their number; else 256 over the whole batch."""
    model = make_tiny(layers=2)
    assert choose_plan(model, DecodeConfig(plan="tree:4")) == Plan("tree", 4)
    with pytest.raises(UserError, match=r"tree:5: without the GPU's kernels .* at most draft_steps \+ 1 rows, here 4"):
        choose_plan(model, DecodeConfig(plan="tree:5"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    half = replace(model, config=SHAPES["smollm2"], manifest=replace(model.manifest, dtype="bfloat16"))
    assert choose_plan(half, DecodeConfig(plan="tree:64")) == Plan("tree", 64)
    check_rows(half, Plan("tree", 64), 4)
    with pytest.raises(UserError, match="tree:64: 5 such trees have more than 256 rows"):
        check_rows(half, Plan("tree", 64), 5)


def test_a_drafter_follows_no_plan_of_more_drafts_than_it_makes():
    """A tree's longest path counts, not its rows."""
    check_plan(Plan("tree", 16), "medusa", drafts_blocks=True, max_drafts=3)
    for plan in (Plan("tree", 16), Plan("block", 3)):
        with pytest.raises(UserError, match=f"plan {plan}: drafter medusa drafts at most 2"):
            check_plan(plan, "medusa", drafts_blocks=True, max_drafts=2)
    with pytest.raises(UserError, match="plan chain:2: drafter medusa takes block:N or tree:ROWS"):
        check_plan(Plan("chain", 2), "medusa", drafts_blocks=True, max_drafts=4)
