"""Chat templates: from messages to text, rendered in a limited child process (see template_worker.py)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dvi_jax.data.conversations import Message
from dvi_jax.errors import UserError
from dvi_jax.tools import environment_of_child

WORKER = Path(__file__).with_name("template_worker.py")


class TemplateRefusedError(UserError):
    """The template refused these messages (or failed on them); other messages may pass."""


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may cost; far above any honest template."""

    max_source_chars: int = 200_000
    max_chars: int = 1_000_000
    cpu_seconds: float = 0.5
    memory_bytes: int = 512 << 20


class ChatTemplate:
    """A Hugging Face chat template (jinja2), compiled at its first use and rendered many times.

    `tokens` are the variables besides the messages, such as `bos_token`.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], limits: TemplateLimits | None = None):
        self.limits = limits or TemplateLimits()
        self._setup: dict[str, Any] = {
            "source": source,
            "tokens": dict(tokens),
            "max_chars": self.limits.max_chars,
            "cpu_seconds": self.limits.cpu_seconds,
            "memory_bytes": self.limits.memory_bytes,
        }
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process renders with a worker of its own."""
        return ChatTemplate, (self._setup["source"], self._setup["tokens"], self.limits)

    def fault(self) -> str | None:
        """What is wrong with the template, as the simplest conversation shows it; None if nothing is.

        A template may refuse that conversation, for want of a system message say, and still take others.
        """
        try:
            self.render([Message("user", "Hello")])
        except UserError as error:
            return str(error)
        return None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Raises `TemplateRefusedError` where the template fails on these messages, and `UserError` where it can be used
        for none: it does not compile, or the process that renders it cannot be started.
        """
        if sum(len(message.content) for message in messages) > self.limits.max_chars:
            raise TemplateRefusedError(f"the messages are longer than {self.limits.max_chars} characters")
        request = {
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        with self._lock:
            worker = self._worker or self._start()
            return self._ask(worker, request)

    def _start(self) -> subprocess.Popen[str]:
        if len(self._setup["source"]) > self.limits.max_source_chars:
            raise UserError(f"the chat template is longer than {self.limits.max_source_chars} characters")
        # -P and the explicit path: the worker finds this process's packages, not the modules beside it.
        try:
            worker = self._worker = subprocess.Popen(
                [sys.executable, "-P", "-B", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # whatever it dies of, our error is one line
                env=environment_of_child(),
                text=True,
                encoding="utf-8",
            )
        except (OSError, ValueError) as error:  # ValueError: an environment that cannot be handed on
            raise UserError(f"the chat template cannot be rendered: its process does not start ({error})") from error
        weakref.finalize(self, _stop, worker)
        try:
            self._ask(worker, self._setup)
        except TemplateRefusedError as error:
            _stop(worker)
            self._worker = None
            raise UserError(str(error)) from error
        return worker

    def _ask(self, worker: subprocess.Popen[str], request: dict[str, Any]) -> str:
        requests, answers = _pipes(worker)
        try:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line.endswith("\n") else {"error": self._ending(worker)}
        if "error" in answer:
            raise TemplateRefusedError(f"the chat template failed: {answer['error']}")
        return answer["text"]

    def _ending(self, worker: subprocess.Popen[str]) -> str:
        """Why the worker ended; the next rendering starts another."""
        self._worker = None
        _stop(worker)
        if worker.returncode == 1:  # what Python ends with after an error of its own
            return "its process failed (exit status 1)"
        seconds, mebibytes = self.limits.cpu_seconds, self.limits.memory_bytes >> 20
        return f"it ran over its limits of {seconds} s and {mebibytes} MiB (exit status {worker.returncode})"


def _pipes(worker: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    """Where it takes requests and where it answers: both were opened as pipes."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    return worker.stdin, worker.stdout


def _stop(worker: subprocess.Popen[str]) -> None:
    for pipe in _pipes(worker):
        with contextlib.suppress(BrokenPipeError):  # unsent bytes for a process that is gone
            pipe.close()
    worker.wait()
