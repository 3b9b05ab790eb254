"""Load on a running server, over HTTP: how much it serves, how soon, and whether company changes a reply.

    python -m experiments.load --url http://127.0.0.1:8000 --clients 32 --requests 500          # closed loop
    python -m experiments.load --url http://127.0.0.1:8000 --rate 4 --requests 500              # Poisson arrivals

Prompts are the first questions of `--data` (ShareGPT and the like), else invented ones. All requests stream. With
`--leave`, that share of the clients goes away in the middle of its reply; with `--check`, so many of the finished
requests are sent once more alone at the end, and the texts must be equal (exit status 1 if one is not).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from dvi_jax.data.conversations import ConversationStream
from dvi_jax.errors import ArgumentParser, UserError, add_debug, at_least_one, run_cli
from experiments.measure import settings_of, write_result
from experiments.tiny import WORDS

DIFFERENT = 1  # exit status when a reply depends on company
MOST_PROMPT_CHARS = 1500  # longer questions are left out


@dataclass
class Asked:
    """A request and what came of it; times are `time.perf_counter` seconds."""

    body: dict[str, Any]
    leave_after: int | None  # pieces of the reply after which the client goes away
    sent: float = 0.0
    first: float = 0.0  # first piece of text
    last: float = 0.0  # newest one
    gaps: list[float] = field(default_factory=list)  # seconds between pieces
    outcome: str = "lost"  # "finished", "left", a status such as "503", "error" or "timeout"
    text: str = ""
    tokens: int = 0  # of a finished reply


def main() -> int:
    """Send the load, print a table, write the result."""
    options = parse()
    if (options.clients is None) == (options.rate is None):
        raise UserError("choose one: --clients N (closed loop) or --rate R (Poisson arrivals)")
    requests = make_requests(options)
    try:
        seconds, different, checked = asyncio.run(run(requests, options))
    except httpx.ConnectError as error:
        raise UserError(f"no server answers at {options.url}: start one with python -m dvi_jax.serve") from error
    result = {"settings": settings_of(options), "seconds": seconds, **summary(requests, seconds)}
    result |= {"checked": checked, "different": different}
    print("\n".join(f"{name:24} {value}" for name, value in table(result)))
    if options.out:
        write_result(Path(options.out), result)
    return DIFFERENT if different else 0


def make_requests(options: argparse.Namespace) -> list[Asked]:
    """The same ones for the same options: questions, limits, seeds, and who leaves when."""
    rng = random.Random(options.seed)
    questions = read_questions(options.data) if options.data else invented_questions(rng)
    requests = []
    for number in range(options.requests):
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": questions[number % len(questions)]}],
            "max_tokens": rng.randint(max(options.max_tokens // 2, 1), options.max_tokens),
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.temperature:
            body["seed"] = number
        leaves = rng.random() < options.leave
        requests.append(Asked(body, rng.randint(1, 20) if leaves else None))
    return requests


def read_questions(path: str) -> list[str]:
    """First questions of conversations, up to a thousand."""
    first = (conversation.messages for conversation in ConversationStream(path))
    found = (next((m.content for m in messages if m.role == "user"), "") for messages in first)
    return list(itertools.islice((text for text in found if 0 < len(text) <= MOST_PROMPT_CHARS), 1000))


def invented_questions(rng: random.Random) -> list[str]:
    """A hundred, of several lengths; many begin alike."""
    return [f"Tell me of {' and '.join(rng.choices(WORDS, k=rng.randint(1, 6)))}." for _ in range(100)]


async def run(requests: Sequence[Asked], options: argparse.Namespace) -> tuple[float, int, int]:
    """Send all; the seconds that took, how many of the checked replies were different, and how many were checked."""
    headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(
        base_url=options.url, headers=headers, timeout=options.timeout, limits=limits
    ) as client:
        (await client.get("/v1/models")).raise_for_status()
        began = time.perf_counter()
        if options.clients is not None:
            await closed_loop(client, requests, options.clients)
        else:
            await open_loop(client, requests, options.rate, random.Random(options.seed + 1))
        seconds = time.perf_counter() - began
        finished = [asked for asked in requests if asked.outcome == "finished"]
        chosen = random.Random(options.seed + 2).sample(finished, min(options.check, len(finished)))
        different = 0
        for asked in chosen:
            again = Asked(asked.body, None)
            await send(client, again)
            different += again.text != asked.text
    return seconds, different, len(chosen)


async def closed_loop(client: httpx.AsyncClient, requests: Sequence[Asked], clients: int) -> None:
    """So many clients, each sending its next request when the one before has ended."""
    waiting = iter(requests)

    async def one_client() -> None:
        for asked in waiting:
            await send(client, asked)

    await asyncio.gather(*(one_client() for _ in range(clients)))


async def open_loop(client: httpx.AsyncClient, requests: Sequence[Asked], rate: float, rng: random.Random) -> None:
    """`rate` requests a second on average, with exponential times between them, whatever becomes of them."""
    loop, due, tasks = asyncio.get_running_loop(), time.perf_counter(), []
    for asked in requests:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        tasks.append(loop.create_task(send(client, asked)))
    await asyncio.gather(*tasks)


async def send(client: httpx.AsyncClient, asked: Asked) -> None:
    """Send one request and read its reply, or a part of it."""
    asked.sent = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=asked.body) as answer:
            if answer.status_code != 200:
                asked.outcome = str(answer.status_code)
                await answer.aread()
                return
            await read(answer, asked)
    except httpx.TimeoutException:
        asked.outcome = "timeout"
    except httpx.TransportError:
        asked.outcome = "error"


async def read(answer: httpx.Response, asked: Asked) -> None:
    """Take in the events of one reply."""
    pieces = 0
    async for line in answer.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            asked.outcome = "finished"
            return
        event = json.loads(line[6:])
        if "error" in event:
            asked.outcome = "error"
            return
        asked.tokens = (event.get("usage") or {}).get("completion_tokens", 0)
        text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if not text:
            continue
        now = time.perf_counter()
        if asked.first:
            asked.gaps.append(now - asked.last)
        asked.first, asked.last = asked.first or now, now
        asked.text, pieces = asked.text + text, pieces + 1
        if pieces == asked.leave_after:
            asked.outcome = "left"
            return
    asked.outcome = "error"


def summary(requests: Sequence[Asked], seconds: float) -> dict[str, Any]:
    """Counts and percentiles; tokens are those of finished replies."""
    finished = [asked for asked in requests if asked.outcome == "finished"]
    long = [asked for asked in finished if asked.tokens > 1]
    return {
        "outcomes": dict(sorted(Counter(asked.outcome for asked in requests).items())),
        "tokens": sum(asked.tokens for asked in finished),
        "tokens_per_second": sum(asked.tokens for asked in finished) / seconds,
        "requests_per_second": len(finished) / seconds,
        "first_token_seconds": percentiles([asked.first - asked.sent for asked in requests if asked.first]),
        "inter_token_seconds": percentiles([(asked.last - asked.first) / (asked.tokens - 1) for asked in long]),
        "between_pieces_seconds": percentiles([gap for asked in requests for gap in asked.gaps]),
        "whole_reply_seconds": percentiles([asked.last - asked.sent for asked in finished]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 99th percentile and greatest; None of nothing."""
    if not values:
        return None
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": float(p50), "p99": float(p99), "max": float(max(values))}


