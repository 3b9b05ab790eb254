"""A server that learns from what it is asked: `make serve-demo` starts one, asks it questions, and compares.

    python -m experiments.serve_demo [--model DIR_OR_GGUF_OR_CKPT] [--data FILE] [--requests N] [--out DIR]

Without --model and --data it takes SmolLM2-135M-Instruct and ShareGPT (`experiments/fetch.py`). The drafter begins from
nothing; the dashboard, whose address is printed first, shows it getting better.
"""

from __future__ import annotations

import argparse
import itertools
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from dvi_jax.data.conversations import ConversationStream
from dvi_jax.errors import ArgumentParser, UserError, add_debug, at_least_one, run_cli
from experiments.domains import question_of
from experiments.fetch import fetch_conversations, fetch_model

PARTS = 6  # of the stream, one row of the table each
MOST_QUESTION_CHARS = 400
STARTING_SECONDS, ANSWER_SECONDS = 900, 300
DASHBOARD = re.compile(r"dashboard: (http://\S+)/dashboard")


@dataclass(frozen=True)
class Part:
    """What came of one part of the questions."""

    requests: int
    tokens: int
    rounds: int
    judged: int
    accepted: int
    updates: int  # of the drafter, so far


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, ask, and print the course of it."""
    options = parse(arguments)
    console = Console()
    model, data = options.model or fetch_model(), options.data or fetch_conversations()
    questions = list(itertools.islice(short_questions(str(data)), options.requests))
    if not questions:
        raise UserError(f"{data} holds no question of at most {MOST_QUESTION_CHARS} characters")
    command = [*(sys.executable, "-m", "dvi_jax.serve", "--checkpoint", str(model), "--dtype", options.dtype)]
    command += ["--slots", str(options.slots), "--context", "512", "--plan", options.plan, "--port", "0"]
    command += [
        "--drafter",
        options.drafter,
        "--learn",
        "--resume",
        "--learn-share",
        str(options.learn_share),
        "--out",
        options.out,
    ]
    console.print("starting the server; the first time, its programs are compiled for a minute or two")
    with serving(command) as url:
        console.print(f"open {url}/dashboard in a browser\n")
        parts = list(ask_all(url, questions, options, console))
    show(parts, console)
    console.print(f"what was learned lies in {options.out}; the same replies come with it or without")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(prog="python -m experiments.serve_demo", description=__doc__)
    parser.add_argument("--model", metavar="MODEL", help="directory, GGUF file or checkpoint (default: SmolLM2-135M)")
    parser.add_argument(
        "--data", metavar="FILE", help="conversations whose first questions are asked (default: ShareGPT)"
    )
    parser.add_argument("--requests", type=at_least_one, default=240, help="questions")
    parser.add_argument("--new-tokens", type=at_least_one, default=48, help="of a reply")
    parser.add_argument("--slots", type=at_least_one, default=4, help="replies at once")
    parser.add_argument("--plan", default="chain:2", help="how rounds draft")
    parser.add_argument("--drafter", default="fused", help="kind that begins from nothing")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--learn-share", type=float, default=0.3, help="of the time, for learning")
    parser.add_argument("--out", default="runs/serve-demo", metavar="DIR")
    add_debug(parser)
    return parser.parse_args(arguments)


def short_questions(data: str) -> Iterator[str]:
    """The first questions of the conversations that are not long."""
    questions = (question_of(conversation) for conversation in ConversationStream([data]))
    return (question for question in questions if 0 < len(question) <= MOST_QUESTION_CHARS)


@contextmanager
def serving(command: Sequence[str]) -> Iterator[str]:
    """A server process as long as the block runs: its address. It ends with SIGTERM, so that its drafter is kept."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    late = threading.Timer(STARTING_SECONDS, process.kill)
    late.start()
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := DASHBOARD.search(line):
                break
        else:
            raise UserError(f"the server did not start: {said[-1].strip() if said else 'it said nothing'}")
        late.cancel()
        rest = threading.Thread(target=process.stderr.read, daemon=True)  # its log must not fill the pipe
        rest.start()
        yield found.group(1)
    finally:
        late.cancel()
        process.send_signal(signal.SIGTERM)
        process.wait()


def ask_all(url: str, questions: Sequence[str], options: argparse.Namespace, console: Console) -> Iterator[Part]:
    """Ask part by part, as many questions at once as there are slots; one line a part as it ends."""
    size = -(-len(questions) // PARTS)
    with httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client, ThreadPoolExecutor(options.slots) as pool:

        def ask(question: str) -> None:
            messages = [{"role": "user", "content": question}]
            body = {"model": name, "messages": messages, "max_tokens": options.new_tokens, "temperature": 0}
            client.post("/v1/chat/completions", json=body).raise_for_status()

        name = client.get("/v1/models").json()["data"][0]["id"]
        before = counts(client)
        for begin in range(0, len(questions), size):
            asked = questions[begin : begin + size]
            try:
                list(pool.map(ask, asked))
            except httpx.HTTPError as error:
                raise UserError(f"the server failed after {begin} questions: {error}") from error
            now = counts(client)
            differences = {key: now[key] - before[key] for key in ("tokens", "rounds", "judged", "accepted")}
            part, before = Part(len(asked), updates=now["updates"], **differences), now
            console.print(
                f"{begin + len(asked)} questions: {part.tokens / part.rounds:.2f} tokens a round,"
                f" {part.updates} updates so far"
            )
            yield part


def counts(client: httpx.Client) -> dict[str, int]:
    """The counters of the server that only grow."""
    status: dict[str, Any] = client.get("/v1/dvi/status").json()
    engine = status["engine"]
    return {
        "tokens": engine["new_tokens"],
        "rounds": engine["rounds"],
        "judged": sum(engine["judged"]),
        "accepted": sum(engine["accepted"]),
        "updates": status["learning"]["updates"],
    }


def show(parts: Sequence[Part], console: Console) -> None:
    """The course as a table."""
    table = Table("questions", "drafts accepted", "tokens a round", "updates of the drafter")
    asked = 0
    for part in parts:
        share = f"{part.accepted / part.judged:.1%}" if part.judged else "none"
        span = f"{asked + 1} to {asked + part.requests}"
        table.add_row(span, share, f"{part.tokens / part.rounds:.2f}", str(part.updates))
        asked += part.requests
    console.print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
