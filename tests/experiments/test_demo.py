"""The demo on a tiny checkpoint: its closing table, what it leaves, and the settings it derives from the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dvi_jax.errors import UserError
from experiments.demo import demo_config, main

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def roomy(byte_checkpoint, tmp_path) -> Path:
    """The byte model with the context that demo.yaml asks for (rotary positions need no weights)."""
    path = tmp_path / "roomy"
    shutil.copytree(byte_checkpoint, path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}), encoding="utf-8")
    manifest = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
    del manifest["checksums"]  # the file was changed on purpose
    (path / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


def test_demo(roomy, conversations, tmp_path, capsys):
    arguments = ["--model", str(roomy), "--data", str(conversations), "--out", str(tmp_path / "demo")]
    assert main([*arguments, "--minutes", "0.01"]) == 0
    printed = capsys.readouterr().out
    (run,) = (tmp_path / "demo").glob("run-*")
    held_out = sum(line.startswith("decoding the ") for line in printed.splitlines())
    assert held_out == 1
    count = int(printed.split("decoding the ")[1].split()[0])
    assert f"{count} of {count}" in printed
    assert "minutes of learning are over; --minutes gives it more\n" in printed
    assert "--resume" not in printed
    for name in ("metrics.jsonl", "curve.png", "checkpoint"):
        assert (run / name).exists()
        assert f" {run / name}\n" in printed


def test_exit_layer_fits_the_model(roomy, tmp_path):
    """demo.yaml's layer 8 is beyond two layers; a trained drafter keeps its own."""
    assert demo_config(roomy, Path("it's here.json"), tmp_path, None).exit_layer == 1
    (roomy / "drafter").mkdir()
    config = demo_config(roomy, Path("it's here.json"), tmp_path, 2.5)
    assert config.exit_layer is None
    assert config.max_minutes == 2.5
    assert config.data.files == ("it's here.json",)


def test_a_model_without_a_tokenizer(conversations, tmp_path):
    arguments = ["--model", str(GOLDEN / "mha" / "base"), "--data", str(conversations), "--out", str(tmp_path / "demo")]
    with pytest.raises(UserError, match="has no tokenizer"):
        main(arguments)
    with pytest.raises(UserError, match="has no tokenizer"):  # found imported
        main(arguments)
    assert len(list((tmp_path / "demo" / "models").iterdir())) == 1