def table(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines to print."""
    rows = [
        ("outcomes", ", ".join(f"{name}: {count}" for name, count in result["outcomes"].items())),
        ("tokens per second", f"{result['tokens_per_second']:.1f} ({result['tokens']} in {result['seconds']:.1f} s)"),
        ("replies per second", f"{result['requests_per_second']:.2f}"),
    ]
    for name in ("first_token_seconds", "inter_token_seconds", "between_pieces_seconds", "whole_reply_seconds"):
        values = result[name]
        shown = ", ".join(f"{key} {1e3 * value:.1f}" for key, value in values.items()) if values else "-"
        rows.append((name.removesuffix("_seconds").replace("_", " ") + ", ms", shown))
    if result["checked"]:
        rows.append(("sent again alone", f"{result['checked']}, of which {result['different']} were different"))
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(prog="python -m experiments.load", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", metavar="KEY")
    parser.add_argument("--requests", type=at_least_one, default=100, metavar="N")
    parser.add_argument("--clients", type=at_least_one, metavar="N", help="closed loop: so many at a time")
    parser.add_argument("--rate", type=float, metavar="R", help="open loop: Poisson arrivals a second")
    parser.add_argument("--data", metavar="FILE", help="conversations whose first questions are asked")
    parser.add_argument(
        "--max-tokens", type=at_least_one, default=128, metavar="N", help="limits are half to all of it"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--leave", type=float, default=0.0, metavar="SHARE", help="of the clients, in mid-reply")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="replies to compare with the same ones alone")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="without a byte from the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="FILE.json")
    add_debug(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_cli(main))
