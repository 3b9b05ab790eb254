"""What --plan and --draft-steps come to."""

import pytest

from dvi_jax.command_line import AUTO_DRAFTS, add_model_options, decode_settings
from dvi_jax.errors import ArgumentParser, UserError


def settings(*arguments):
    parser = ArgumentParser()
    add_model_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    return decode_settings(parser.parse_args(["--checkpoint", "model", *arguments]))


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
