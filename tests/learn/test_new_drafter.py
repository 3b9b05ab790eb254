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


EXIT_HEAD, FUSED, MEDUSA = ("exit_head", 3), ("fused", 3), ("medusa", 3)  # described by a manifest, with its exit layer


@pytest.mark.parametrize(
    ("manifest", "asked_for", "expected"),
    [
        # What needs an exit layer takes the manifest's, whatever that describes, or else the usual one.
        *((described, kind, 3) for kind in ("exit_head", "kangaroo") for described in (EXIT_HEAD, FUSED, MEDUSA)),
        *(((described, 0), kind, 2) for kind in ("exit_head", "kangaroo") for described in ("fused", "medusa")),
        # What does without has none, except where the manifest describes such a drafter with one.
        *((described, "fused", 0) for described in (EXIT_HEAD, MEDUSA, ("kangaroo", 3), ("medusa", 0), ("fused", 0))),
        *((described, kind, 0) for kind in ("medusa", "block") for described in (EXIT_HEAD, FUSED)),
        (FUSED, "fused", 3),
        (MEDUSA, "medusa", 3),
    ],
)
def test_an_exit_layer_that_nobody_named(untrained, manifest, asked_for, expected):
    described, exit_layer = manifest
    manifest = replace(untrained.manifest, drafter=described, exit_layer=exit_layer, drafter_config={})
    checkpoint = replace(untrained, manifest=manifest)
    for choose in (kept_or_new_drafter, matching_or_new_drafter):
        assert asked(choose(checkpoint, asked_for, {}, None)) == (asked_for, {}, expected)
        assert asked(choose(checkpoint, asked_for, {}, 1)) == (asked_for, {}, 1)


@pytest.mark.parametrize(("exit_layer", "expected"), [(0, 2), (3, 3)])
@pytest.mark.parametrize("described", ["exit_head", "fused", "medusa"])
def test_lora_s_in_the_shallow_layers_brings_an_exit_layer(untrained, described, exit_layer, expected):
    """Whether the settings ask for it or the manifest does; layer 0, asked for beside it, is an error."""
    manifest = replace(untrained.manifest, drafter=described, exit_layer=exit_layer, drafter_config={})
    checkpoint = replace(untrained, manifest=manifest)
    new = matching_or_new_drafter(checkpoint, "fused", {}, None, shallow_rank=4)
    assert (*asked(new), new.manifest.lora) == ("fused", {}, expected, {"rank_s": 4, "rank_d": 0})
    with_lora = replace(checkpoint, manifest=replace(manifest, lora={"rank_s": 4, "rank_d": 2}))
    assert asked(kept_or_new_drafter(with_lora, "fused", {}, None)) == ("fused", {}, expected)
    # A new drafter offline leaves behind the lora_S of the one before.
    own = exit_layer if described == "fused" else 0
    assert asked(matching_or_new_drafter(with_lora, "fused", {}, None)) == ("fused", {}, own)
    with pytest.raises(UserError, match="a lora_S in the shallow layers takes an exit layer, and this drafter has"):
        from_checkpoint(matching_or_new_drafter(checkpoint, "fused", {}, 0, shallow_rank=4))


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
