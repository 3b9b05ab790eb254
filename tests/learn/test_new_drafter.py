"""Which drafter a run begins with, from a checkpoint and the settings."""

from dataclasses import replace

import pytest

from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.errors import UserError
from dvi_jax.learn.new_drafter import kept_or_new_drafter, matching_or_new_drafter
from dvi_jax.loading import from_checkpoint
from experiments.tiny import write_tiny_model


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Of four layers, so that the middle is not the first."""
    path = tmp_path_factory.mktemp("new") / "tiny"
    write_tiny_model(path)
    return read_checkpoint(path)


@pytest.fixture
def trained(untrained):
    manifest = replace(
        untrained.manifest, drafter="medusa", exit_layer=0, drafter_config={"heads": 2, "markov_rank": 0}
    )
    return replace(untrained, manifest=manifest, drafter={"blocks": None})


def asked(checkpoint):
    manifest = checkpoint.manifest
    return manifest.drafter, manifest.drafter_config, manifest.exit_layer


def test_a_new_drafter_is_what_the_settings_say(untrained):
    assert asked(kept_or_new_drafter(untrained, None, {"rank": 3}, None)) == ("exit_head", {"rank": 3}, 1)
    assert asked(kept_or_new_drafter(untrained, "medusa", {"heads": 2}, None)) == ("medusa", {"heads": 2}, 0)
    assert asked(matching_or_new_drafter(untrained, "fused", {}, 1)) == ("fused", {}, 1)


def test_a_trained_drafter_is_kept_online_and_nothing_else_may_be_asked(trained):
    assert kept_or_new_drafter(trained, None, {}, None) is trained
    assert kept_or_new_drafter(trained, "medusa", {"heads": 2}, None) is trained
    for settings, message in (
        (("fused", {}, None), "drafter fused: the checkpoint's drafter was trained as medusa"),
        ((None, {"heads": 3}, None), "drafter_options.heads 3: the checkpoint's drafter was trained with 2"),
        ((None, {}, 1), "exit_layer 1: the checkpoint's drafter was trained at layer 0"),
    ):
        with pytest.raises(UserError, match=message):
            kept_or_new_drafter(trained, *settings)


def test_offline_another_drafter_takes_its_place(trained):
    assert matching_or_new_drafter(trained, "medusa", {"heads": 2}, None) is trained
    new = matching_or_new_drafter(trained, "medusa", {"heads": 3}, None)
    assert asked(new) == ("medusa", {"heads": 3, "markov_rank": 0}, 0)
    assert new.drafter is None
    # Back from a block drafter, which has no exit layer, to a step drafter, which usually has one.
    assert asked(matching_or_new_drafter(trained, "fused", {}, None)) == ("fused", {}, 2)


def test_exit_layers(untrained):
    """A block drafter may have one, but no lora_S below it; a step drafter may need one."""
    for kind, exit_layer, lora, message in (
        ("medusa", 1, {"rank_s": 2, "rank_d": 0}, "drafter medusa drafts whole blocks: it takes no lora_S"),
        ("fused", 0, {"rank_s": 2, "rank_d": 0}, "a lora_S in the shallow layers takes an exit layer"),
        ("exit_head", 0, {}, "exit_layer must be between 1 and 3 for a model of 4 layers, got 0"),
    ):
        manifest = replace(untrained.manifest, drafter=kind, drafter_config={}, exit_layer=exit_layer, lora=lora)
        with pytest.raises(UserError, match=message):
            from_checkpoint(replace(untrained, manifest=manifest))
    assert asked(kept_or_new_drafter(untrained, "medusa", {}, 1)) == ("medusa", {}, 1)
    without = kept_or_new_drafter(untrained, "fused", {}, 0)
    assert asked(without) == ("fused", {}, 0)
    assert asked(kept_or_new_drafter(without, None, {"taps": (1,)}, None)) == ("fused", {"taps": (1,)}, 0)
