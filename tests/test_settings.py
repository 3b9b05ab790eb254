"""Settings that are none, hostile or absurd: one short line each, in no time and no memory."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields

import pytest

from dvi_jax.checkpoint import Manifest, read_checkpoint
from dvi_jax.config import TRAINERS, DistillConfig, LlamaConfig, TrainConfig, load_train_config
from dvi_jax.errors import UserError
from dvi_jax.presets import TINY
from dvi_jax.settings import MOST_YAML, from_dict
from dvi_jax.settings_list import list_settings
from dvi_jax.text_files import read_json

LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


def complaint_of(function, *arguments) -> str:
    with pytest.raises(UserError) as told:
        function(*arguments)
    line = str(told.value)
    assert len(line) < 1000
    return line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 50_000, "not valid YAML at line 1: nested more than 20 deep"),
        ("seed: " + "{a: " * 10_000, "not valid YAML at line 1: nested more than 20 deep"),
        ("seed: 2001-99-99", "not valid YAML: month must be in 1..12"),
        ("seed: !!int x", "not valid YAML: invalid literal"),
        ("seed: !!timestamp x", "not valid YAML"),
        ("seed: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("checkpoint: 0x" + "f" * 4000, "not valid YAML at line 1: an absurdly large number"),
        (LAUGHS, "not valid YAML at line 2: aliases \\(\\*name\\) are not allowed"),
        ("a: &a {b: 1}\n<<: *a", "not valid YAML at line 2: aliases"),
        ("checkpoint: " + "x" * MOST_YAML, f"longer than the {MOST_YAML} characters"),
        ("trainer: [online]", r"trainer must be online or distill, got \['online'\]"),
        (
            "checkpoint: c\nout: o\ndrafter_options: {alpha: .nan}",
            r"drafter_options\.alpha must be a finite number, got nan",
        ),
        (
            "checkpoint: c\nout: o\ndrafter_options: {alpha: .inf}",
            r"drafter_options\.alpha must be a finite number, got inf",
        ),
        ("checkpoint: c\nout: o\nkv: int4", r"kv must be dtype \(the model's\), int8 or float8, got 'int4'"),
        ("checkpoint: c\nout: o\nprompts: true", "prompts must be of type int, got True"),
        ("checkpoint: c\nout: o\nmax_minutes: 1" + "0" * 400, "int too large to convert to float"),
        ("checkpoint: c\nout: o\ncheckpoint2: " + "x" * 5000, "unknown key checkpoint2"),
        ("checkpoint: c\nout: o\nexit_layer: " + "x" * 5000, 'wrong value type for field "exit_layer"'),
        ("checkpoint: c\nout: o\nrollback: {after: 6}", r"rollback\.after must be between 0 \(never\) and 5, got 6"),
        (
            "checkpoint: c\nout: o\nrollback: {collapse: 1.0}",
            r"rollback\.collapse must be 0 \(never\) or a share below 1",
        ),
    ],
    ids=range(20),
)
def test_a_training_config(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert re.search(message, complaint_of(load_train_config, path))


def test_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("checkpoint: c\nout: o\n", encoding="utf-8")
    assert "not valid YAML" in complaint_of(load_train_config, path, ["seed=" + "[" * 5000])
    assert "aliases" in complaint_of(load_train_config, path, ["seed=[&a 1, *a]"])
    assert "embedded null byte" in complaint_of(load_train_config, "a\0b")
    config = load_train_config(path, ["decode.draft_steps=4", "max_minutes=2", "data.files=[x]"])
    assert config == from_dict(
        TrainConfig,
        {"checkpoint": "c", "out": "o", "decode": {"draft_steps": 4}, "max_minutes": 2.0, "data": {"files": ["x"]}},
        "here",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "decode.draft_stesp=2",
            "^--set decode.draft_stesp=2: unknown key decode.draft_stesp: did you mean decode.draft_",
        ),
        ("colour=1", "^--set colour=1: unknown key colour$"),
        ("decode.draft_steps=many", '^--set decode.draft_steps=many: wrong value type for field "decode.draft_steps"'),
        ("decode.plan.size=1", '^--set decode.plan.size=1: wrong value type for field "decode.plan"'),
    ],
)
def test_a_fault_of_the_command_line_is_not_blamed_on_the_file(tmp_path, override, message):
    path = tmp_path / "run.yaml"
    path.write_text("checkpoint: c\nout: o\n", encoding="utf-8")
    assert re.search(message, complaint_of(load_train_config, path, [override]))


def test_an_unknown_key_of_a_file_names_its_path_and_the_nearest(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("checkpoint: c\nout: o\ndata: {file: [x]}\n", encoding="utf-8")
    assert complaint_of(load_train_config, path) == f"{path}: unknown key data.file: did you mean data.files?"


def test_one_value_where_several_are_wanted(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("checkpoint: c\nout: o\n", encoding="utf-8")
    assert load_train_config(path, ["data.files=logs/one.json"]).data.files == ("logs/one.json",)


def test_every_setting_is_listed_with_what_it_is():
    """Against the dataclasses: no path is missing, and each can be set."""
    for trainer in TRAINERS.values():
        listed = {setting.name: setting for setting in list_settings(trainer)}
        assert all(setting.meaning for setting in listed.values())
        assert {"checkpoint", "out"} <= {name for name, setting in listed.items() if setting.default == "required"}
        assert {name.partition(".")[0] for name in listed} == {each.name for each in fields(trainer)}
    assert list_settings(DistillConfig)[0].meaning.startswith("the model")
    assert {s.name: s.default for s in list_settings(TrainConfig)}["decode.draft_steps"] == "3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 10**9}, "num_layers must be at least 1 and at most 1024"),
        ({"vocab_size": 10**30}, "vocab_size must be at least 1 and at most"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"bos_token_id": True}, r"bos_token_id must be of type int \| None, got True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be above 0 and below 1, got nan"),
        ({"rope_scaling": {"kind": "linear", "factor": float("inf")}}, r"rope_scaling\.factor must be a finite number"),
        (
            {"hidden_size": int("9" * 4000) ** 2},
            "hidden_size must be at least 1 and at most 1048576, got a huge number",
        ),
    ],
)
def test_an_architecture(changes, message):
    assert LlamaConfig.from_json(TINY.to_json()) == TINY
    assert re.search(message, complaint_of(LlamaConfig.from_json, TINY.to_json() | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"colour": 1}}, r"lora must be an object with alpha_d, alpha_s, rank_d, rank_s, got \['colour'\]"),
        ({"lora": {"rank_s": 10**9}}, "rank_s must be between 0 and 4096"),
        ({"drafter_config": {"rank": -1}}, "rank must be between 0 and 4096"),
        ({"drafter_config": {"alpha": float("nan")}}, "alpha must be between 0 and 4096, got nan"),
        ({"dtype": "x" * 9999}, "dtype must be float32 or bfloat16"),
    ],
)
def test_a_manifest(changes, message):
    manifest = {"source": "", "source_sha256": "", "dtype": "float32", "exit_layer": 1}
    assert from_dict(Manifest, manifest, "here").exit_layer == 1
    assert re.search(message, complaint_of(from_dict, Manifest, manifest | changes, "here"))


def test_json_files(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[" * 100_000, encoding="utf-8")
    assert "x.json is not valid JSON" in complaint_of(read_json, path)
    path.write_bytes(b'{"a": "\xff"}')
    assert "x.json is not UTF-8 text (byte 7)" in complaint_of(read_json, path)
    assert "is not a file" in complaint_of(read_json, tmp_path)
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: no disk has to hold it
    assert "x.json is larger than the 32 MiB that it may have" in complaint_of(read_json, path)


def test_texts_of_a_checkpoint(byte_checkpoint, tmp_path):
    """Without checksums, as of an earlier version: those would tell before."""
    copied = shutil.copytree(byte_checkpoint, tmp_path / "copied")
    manifest = json.loads((copied / "MANIFEST.json").read_text(encoding="utf-8"))
    del manifest["checksums"]
    (copied / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")
    (copied / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja is not UTF-8 text" in complaint_of(read_checkpoint, copied)


def test_a_folder_does_not_hide_the_shipped_config_of_its_name(tmp_path, monkeypatch):
    """The demo leaves a folder called demo."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load_train_config("demo", ["out=mine"]).out == "mine"


def test_a_name_that_is_not_shipped_tells_those_that_are():
    complaint = complaint_of(load_train_config, "dmeo")
    assert re.fullmatch(r"there is no config dmeo: give a file, or one of ablation_\w+, .*\bdemo\b.*", complaint)
