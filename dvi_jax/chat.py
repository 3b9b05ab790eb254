"""Command line of a conversation in the terminal: python -m dvi_jax.chat --checkpoint CKPT [--system TEXT]

A line is a message. `/reset` forgets the conversation, `/system TEXT` begins a new one with another system prompt,
`/help` lists the commands, `/exit` or Ctrl-D leaves; Ctrl-C ends a reply that is under way.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import FrameType

from dvi_jax.command_line import (
    AUTO,
    add_drafting_options,
    add_sampling_options,
    decode_settings,
    load_model,
    sampling_settings,
    settings_for,
)
from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.data.conversations import Message
from dvi_jax.decode.agreement import check_agreement
from dvi_jax.decode.batch import check_prompts, choose_plan
from dvi_jax.decode.choosing import PlanChooser
from dvi_jax.decode.plan import Option
from dvi_jax.decode.stream import Stream
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, one_line, run_cli
from dvi_jax.loading import LoadedModel

PROMPT = "> "
NEW_TOKENS = 512  # of a reply, unless asked otherwise
EVERY = 2  # rounds between two pieces: text is seen soon
HELP = "/reset forgets the conversation, /system TEXT also changes the system prompt, /exit leaves; Ctrl-C ends a reply"


@dataclass
class Conversation:
    """What was said so far, and how replies are decoded."""

    model: LoadedModel
    settings: DecodeConfig
    sampling: SamplingConfig | None
    stop: tuple[str, ...]
    system: str | None
    chooser: PlanChooser | None = None
    messages: list[Message] = field(default_factory=list)
    turns: int = 0  # replies so far, also of conversations that were forgotten: each samples with a seed of its own

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages = []

    def reply(self, text: str) -> str:
        """Reply to a message, printed as it comes; one line of figures. Raises `UserError` where it does not fit."""
        asked = [*self.messages, Message("user", text)]
        tokenizer = self.model.need_tokenizer("this checkpoint has no tokenizer, which a conversation needs")
        ids = tokenizer.chat(asked, system=self.system)
        check_prompts(self.model, [ids], 1)
        room = self.model.config.context_length - len(ids)
        settings = replace(self.settings, max_new_tokens=min(self.settings.max_new_tokens, room))
        option = self._option(settings)
        answer, count = "", 0
        began = first = time.perf_counter()
        with interrupts() as interrupted:
            stream = Stream(
                self.model,
                [ids],
                option.settings(settings),
                sampling=self.sampling and replace(self.sampling, seed=(self.sampling.seed + self.turns) % 2**32),
                stop=self.stop,
                every=EVERY,
            )
            for pieces in () if interrupted.is_set() else stream:  # asking for the first one may compile rounds
                if interrupted.is_set():
                    break
                for piece in pieces:
                    first = first if count else time.perf_counter()
                    answer, count = answer + piece.text, count + len(piece.ids)
                    print(piece.text, end="", flush=True)
        print(" [ended]" if interrupted.is_set() else "")
        if answer or not interrupted.is_set():
            self.messages = [*asked, Message("assistant", answer)]
        self.turns += 1
        self._tell(stream, option, count, first - began, time.perf_counter() - first)
        return answer

    def _option(self, settings: DecodeConfig) -> Option:
        """How this reply drafts."""
        if self.chooser is not None:
            return self.chooser.begin()
        return Option(choose_plan(self.model, settings), settings.width)

    def _tell(self, stream: Stream, option: Option, tokens: int, waited: float, seconds: float) -> None:
        """Figures of a reply, on stderr: what is piped out is the conversation alone."""
        figures = [f"{tokens} tokens", f"the first after {waited:.1f} s"]
        if seconds > 0 and tokens > 1:
            figures.append(f"then {(tokens - 1) / seconds:.1f} tokens/s")
        for generation in stream.generations:
            if generation.rounds:
                per_round = sum(generation.accept_lengths) / generation.rounds
                figures.append(f"{per_round:.2f} tokens a round by {option.plan}")
            if self.chooser is not None:
                self.chooser.note(option.plan, generation.accept_lengths, generation.drafted)
        print(f"({', '.join(figures)})", file=sys.stderr)


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Whether Ctrl-C was typed, which raises nothing meanwhile; a second one raises `KeyboardInterrupt`.

    Raised anywhere it might be lost: Python passes over what is raised in a callback, such as a library's at a garbage
    collection.
    """
    typed = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if typed.is_set():
            raise KeyboardInterrupt
        typed.set()

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield typed  # somebody else hears it
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield typed
    finally:
        signal.signal(signal.SIGINT, before)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, load the model, and reply until there is nothing more to reply to."""
    options = _parser().parse_args(arguments)
    decode_settings(options)
    sampling = sampling_settings(options)
    model = load_model(options)
    tokenizer = model.need_tokenizer("this checkpoint has no tokenizer, which a conversation needs")
    settings = settings_for(model, options)
    talk = Conversation(model, settings, sampling, tuple(options.stop), options.system)
    if options.plan != AUTO:
        check_agreement(model, settings)
    else:
        talk.chooser = PlanChooser.measured(model, settings, tokenizer.chat([Message("user", "Hello.")]))
    print(f"{model.manifest.source}, drafter {model.manifest.drafter}. {HELP}", file=sys.stderr)
    while (line := read_line()) is not None:
        if not line:
            continue
        if line in ("/exit", "/quit"):
            break
        obey_or_reply(talk, line)
    return 0


def obey_or_reply(talk: Conversation, line: str) -> None:
    """One line of the user's: a command, or a message. What cannot be is said, and the conversation goes on."""
    command, _, rest = line.partition(" ")
    if command == "/reset":
        talk.reset()
        print("(forgotten)", file=sys.stderr)
    elif command == "/system":
        talk.system = rest or None
        talk.reset()
        print("(a new conversation)", file=sys.stderr)
    elif command.startswith("/") and "/" not in command[1:]:
        print(f"({HELP})" if command == "/help" else f"(there is no {command}: {HELP})", file=sys.stderr)
    else:
        try:
            talk.reply(line)
        except KeyboardInterrupt:  # a second one, or one before the reply began: the message is forgotten
            print(" [ended]")
        except UserError as error:
            print(f"({one_line(str(error))}; /reset begins anew)", file=sys.stderr)


def read_line() -> str | None:
    """The next line without blanks around it; None at the end of the input. Ctrl-C there leaves too."""
    try:
        return input(PROMPT if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        return None


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m dvi_jax.chat", description="Talk to a model in the terminal.", epilog=HELP)
    add_drafting_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, default=NEW_TOKENS, metavar="N", help="longest reply, in tokens"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end a reply at this text; may be repeated"
    )
    add_sampling_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
