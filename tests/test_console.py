"""The command `dvi`, what a wheel holds, and where the package does not run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dvi_jax import console
from dvi_jax.errors import run_cli
from dvi_jax.tools import shipped

ROOT = Path(__file__).parents[1]


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dvi", *arguments])
    return run_cli(console.main)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # each command runs as `python -m` has it
@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_explains_every_option(monkeypatch, capsys, name):
    """Each option, read off the usage, has a line of its own that says more than its name."""
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, name, "--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: dvi {name} ")
    usage, _, body = shown.partition("\n\n")
    for option in set(re.findall(r"--[a-z][a-z-]+", usage)):
        found = re.search(rf"^  .*{option}\b[^\n]*?(?:  +|\n {{10,}})(\S[^\n]+)", body, re.MULTILINE)
        assert found, f"dvi {name} {option} has no description"


def test_an_unknown_command_names_the_known(monkeypatch, capsys):
    assert run(monkeypatch, "decode") == 2
    assert "there is no command decode: it is one of distill, generate, chat" in capsys.readouterr().err


def test_overview_and_version(monkeypatch, capsys):
    assert run(monkeypatch) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in console.COMMANDS)
    assert run(monkeypatch, "--version") == 0
    assert re.fullmatch(r"dvi \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_names_of_what_is_shipped():
    assert shipped("configs", "demo") == ROOT / "experiments" / "configs" / "demo.yaml"
    assert (shipped("results/drafters", "smollm2-135m-instruct") / "MANIFEST.json").is_file()
    assert shipped("configs", "none") is None


def test_windows_is_told_at_once():
    code = "import sys; sys.platform = 'win32'; import dvi_jax"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (
        ended.stderr.strip().splitlines()[-1].startswith("ImportError: dvi_jax runs on Linux and, untested, on macOS")
    )


def test_a_wheel_holds_what_the_guide_uses(tmp_path):
    """Built as pip builds it, with the setuptools that is there; no name but the package's is installed."""
    copied = tmp_path / "source"
    subprocess.run(["git", "checkout-index", "-a", f"--prefix={copied}/"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(copied)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {"dvi_jax"}
    for needed in (
        *("dvi_jax/py.typed", "dvi_jax/console.py", "dvi_jax/_tools/conversion/parity/__main__.py"),
        *("dvi_jax/_tools/experiments/configs/demo.yaml", "dvi_jax/_tools/experiments/demo.py"),
        "dvi_jax/_tools/experiments/results/drafters/smollm2-135m-instruct/MANIFEST.json",
    ):
        assert needed in names
    assert "dvi_jax/serve/dashboard.html" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    specs = [importlib.util.find_spec(command.module) for command in console.COMMANDS.values()]
    inside = {name.removeprefix("dvi_jax/_tools/") for name in names}
    assert {Path(spec.origin).relative_to(ROOT).as_posix() for spec in specs} <= inside


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["nonsense"]])
def test_dvi_itself_waits_for_no_library(arguments):
    """Nor does Ctrl-C: jax is imported where `run_cli` hears it."""
    code = "import sys; from dvi_jax.console import run; run(); print(*sorted({'jax', 'numpy'} & set(sys.modules)))"
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout.endswith("\n")
    assert "jax" not in ended.stdout.splitlines()[-1].split()
    assert "numpy" not in ended.stdout.splitlines()[-1].split()


INTERRUPTED_IMPORT = """
import os, signal, sys
from dvi_jax.console import run

class Finder:
    def find_spec(self, name, *_):
        if name == "jax":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
sys.exit(run())
"""


def test_ctrl_c_while_libraries_are_imported_is_one_word():
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, "generate", "--checkpoint", "none", "--prompt", "hi"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "stopped\n")
