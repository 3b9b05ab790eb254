"""Batches, speculative against plain: every count of the result is that of a generation made here."""

import json

from dvi_jax.config import DecodeConfig
from dvi_jax.data.conversations import Message
from dvi_jax.decode.batch import generate_batch
from dvi_jax.loading import load
from experiments.batches import main


def test_batches(byte_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DVI_JAX_CACHE", str(tmp_path / "cache"))
    questions, out = tmp_path / "questions.jsonl", tmp_path / "batches.json"
    texts = ["What is it?", "Why?", "How many of them are there?", "Where to?", "And then?"]
    lines = [{"question_id": n, "category": "writing", "turns": [text]} for n, text in enumerate(texts)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [
        "--checkpoint",
        str(byte_checkpoint),
        "--questions",
        str(questions),
        "--batches",
        "2",
        "--repeats",
        "1",
    ]
    shapes = ["--new-tokens", "6", "--longest-prompt", "64", "--plans", "early-exit:2", "--out", str(out)]
    assert main([*arguments, *shapes]) == 0
    plain, early = json.loads(out.read_text())["rows"]
    assert (plain["batch"], plain["plan"], plain["times_plain"], plain["tokens_per_round"]) == (2, "plain", 1.0, 1.0)
    assert plain["identical"] == plain["sequences"] == early["sequences"] == 4  # the fifth fills no batch
    model = load(byte_checkpoint)
    prompts = [model.tokenizer.chat([Message("user", text)]) for text in texts[:4]]
    settings = DecodeConfig(draft_steps=2, plan="early-exit:2", max_new_tokens=6)
    found = [g for i in (0, 2) for g in generate_batch(model, prompts[i : i + 2], settings, longest_prompt=64)[0]]
    assert early["tokens_per_round"] == sum(len(g.new_ids) - 1 for g in found) / sum(g.rounds for g in found)
    assert "early-exit:2" in capsys.readouterr().out
