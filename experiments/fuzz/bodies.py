"""`python -m experiments.fuzz.bodies --url http://127.0.0.1:8000`: damaged and invented requests to a running server.

A case passes if the answer is a reply or an error in OpenAI's shape, below 500 or "try again later", and comes in time.
A failure is printed with the number that brings it back: `--seed S --first N --cases 1`.
"""

from __future__ import annotations

import collections
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli
from experiments.fuzz.mutate import TEXT_WORDS

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
SECONDS = 30.0  # within which an answer must come
BUSY = 503
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}],
        "max_completion_tokens": 3,
    },
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 3},
    "/tokenize": {"prompt": "Once upon a time"},
    "/detokenize": {"tokens": [5, 6, 7]},
}
FIELDS: tuple[str, ...] = (
    *("model", "messages", "prompt", "tokens", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
    *("min_p", "repetition_penalty", "n", "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs"),
    *(
        "ignore_eos",
        "store",
        "user",
        "tools",
        "response_format",
        "logit_bias",
        "frequency_penalty",
        "best_of",
        "\u2603",
    ),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e-300, 1e300, 2**31, 2**32, 2**63, -(2**63), 2**64, 10**400),
    *(
        "",
        "a",
        "\x00",
        "\u2603",
        "tiny",
        "none",
        "x" * 3000,
        [],
        {},
        [[]],
        [{}],
        [""],
        ["a", "b"],
        [1, 2],
        [[5, 6], [7]],
    ),
    *([-1], [10**9], [2**70], [None], ["a", 1], {"include_usage": True}, {"type": "text"}, {"": {}}),
    *([{"role": "user"}], [{"role": "user", "content": None}], [{"role": "tool", "content": "x"}]),
    *([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], [{"role": "user", "content": [{"type": "x"}]}]),
)


@dataclass(frozen=True)
class Case:
    """One request."""

    path: str
    content: bytes
    headers: dict[str, str]


def cases(seed: int, first: int, count: int) -> Iterator[Case]:
    """Case number N of a seed is always the same."""
    for number in range(first, first + count):
        yield make_case(random.Random(f"{seed} {number}"))


def make_case(rng: random.Random) -> Case:
    """A good body with some fields changed, sometimes damaged as text too."""
    path = rng.choice(PATHS)
    body = dict(GOOD[path])
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    text = json.dumps(body).encode()
    if rng.random() < 0.4:
        text = damaged(text, rng)
    kind = rng.choice(("application/json",) * 9 + ("text/plain",))
    return Case(path, text, {"content-type": kind})


def damaged(text: bytes, rng: random.Random) -> bytes:
    """Pieces cut out, put in or put twice."""
    for _ in range(rng.choice((1, 1, 3))):
        start = rng.randrange(len(text) + 1)
        end = min(start + rng.choice((0, 1, 1, 5, 40)), len(text))
        middle = rng.choice((b"", rng.choice(TEXT_WORDS), rng.randbytes(3), text[start:end] * 2))
        text = text[:start] + middle + text[end:]
    return text


def fault(answer: httpx.Response) -> str | None:
    """What is wrong with an answer, None if nothing is."""
    if answer.status_code >= 500 and not (answer.status_code == BUSY and answer.headers.get("retry-after")):
        return f"status {answer.status_code}"
    if answer.status_code != 200:
        error = answer.json().get("error", {})
        return None if set(error) == {"message", "type", "param", "code"} and error["message"] else "no error object"
    if answer.headers["content-type"].startswith("text/event-stream"):
        last = answer.text.rstrip().rpartition("\n\n")[2]
        return None if last == "data: [DONE]" or '"error"' in last else "a stream without an end"
    return None if isinstance(answer.json(), dict) else "not an object"


def main() -> int:
    """Send the cases one after the other; exit status 1 if one fails."""
    parser = ArgumentParser(prog="python -m experiments.fuzz.bodies", description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    add_debug(parser)
    options = parser.parse_args()
    statuses: collections.Counter[int] = collections.Counter()
    failures, slowest = 0, 0.0
    with httpx.Client(base_url=options.url, timeout=SECONDS) as client:
        for number, case in enumerate(cases(options.seed, options.first, options.cases), options.first):
            try:
                answer = client.post(case.path, content=case.content, headers=case.headers)
            except httpx.TimeoutException:
                problem: str | None = f"no answer within {SECONDS:g} s"
            except httpx.ConnectError as error:
                raise UserError(f"no server at {options.url}: {error}") from error
            else:
                statuses[answer.status_code] += 1
                slowest, problem = max(slowest, answer.elapsed.total_seconds()), fault(answer)
            if problem is not None:
                failures += 1
                print(f"case {number}: {problem}: {case.path} {case.content[:300]!r}", flush=True)
    counts = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
    print(f"{options.cases} cases, {failures} failed; answers {counts}; the slowest took {1e3 * slowest:.0f} ms")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
