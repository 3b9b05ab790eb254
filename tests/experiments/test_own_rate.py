"""What an engine serves of a load by itself, and a checkpoint for it: counts and shapes, no rates."""

import json

from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.presets import TINY
from experiments import own_rate, random_checkpoint
from experiments.load import make_requests
from experiments.tiny import write_tiny_model


def test_an_engine_is_asked_what_a_load_asks(tmp_path, capsys):
    """Prompts of both processes, that the context holds; every token of the replies is counted, each time."""
    write_tiny_model(tmp_path / "model", context=512)
    load = ["--processes", "2", "--requests", "12", "--max-tokens", "6"]
    engine = ["--slots", "2", "--context", "64", "--plan", "plain", "--clients", "3"]
    assert own_rate.main(["--checkpoint", str(tmp_path / "model"), *engine, *load]) == 0
    first, again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["tokens"] == again["tokens"]
    options = own_rate._parse(["--checkpoint", "x", *load])
    options.requests, options.leave, options.temperature = 6, 0.0, 0.0
    bodies = []
    for seed in (0, 1):
        options.seed = seed
        bodies += [asked.body for asked in make_requests(options)]
    # A byte is a token, and the conversation's form adds 17.
    fitting = [b for b in bodies if len(b["messages"][0]["content"]) + 17 + b["max_tokens"] <= 64]
    assert 0 < len(fitting) < len(bodies)
    assert len(fitting) <= first["tokens"] <= sum(body["max_tokens"] for body in fitting)
    assert round(first["requests_per_second"] * first["seconds"]) == len(fitting)


def test_a_random_checkpoint_speaks_as_another_does(tmp_path):
    write_tiny_model(tmp_path / "spoken")
    out = tmp_path / "made"
    arguments = ["--shape", "tiny", "--dtype", "float32", "--tokenizer-from", str(tmp_path / "spoken")]
    assert random_checkpoint.main([*arguments, "--out", str(out)]) == 0
    made, spoken = read_checkpoint(out), read_checkpoint(tmp_path / "spoken")
    assert made.tokenizer_json == spoken.tokenizer_json
    assert made.config.eos_token_ids == spoken.config.eos_token_ids
    assert made.config.vocab_size == max(TINY.vocab_size, 258) == made.base["embed"].shape[0]
    assert (made.config.hidden_size, made.config.num_layers) == (TINY.hidden_size, TINY.num_layers)
