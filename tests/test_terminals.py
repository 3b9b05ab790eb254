"""What a terminal may do to a program: close early, lack letters, belong to a user without a home."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dvi_jax.loading import enable_compilation_cache

ROOT = Path(__file__).parents[1]
PROGRAM = "import sys; from dvi_jax.errors import run_cli; sys.exit(run_cli(lambda: {}))"


def started(action: str, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM.format(action)]
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("action", ["print('line\\n' * 10**6)", "print('line')"])
def test_a_reader_that_leaves_ends_the_program_quietly(action):
    process = started(f"__import__('time').sleep(1) or {action}")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141  # as for any program that SIGPIPE ends
    process.stderr.close()


def test_without_any_output_a_program_still_ends_well():
    command = [sys.executable, "-c", PROGRAM.format("print('line')")]
    ended = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], cwd=ROOT, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_what_is_said_on_stderr_never_comes_out_on_stdout():
    command = [sys.executable, "-c", PROGRAM.format("print('said', file=sys.stderr) or print('line')")]
    ended = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], cwd=ROOT, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, b"line\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("action", ["print('line\\n' * 10**6)", "print('line')"])
def test_a_disk_that_is_full_is_one_line(action):
    command = [sys.executable, "-c", PROGRAM.format(action)]
    ended = subprocess.run(["sh", "-c", '"$@" >/dev/full', "sh", *command], cwd=ROOT, capture_output=True, check=False)
    message = b"error: cannot write the output: No space left on device; make room for it\n"
    assert (ended.returncode, ended.stderr) == (2, message)


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", b"caf\xe9 ?\n"), ("ascii", b"caf? ?\n")])
def test_letters_that_the_terminal_lacks_are_shown_as_question_marks(encoding, shown):
    output, errors = started("print('caf\\u00e9 \\u2603')", PYTHONIOENCODING=encoding).communicate()
    assert (output, errors) == (shown, b"")


@pytest.fixture
def homeless(monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    before = jax.config.jax_compilation_cache_dir
    yield monkeypatch
    jax.config.update("jax_compilation_cache_dir", before)


def test_without_a_home_the_variable_is_enough(homeless, tmp_path):
    homeless.setenv("DVI_JAX_CACHE", str(tmp_path))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")


def test_without_either_nothing_is_kept(homeless):
    homeless.delenv("DVI_JAX_CACHE", raising=False)
    before = jax.config.jax_compilation_cache_dir
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
