"""Bad input to `train`, `generate` and `conversion`: one line that names what is wrong, exit status 2, nothing left."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conversion.__main__ import main as conversion
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.evaluate.__main__ import main as evaluate
from dvi_jax.generate import main as generate
from dvi_jax.train import main as train

ROOT = Path(__file__).parents[1]
MHA = ROOT / "tests" / "golden" / "mha" / "base"


@pytest.fixture
def complaint(capsys, monkeypatch):
    """complaint(main, *arguments): the one line on stderr, after checking that it is one, and the status."""

    def run(main, *arguments) -> str:
        arguments = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        capsys.readouterr()
        assert run_cli(main) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("error: ")
        assert output.err.count("\n") == 1
        return output.err

    return run


def copy_of(checkpoint: Path, target: Path) -> Path:
    """A copy without checksums, whose files may be changed by hand."""
    shutil.copytree(checkpoint, target)
    manifest = json.loads((target / "MANIFEST.json").read_text(encoding="utf-8"))
    manifest.pop("checksums", None)
    (target / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--checkpoint": "nowhere"}, "no checkpoint at nowhere: no such file or directory, nor a repository"),
        ({"--checkpoint": str(MHA.parent)}, "is no checkpoint: MANIFEST.json is missing"),
        ({"--exit-layer": "2"}, "exit_layer must be between 1 and 1 for a model of 2 layers, got 2"),
        ({"--exit-layer": "0"}, "exit_layer must be between 1 and 1 for a model of 2 layers, got 0"),
        ({"--prompt-ids": "1,x"}, "--prompt-ids must look like 1,2,3, got '1,x'"),
        ({"--prompt-ids": "1,258"}, "prompt ids must be between 0 and 257"),
        ({"--prompt-ids": "1,-1"}, "prompt ids must be between 0 and 257"),
        ({"--prompt-ids": "2," * 99 + "2"}, "the prompt has 100 tokens and 64 new ones were asked for"),
        ({"--max-new-tokens": "0"}, "max_new_tokens must be at least 1, got 0"),
        ({"--max-new-tokens": "many"}, "argument --max-new-tokens: invalid int value: 'many'"),
        ({"--draft-steps": "17"}, "draft_steps must be between 0 and 16, got 17"),
        ({"--threshold": "-1"}, "threshold must be 0 or above, got -1.0"),
        ({"--drafter": "kangaroo"}, "--drafter kangaroo: this checkpoint's drafter is exit_head"),
        ({"--prompt": "both"}, "not allowed with argument"),
        ({"--no-such-flag": "1"}, "unrecognized arguments: --no-such-flag 1"),
    ],
)
def test_generate(byte_checkpoint, complaint, changes, message):
    options = {"--checkpoint": str(byte_checkpoint), "--prompt-ids": "5,6"} | changes
    assert message in complaint(generate, *[part for option in options.items() for part in option])


@pytest.mark.parametrize("option", [["--adaptive"], ["--threshold", "0.5"], ["--memory-limit", "1"]])
def test_what_says_nothing_where_an_engine_decodes(complaint, option):
    """Before anything is read: neither the checkpoint nor the files are there."""
    files = (
        {"--input": "in.jsonl", "--output": "out.jsonl"},
        {"--batch": "4", "--questions": "in.jsonl", "--out": "out"},
    )
    for main, given in zip((generate, evaluate), files, strict=True):
        arguments = ["--checkpoint", "nowhere", *(part for pair in given.items() for part in pair)]
        flag = next(iter(given))
        assert f"with {flag} drafts follow --plan" in complaint(main, *arguments, *option)
        assert f"leave out {option[0]}\n" in complaint(main, *arguments, *option)
        message = complaint(main, *arguments, "--plan", "auto", "--draft-steps", "2")
        assert f"with {flag} --plan auto chooses how far a round drafts: leave out --draft-steps" in message
    sampled = complaint(generate, "--checkpoint", "nowhere", "--input", "a", "--output", "b", "--rejection")
    assert "leave out --rejection" in sampled


def test_generate_without_a_prompt(byte_checkpoint, complaint):
    assert "one of the arguments --prompt --prompt-ids --input is required" in complaint(
        generate, "--checkpoint", byte_checkpoint
    )


def test_a_tokenizer_larger_than_the_vocabulary(byte_checkpoint, tmp_path, complaint):
    """The same for all that loads a checkpoint; here an added token lies beyond the embedding's 258 rows."""
    broken = copy_of(byte_checkpoint, tmp_path / "broken")
    tokenizer = json.loads((broken / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 258, "content": "<|more|>"})
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    message = complaint(generate, "--checkpoint", broken, "--prompt", "hi")
    assert "the tokenizer has 259 tokens, the model's embedding only 258" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", '{"colour": 1}', "config.json: unknown key colour"),
        ("MANIFEST.json", '{"format_version": 1}', "MANIFEST.json: missing value"),
        ("tokenizer.json", "[]", "tokenizer.json must be an object with a model"),
    ],
)
def test_a_damaged_checkpoint(byte_checkpoint, tmp_path, complaint, name, content, message):
    broken = copy_of(byte_checkpoint, tmp_path / "broken")
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_text(content, encoding="utf-8")
    assert message in complaint(generate, "--checkpoint", broken, "--prompt", "hi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "colour=1"], "unknown key colour"),
        (["--set", "decode.colour=1"], "unknown key decode.colour"),
        (["--set", "prompts"], "--set 'prompts' must have the form section.key=value"),
        (["--set", "prompts=[1"], "--set prompts=[1: not valid YAML"),
        (["--set", "prompts=many"], 'wrong value type for field "prompts"'),
        (["--set", "prompts.first=1"], "prompts is a value, not a section"),
        (["--set", "prompts=0"], "prompts must be at least 1, got 0"),
        (["--set", "exit_layer=4"], "exit_layer must be between 1 and 1"),
        (["--set", "checkpoint=nowhere"], "no checkpoint at nowhere"),
        (["--set", "data.files=[nowhere.json]"], "cannot read conversations from nowhere.json: there is no such file"),
        (["--set", "data.files=[]"], "a conversation stream needs one path or more"),
        (["--set", "data.held_out_fraction=1.5"], "data.held_out_fraction must be at least 0 and below 1, got 1.5"),
        (["--set", "data.max_prompt_tokens=121"], "exceed the model's context of 128 tokens"),
        (["--set", "decode.draft_steps=0"], "decode.draft_steps must be at least 1 to learn, got 0"),
        (["--set", "positions_per_update=1000"], "positions_per_update must be at most"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_train(write_config, tmp_path, complaint, arguments, message):
    assert message in complaint(train, "--config", write_config(), *arguments)
    assert not list(tmp_path.glob("run/snapshots/*"))  # nothing that a corrected second try would have to resume


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: [1\nseed: 2", "not valid YAML at line 2"),
        ("- prompts", "must hold a mapping of settings, got list"),
        ("", "missing value for field"),
        ("checkpoint: !!python/object/apply:os.getcwd []", "not valid YAML at line 1"),
    ],
)
def test_a_config_that_is_none(tmp_path, complaint, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    assert message in complaint(train, "--config", path)


def test_a_config_that_cannot_be_read(tmp_path, complaint):
    assert "cannot read config" in complaint(train, "--config", tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bytes.yaml is not UTF-8 text" in complaint(train, "--config", tmp_path / "bytes.yaml")


def test_an_earlier_run_is_not_continued_unasked(write_config, tmp_path, complaint):
    (tmp_path / "run" / "snapshots" / "5").mkdir(parents=True)
    assert "pass --resume to go on with it" in complaint(train, "--config", write_config())


@pytest.mark.parametrize("text", ["", "\n\n", "[]", '{"messages": []}\n', '[{"id": 1, "conv'])
def test_an_empty_stream(write_config, tmp_path, complaint, text):
    (tmp_path / "empty.json").write_text(text, encoding="utf-8")
    message = complaint(train, "--config", write_config(), "--set", f"data.files=[{tmp_path / 'empty.json'}]")
    assert "no usable conversation in" in message


def test_a_stream_without_held_out_prompts(write_config, complaint):
    message = complaint(train, "--config", write_config(), "--set", "data.held_out_fraction=1.0e-9")
    assert "the stream has no held-out prompt" in message


def edited_hf(target: Path, **changes) -> Path:
    shutil.copytree(MHA, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return target


def test_conversion(tmp_path, complaint, byte_checkpoint):
    out = tmp_path / "out"
    cases = {
        "no model at": tmp_path / "none",
        "is a checkpoint, imported already": byte_checkpoint,
        "a mixture of experts": edited_hf(
            tmp_path / "experts", model_type="mixtral", architectures=["MixtralForCausalLM"]
        ),
        "attention_bias": edited_hf(tmp_path / "bias", attention_bias=True),
        "pytorch_model.bin": edited_hf(tmp_path / "cut"),
    }
    weights = tmp_path / "cut" / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    for message, source in cases.items():
        assert message in complaint(conversion, "import", "--from", source, "--out", out)
    assert "--exit-layer must be in 1..5" in complaint(
        conversion, "import", "--from", MHA, "--out", out, "--exit-layer", 99
    )
    for options, message in {
        ("--group", "32"): "it goes with --weights int4",
        ("--group", "32", "--weights", "int8"): "it goes with --weights int4",
        ("--quantise-head",): "--quantise-head needs --weights",
    }.items():
        assert message in complaint(conversion, "import", "--from", MHA, "--out", out, *options)
    # Said before what takes minutes: the weights are neither read nor rounded for it.
    unread = ("--weights", "int4", "--calibration", tmp_path / "none.jsonl")
    assert "already exists" in complaint(conversion, "import", "--from", MHA, "--out", weights.parent, *unread)
    assert "already exists" in complaint(
        conversion, "export", "--from", tmp_path / "none", "--to", "hf", "--out", weights.parent
    )
    assert "unrecognized arguments: --no-such-flag" in complaint(
        conversion, "import", "--from", MHA, "--out", out, "--no-such-flag"
    )
    assert "--from" in complaint(conversion, "import", "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("module", ["dvi_jax.generate", "dvi_jax.train", "experiments.demo"])
def test_with_its_traceback(module, monkeypatch, complaint):
    """With --debug the exception leaves `run_cli`."""
    main, arguments = importlib.import_module(module).main, ["--config", "none.yaml", "--data", "none.json"]
    complaint(main, *arguments)
    monkeypatch.setattr(sys, "argv", ["command", *arguments, "--debug"])
    with pytest.raises(UserError):
        run_cli(main)


def test_as_a_process():
    """What a shell sees: status 2 and the line."""
    command = [sys.executable, "-m", "dvi_jax.train", "--config", "none.yaml"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1


def test_help_names_every_default_and_leaves_commands_as_they_are():
    """Also of options without a word of their own, and those whose default is nothing much."""
    parser = ArgumentParser(prog="x", description="One\nparagraph.\n\n    x --seeds 1\n    x --seeds 2\n\nAnother.")
    parser.add_argument("--threshold", type=float, default=0.0, help="least of all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--flag", action="store_true", help="on")
    shown = parser.format_help()
    assert "\n\nOne paragraph.\n\n    x --seeds 1\n    x --seeds 2\n\nAnother.\n\n" in shown
    options = [line.split() for line in shown.partition("options:\n")[2].splitlines()]
    assert options[1:] == [
        ["--threshold", "X", "least", "of", "all", "(default:", "0.0)"],
        ["--seeds", "N", "[N", "...]", "default:", "1", "2"],
        ["--out", "PATH"],
        ["--flag", "on"],
    ]
