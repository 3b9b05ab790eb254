"""An export's tokenizer: what transformers 4.33.3 makes of it, and what its templates will know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.exporting import export_checkpoint
from conversion.importing import import_model
from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.data.conversations import Message
from dvi_jax.data.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"


@pytest.fixture
def exported(make_hf, tmp_path):
    """A model with SmolLM2's kind of tokenizer, imported and exported; its eos id is not its eos text."""
    source = make_hf(vocab_size=483, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "smollm2" / name, source / name)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ eos_token }}"}))
    import_model(source, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf", "hf")
    return tmp_path


def test_generate_of_transformers_runs_on_what_its_tokenizer_gives(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported / "hf")
    model = AutoModelForCausalLM.from_pretrained(exported / "hf")
    inputs = tokenizer("Hello world", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_special_tokens_are_those_of_tokenizer_config(exported):
    checkpoint = read_checkpoint(exported / "checkpoint")
    assert Tokenizer.from_checkpoint(checkpoint).render([Message("user", "x")]) == "<|im_end|>"
    settings = json.loads((exported / "hf" / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert settings["unk_token"] == "<|endoftext|>"
    import_model(exported / "hf", exported / "again")
    again = read_checkpoint(exported / "again")
    assert again.special_tokens == checkpoint.special_tokens
    assert again.tokenizer_json == checkpoint.tokenizer_json


def test_a_template_that_wants_more_is_reported_and_ids_work(make_hf, tmp_path, capsys):
    source = make_hf(vocab_size=483)
    shutil.copy(GOLDEN / "smollm2" / "tokenizer.json", source)
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('needs a system message') }}{% endif %}"
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    import_model(source, tmp_path / "checkpoint")
    note = capsys.readouterr().err
    assert note.startswith("note: for a single user message the chat template failed: TemplateError: needs a system")
    assert note.count("\n") == 1
    tokenizer = Tokenizer.from_checkpoint(read_checkpoint(tmp_path / "checkpoint"))
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
