"""`python -m conversion.parity`: exit statuses, and what the report says."""

import itertools
import json
import os
import sys

import pytest

from conversion.parity.__main__ import main
from dvi_jax.checkpoint import read_checkpoint, rewrite_checkpoint
from dvi_jax.errors import run_cli

ALL_STAGES = {
    "logits", "exit hidden", "final hidden", "adapter output", "draft logits", "generated ids", "accept lengths",
    "drafts per round",
}  # fmt: skip


@pytest.fixture
def parity(capsys, monkeypatch, tmp_path):
    """parity(arguments) -> (exit status, stdout, stderr, the JSON report or None)."""

    def run(*arguments):
        report = tmp_path / "report.json"
        command = [*map(str, arguments), "--json", str(report)]
        monkeypatch.setattr(sys, "argv", ["parity", *command])
        status = run_cli(lambda: main(command))
        out, err = capsys.readouterr()
        return status, out, err, json.loads(report.read_text()) if report.exists() else None

    return run


@pytest.fixture(scope="module")
def run_of(mha):
    """A golden run with accepted and rejected drafts: the record, and the options that repeat it."""
    run = json.loads((mha / "golden.json").read_text())["runs"][1]
    options = ["--hf", mha / "base", "--adapter", mha / "adapter", "--max-new-tokens", run["max_new_tokens"]]
    options += ["--draft-steps", run["speculative_steps"], "--threshold", run["threshold"], "--eos-id", "-1"]
    return run, [*options, "--prompt-ids", ",".join(map(str, run["prompt"]))]


@pytest.fixture(scope="module")
def imported(mha, tmp_path_factory):
    from conversion.importing import import_model

    out = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_model(mha / "base", out, adapter=mha / "adapter")
    return out


def lines_that_differ(out):
    return {line.split("│")[1].strip() for line in out.splitlines() if "DIFFER" in line}


def test_built_in_models_agree(parity):
    status, out, _, report = parity("--prompt-ids", "5", "--prompt-ids", "1,2,3", "--max-new-tokens", 24)
    assert (status, report["agree"]) == (0, True)
    assert out.count("upstream: not run (give --kangaroo-dir)") == 2 == len(report["cases"])
    assert out.rstrip().endswith("all agree")
    for case in report["cases"]:
        assert {stage["stage"] for stage in case["stages"] if stage["name"] == "jax"} == ALL_STAGES
        assert {stage["name"] for stage in case["stages"]} == {"jax", "hf"}
        assert all(stage["agrees"] and stage["prompts"] == 2 for stage in case["stages"])
        assert case["committed"] > case["rounds"] > 0


def test_an_altered_verifier_is_found_and_placed(parity, run_of, imported, tmp_path):
    """Where the altered weights part from the golden ids is worked out here, from the ids alone."""
    from dvi_jax.config import DecodeConfig
    from dvi_jax.decode.batch import generate_batch
    from dvi_jax.loading import load

    run, options = run_of
    checkpoint = read_checkpoint(imported)
    checkpoint.base["layers"]["5"]["down"][:] *= 1.1
    rewrite_checkpoint(checkpoint, tmp_path / "altered")
    settings = DecodeConfig(
        draft_steps=run["speculative_steps"], threshold=run["threshold"], max_new_tokens=run["max_new_tokens"]
    )
    (altered,), _ = generate_batch(load(tmp_path / "altered"), [run["prompt"]], settings, eos_ids=())
    pairs = zip(run["output_ids"], altered.output_ids, strict=False)
    position = next(index for index, (wanted, found) in enumerate(pairs) if wanted != found)
    ends = itertools.accumulate(run["accept_lengths"], initial=len(run["prompt"]) - 1)
    number = sum(end < position for end in ends) - 1
    assert position > len(run["prompt"])

    status, out, _, report = parity(*options, "--checkpoint", tmp_path / "altered")
    assert (status, report["agree"]) == (1, False)
    assert {"logits", "final hidden", "generated ids"} <= lines_that_differ(out)
    assert lines_that_differ(out).isdisjoint({"exit hidden", "adapter output", "draft logits"})
    first = report["cases"][0]["first_difference"]
    assert (first["implementation"], first["prompt"], first["round"]) == ("jax", 1, number)
    assert first["position"] <= position
    ids = next(
        s for s in report["cases"][0]["stages"] if (s["stage"], s["against"]) == ("generated ids", "kangaroo_ref")
    )
    wanted = {"position": position, "round": number, "found": altered.output_ids[position]}
    assert ids["name"] == "jax"
    assert {name: ids["mismatch"][name] for name in wanted} == wanted
    assert f"first difference: prompt 1, round {number}, position " in out


