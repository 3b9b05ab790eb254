"""Child process that renders one chat template under hard limits; started by `template.py`, never imported.

A template is a program from whoever made the checkpoint. Jinja's sandbox keeps it from Python's insides, but
not from `"x" * 10**9` or nested loops; only the operating system bounds those, so rendering has a process of
its own with little memory, no files to write, and a CPU time after which the kernel ends it.

Protocol: JSON lines. First line in: limits, source, special tokens. Then one request a line. Each line gets
one reply, {"text": ...} or {"error": ...}; a process that ends without a reply ran into a limit.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# All that a template's own expressions can raise, besides jinja's errors.
TEMPLATE_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    SyntaxError,  # more nested blocks than Python compiles
    TypeError,
    ValueError,
)

# What `strftime_now` shows, so that a prompt is the same every day: the date that Llama 3's own templates fall back to.
TODAY = datetime.datetime(2024, 7, 26)
# Hugging Face hands these to every template, so that "is defined" and "is none" are both true.
NOTHING = {"tools": None, "documents": None}


class TooMuchOutputError(jinja2.TemplateError):
    """The rendered text is longer than allowed."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what an assistant writes: here its inside is simply rendered.

    A block of its own, as in Hugging Face, so that what is set inside is not seen outside.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block between the tag and `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


def make_environment() -> jinja2.Environment:
    """The environment that Hugging Face templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    environment.filters["tojson"] = to_json
    return environment


def raise_exception(message: object) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(str(message))


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, with the arguments that Hugging Face's filter takes; jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def limit_process(memory_bytes: int) -> None:
    """From here on: so much memory, and nothing written to disk."""
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_FSIZE: 0}
    for kind, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # not every system has every limit
            resource.setrlimit(kind, (value, value))


def render(template: jinja2.Template, variables: dict[str, Any], max_chars: int) -> str:
    """The rendered text; raises `TooMuchOutputError` as soon as it is longer than `max_chars`."""
    pieces, length = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > max_chars:
            raise TooMuchOutputError(f"it writes more than {max_chars} characters")
    return "".join(pieces)


def reply(action: Callable[[], object], cpu_seconds: float) -> None:
    """Run `action` against the clock and write its result as one line."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF ends the process, also inside one long C call
    try:
        answer = {"text": action()}
    except (jinja2.TemplateError, *TEMPLATE_FAULTS) as error:
        answer = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Compile the template of the first line, then answer requests until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair; this one leaves with its stdin
    setup = json.loads(sys.stdin.readline())
    environment = make_environment()
    limit_process(setup["memory_bytes"])
    compiled: list[jinja2.Template] = []
    reply(lambda: compiled.append(environment.from_string(setup["source"])), setup["cpu_seconds"])
    for line in sys.stdin:

        def answer(request: str = line) -> str:
            variables: dict[str, Any] = {**NOTHING, **setup["tokens"], **json.loads(request)}
            return render(compiled[0], variables, setup["max_chars"])

        reply(answer, setup["cpu_seconds"])


if __name__ == "__main__":
    main()
