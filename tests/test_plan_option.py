"""What --plan and --draft-steps come to."""

import pytest

from dvi_jax.checkpoint import Manifest
from dvi_jax.command_line import AUTO_DRAFTS, add_model_options, decode_settings, settings_for
from dvi_jax.errors import ArgumentParser, UserError
from dvi_jax.loading import LoadedModel
from dvi_jax.presets import TINY


def options(*arguments):
    parser = ArgumentParser()
    add_model_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    return parser.parse_args(["--checkpoint", "model", *arguments])


def settings(*arguments):
    return decode_settings(options(*arguments))


@pytest.mark.parametrize(
    ("arguments", "plan", "drafts"),
    [
        ([], None, 3),
        (["--draft-steps", "5"], None, 5),
        (["--plan", "chain:5"], "chain:5", 5),
        (["--plan", "chain:5", "--draft-steps", "5"], "chain:5", 5),
        (["--plan", "plain"], "plain", 0),
        (["--plan", "auto"], None, AUTO_DRAFTS),
        (["--plan", "auto", "--draft-steps", "2"], None, 2),
    ],
)
def test_plan_and_drafts(arguments, plan, drafts):
    found = settings(*arguments)
    assert (found.plan, found.draft_steps) == (plan, drafts)


def test_two_different_numbers_are_refused():
    with pytest.raises(UserError, match="--plan chain:5 says how far a round drafts: leave out --draft-steps 3"):
        settings("--plan", "chain:5", "--draft-steps", "3")


@pytest.mark.parametrize(
    ("trained", "recorded", "arguments", "plan", "drafts"),
    [
        (True, {"draft_steps": 5}, [], None, 5),
        (True, {"plan": "chain:2", "draft_steps": 2}, [], "chain:2", 2),
        (True, {}, [], None, 3),  # a drafter from before it was recorded
        (True, {"draft_steps": 5}, ["--draft-steps", "1"], None, 1),
        (True, {"plan": "chain:2", "draft_steps": 2}, ["--plan", "tree:4"], "tree:4", 3),
        (True, {"draft_steps": 5}, ["--plan", "auto"], None, AUTO_DRAFTS),
        (True, {"draft_steps": 5}, ["--adaptive"], None, 5),
        (False, {}, [], "plain", 0),
        (False, {}, ["--adaptive"], None, 3),
        (False, {}, ["--draft-steps", "2"], None, 2),
    ],
)
def test_who_says_nothing_gets_the_drafting_of_training(trained, recorded, arguments, plan, drafts):
    manifest = Manifest(source="", source_sha256="", dtype="float32", exit_layer=1, **recorded)
    found = settings_for(LoadedModel(TINY, manifest, None, None, None, trained), options(*arguments))
    assert (found.plan, found.draft_steps) == (plan, drafts)