def test_an_altered_adapter_changes_rounds_and_not_ids(parity, run_of, imported, tmp_path):
    run, options = run_of
    checkpoint = read_checkpoint(imported)
    checkpoint.drafter["norm"][:16] *= -1
    rewrite_checkpoint(checkpoint, tmp_path / "altered")
    status, out, _, report = parity(*options, "--checkpoint", tmp_path / "altered")
    assert status == 1
    assert lines_that_differ(out) == {"adapter output", "draft logits", "accept lengths"}
    first = report["cases"][0]["first_difference"]
    assert first["what"] == "accept lengths"
    assert first["expected"] == run["accept_lengths"][first["round"]]
    assert first["position"] == len(run["prompt"]) + sum(run["accept_lengths"][: first["round"]])


def test_an_eos_as_first_token_is_explained(parity, run_of):
    run, options = run_of
    first_token = run["output_ids"][len(run["prompt"])]
    status, out, _, _ = parity(*options, "--eos-id", first_token)
    assert status == 0
    assert "prompt 1: the first new token is eos" in out


def test_another_transformers_is_not_run(parity, run_of, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.0.0")
    status, out, _, report = parity(*run_of[1], "--max-new-tokens", "4")
    assert status == 0
    assert "hf: not run (found transformers 5.0.0" in " ".join(out.split())
    assert {stage["name"] for stage in report["cases"][0]["stages"]} == {"jax"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hf", "/nowhere"], "/nowhere"),
        (["--adapter", "/nowhere"], "--adapter belongs to a model"),
        (["--threshold", "-1"], "threshold must be"),
        (["--draft-steps", "17"], "draft_steps must be"),
        (["--prompt-ids", "1,x"], "must look like 1,2,3"),
        (["--prompt-ids", "9999"], "9999"),
        (["--exit-layer", "9"], "exit-layer"),
        (["--max-new-tokens", "600"], "no room"),
        (["--kangaroo-dir", "/nowhere"], "earlyexit.py is missing"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_input_is_one_line_and_status_2(parity, arguments, message):
    status, out, err, report = parity(*arguments)
    assert status == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert report is None


def test_a_checkpoint_of_another_kind_is_refused(parity, mha, tmp_path):
    from conversion.importing import import_model

    import_model(mha / "base", tmp_path / "plain")
    options = ["--hf", mha / "base", "--checkpoint", tmp_path / "plain"]
    assert "--checkpoint needs --adapter" in parity(*options)[2]
    status, _, err, _ = parity(*options, "--adapter", mha / "adapter")
    assert status == 2
    assert "its drafter is exit_head" in err


@pytest.mark.skipif("KANGAROO_DIR" not in os.environ, reason="KANGAROO_DIR names no upstream checkout")
def test_upstream_is_run_where_a_checkout_is_given(parity, run_of):
    status, out, _, report = parity(*run_of[1], "--kangaroo-dir", os.environ["KANGAROO_DIR"])
    assert status == 0
    assert "not run" not in out
    stages = {stage["stage"] for stage in report["cases"][0]["stages"] if stage["name"] == "upstream"}
    assert stages == ALL_STAGES - {"drafts per round"}
