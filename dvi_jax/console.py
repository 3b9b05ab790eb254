"""The command `dvi`: one name for the command lines of the package, `dvi generate` for `python -m dvi_jax.generate`."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from types import FrameType
from typing import NamedTuple, NoReturn

from dvi_jax.errors import INTERRUPTED_STATUS, UserError, run_cli
from dvi_jax.tools import make_tools_importable
from dvi_jax.version import __version__


class Command(NamedTuple):
    """What `python -m` runs, what it is for, and what goes before the user's arguments."""

    module: str
    description: str
    before: tuple[str, ...] = ()


COMMANDS = {
    "distill": Command("dvi_jax.distill", "make a drafter for a model from a log of conversations"),
    "generate": Command("dvi_jax.generate", "decode a prompt, or a file of prompts"),
    "chat": Command("dvi_jax.chat", "talk to a model in the terminal"),
    "serve": Command("dvi_jax.serve", "OpenAI's HTTP API over one model, with metrics and a dashboard"),
    "train": Command("dvi_jax.train", "train a drafter by a file of settings, online or on given text"),
    "evaluate": Command("dvi_jax.evaluate", "measure a drafter on Spec-Bench questions: speed and equality"),
    "import": Command("conversion", "Hugging Face directory or GGUF file -> checkpoint", ("import",)),
    "export": Command("conversion", "checkpoint -> Hugging Face directory, orbax, or a drafter", ("export",)),
    "parity": Command("conversion.parity", "compare with the PyTorch reference (needs torch)"),
    "fetch": Command("experiments.fetch", "get the model and the conversations of the demo"),
    "demo": Command("experiments.demo", "all of it on a small model: import, learn, compare"),
}


def main() -> int:
    """Run the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"dvi {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"there is no command {name}: it is one of {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    make_tools_importable()
    import_libraries()
    sys.argv = [f"dvi {name}", *command.before, *arguments]
    runpy.run_module(command.module, run_name="__main__")  # which exits with its own status
    return 0


def import_libraries() -> None:
    """Import jax and all that commands share, which takes seconds.

    Ctrl-C meanwhile ends the process at once: libraries turn it into import errors of their own, or swallow it.
    """
    hears = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so in the background
    if hears:
        signal.signal(signal.SIGINT, _leave)
    from dvi_jax import api  # noqa: F401

    if hears:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED_STATUS)


def overview() -> str:
    """The help of `dvi` itself."""
    lines = [f"  {name:10}{command.description}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dvi COMMAND ...",
            "",
            "Llama inference made faster by self-speculative decoding, with no change to its output.",
            "",
            *lines,
            "",
            "dvi COMMAND --help says more; dvi --version gives the version.",
        ]
    )


def run() -> int:
    """The installed command."""
    return run_cli(main)


if __name__ == "__main__":
    sys.exit(run())
