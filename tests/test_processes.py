"""Two processes that are one run, with a device each."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.config import load_train_config
from dvi_jax.errors import EXIT_STATUS, UserError
from dvi_jax.generate import main
from dvi_jax.identity import hash_tree
from dvi_jax.learn.online import train_online

DEADLINE = 240  # seconds, after which a test fails rather than waits


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def two(module, *arguments):
    """Both processes of a command: (the first, the other)."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    named = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process-id"]
    return tuple(
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments, *named, str(number)],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    )


def test_a_lost_process_ends_the_run_which_then_goes_on(write_config, tmp_path):
    """Killed in the middle and begun again, it learns bit for bit what two devices of one process learn undisturbed."""
    changes = {"mesh": {"data": 2}, "prompts": 16, "rollout_batch": 4, "eval_every": 100, "save_every": 1}
    config = write_config(**changes | {"out": str(tmp_path / "killed")})
    first, other = two("dvi_jax.train", "--config", str(config))
    began = time.monotonic()
    while not list((tmp_path / "killed").glob("snapshots/[1-9]*")) and time.monotonic() - began < DEADLINE:
        time.sleep(0.05)
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
