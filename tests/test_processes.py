"""Two processes that are one run, with a device each."""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import numpy as np
import pytest

from dvi_jax import processes
from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.config import DecodeConfig, SamplingConfig, load_train_config
from dvi_jax.decode.batch import generate_batch
from dvi_jax.distill import main as distill
from dvi_jax.errors import EXIT_STATUS, Terminated, UserError
from dvi_jax.generate import main
from dvi_jax.identity import hash_tree
from dvi_jax.learn.online import train_online
from dvi_jax.learn.packing import load_packed
from dvi_jax.learn.stopping import Stopped
from dvi_jax.loading import load
from dvi_jax.processes import one_of_several
from dvi_jax.serve.intake import CPU_CHUNK
from experiments.tiny import write_tiny_model

DEADLINE = 240  # seconds, after which a test fails rather than waits


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def two(module, *arguments, **options):
    """Both processes of a command: (the first, the other). `options`: as of `subprocess.Popen`."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    named = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process-id"]
    return tuple(
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments, *named, str(number)],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for number in range(2)
    )


def wait_for(found):
    """Until `found()` is true, which it gives."""
    began = time.monotonic()
    while not (what := found()) and time.monotonic() - began < DEADLINE:
        time.sleep(0.02)
    assert what
    return what


def test_a_lost_process_ends_the_run_which_then_goes_on(write_config, tmp_path):
    """Killed in the middle and begun again, it learns bit for bit what two devices of one process learn undisturbed."""
    changes = {"mesh": {"data": 2}, "prompts": 16, "rollout_batch": 4, "eval_every": 100, "save_every": 1}
    config = write_config(**changes | {"out": str(tmp_path / "killed")})
    first, other = two("dvi_jax.train", "--config", str(config))
    wait_for(lambda: list((tmp_path / "killed").glob("snapshots/[1-9]*")))
    other.send_signal(signal.SIGKILL)
    _, errors = first.communicate(timeout=DEADLINE)
    other.communicate()
    assert first.returncode == EXIT_STATUS
    assert "error: process 0 lost another one" in errors
    assert "--resume" in errors

    first, other = two("dvi_jax.train", "--config", str(config), "--resume")
    said, errors = first.communicate(timeout=DEADLINE)
    silence, _ = other.communicate(timeout=DEADLINE)
    assert (first.returncode, other.returncode) == (0, 0), errors
    assert "held-out accept rate" in said
    assert silence == ""

    train_online(load_train_config(write_config(**changes | {"out": str(tmp_path / "whole")})))
    read = [read_checkpoint(tmp_path / name / "checkpoint") for name in ("killed", "whole")]
    assert [each.manifest.training_step for each in read] == [8, 8]
    killed, whole = (hash_tree({"drafter": each.drafter, "lora": each.lora}) for each in read)
    assert killed == whole


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Questions that leave no room for the tokens with which a drafter's speed is measured, which takes long."""
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    lines = ({"messages": [{"role": "user", "content": f"{index} ".ljust(46, "?")}]} for index in range(60))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_distillation_that_lost_a_process_goes_on(byte_checkpoint, log, tmp_path):
    """From nothing, killed once the replies are there: what is made is what one process makes with two devices."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    given = ["--model", str(byte_checkpoint), "--data", str(log), "--minutes", "0.001", "--passes", "4"]
    arguments = [*given, "--mesh", "data=2", "--out"]
    first, other = two("dvi_jax.distill", *arguments, str(killed))
    wait_for((killed / "replies.npz").exists)
    other.send_signal(signal.SIGKILL)
    _, errors = first.communicate(timeout=DEADLINE)
    other.communicate()
    assert first.returncode == EXIT_STATUS
    assert "error: process 0 lost another one" in errors

    first, other = two("dvi_jax.distill", *arguments, str(killed))
    said, errors = first.communicate(timeout=DEADLINE)
    silence, _ = other.communicate(timeout=DEADLINE)
    assert (first.returncode, other.returncode) == (0, 0), errors
    assert "goes on with the settings it was begun with" in said
    assert silence == ""

    whole.mkdir()
    shutil.copy(killed / "recipe.json", whole)
    assert distill([*arguments, str(whole)]) == 0
    replies = [load_packed([path / "replies.npz"]) for path in (killed, whole)]
    np.testing.assert_array_equal(replies[0].tokens, replies[1].tokens)
    drafters = [read_checkpoint(path / "checkpoint") for path in (killed, whole)]
    assert drafters[0].manifest.training_step == drafters[1].manifest.training_step > 1
    assert hash_tree(drafters[0].drafter) == hash_tree(drafters[1].drafter)


def test_a_server_of_two_processes(tmp_path):
    """Trees, a prompt whose beginning is known, a sampled reply: all are those of plain decoding by one process.

    When a process is killed it says so, and ends. Signals that can be answered are the first one's affair.
    """
    write_tiny_model(tmp_path / "tiny", layers=2, context=256)
    options = ["--slots", "2", "--context", "192", "--plan", "tree:4", "--model-name", "small", "--port", "0"]
    first, other = two("dvi_jax.serve", "--checkpoint", str(tmp_path / "tiny"), "--mesh", "data=2", *options)
    lines = iter(first.stderr.readline, "")
    url = re.search(r"http://[^/]+", next(line for line in lines if line.startswith("serving "))).group()
    other.send_signal(signal.SIGTERM)
    model, chunk = load(tmp_path / "tiny"), CPU_CHUNK
    settings = DecodeConfig(draft_steps=3, max_new_tokens=40)
    prompts = [[*range(2, 2 + chunk), 5, 9], [*range(2, 2 + chunk), 7, 7, 1, 30], [9, 4] * (chunk // 2 + 1)]
    temperatures = [0.0, 0.9, 0.0]
    with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor() as pool:

        def ask(prompt, temperature):
            body = {"model": "small", "max_tokens": 40, "ignore_eos": True, "seed": 3}
            return http.post("/v1/completions", json=body | {"prompt": prompt, "temperature": temperature}).json()

        replies = [ask(prompts[0], 0.0), *pool.map(ask, prompts[1:], temperatures[1:])]
        for prompt, temperature, reply in zip(prompts, temperatures, replies, strict=True):
            sampling = SamplingConfig(temperature=temperature, seed=3)
            (alone,), _ = generate_batch(model, [prompt], settings, plain=True, eos_ids=(), sampling=sampling)
            assert reply["choices"][0]["text"] == model.tokenizer.decode(alone.new_ids)
        cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
        assert cached == [0, chunk, 0]
        other.send_signal(signal.SIGKILL)
        sick = wait_for(lambda: [answer for answer in [http.get("/health")] if answer.status_code == 503])
    assert "process 1 is gone" in sick[0].text
    last = first.communicate(timeout=DEADLINE)[1].splitlines()[-1]
    other.communicate()
    assert first.returncode == EXIT_STATUS
    assert last == "error: process 0: process 1 is gone: begin all of them again"


@pytest.mark.parametrize(
    ("stopped", "status", "said"),
    [
        (Stopped(signal.SIGTERM), 143, ""),
        (SystemExit(), 0, ""),
        (Terminated(), 143, "stopped\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (UserError("no such model"), 2, "error: process 0: no such model\n"),
        (ValueError("ABORTED: gone"), 2, "lost another one (ABORTED: gone); begin again"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "error: cannot write out/x"),
        (KeyError("missing"), 1, "KeyError: 'missing'\n"),
    ],
)
def test_who_ends_waits_for_nobody(monkeypatch, capsys, stopped, status, said):
    """Others may be in an exchange that needs this process: neither would come to a common end."""
    named = argparse.Namespace(coordinator="h:1", processes=2, process_id=0)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(jax.distributed, "shutdown", pytest.fail)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left, one_of_several(named):
        raise stopped
    assert left.value.code == status
    shown = capsys.readouterr().err
    assert said in shown
    assert bool(shown) == bool(said)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 21])
def test_a_message_of_any_length_is_told_piece_by_piece(monkeypatch, size):
    """Both sides take part in as many broadcasts of as many bytes, none of more than a piece; minus zero included."""
    message = np.full(size, 0x80, np.uint8).tobytes()
    sent, heard = [], []
    monkeypatch.setattr(processes, "PIECE", 7)

    def send(piece):
        sent.append(np.array(piece))
        return piece

    def receive(piece):
        assert not piece.any()
        assert piece.shape == sent[len(heard)].shape
        heard.append(sent[len(heard)])
        return heard[-1]

    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", send)
    assert processes.told_bytes(message) == message
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", receive)
    assert processes.told_bytes(b"") == message
    assert len(heard) == len(sent) == 1 + -(-size // 7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--processes", "2"], "--coordinator, --processes and --process-id go together"),
        (
            ["--coordinator", "h:1", "--processes", "2", "--process-id", "2"],
            "--process-id must be between 0 and 1, got 2",
        ),
    ],
)
def test_options_that_do_not_fit(options, said):
    with pytest.raises(UserError, match=said):
        main(["--checkpoint", "nowhere", "--prompt", "x", *options])
