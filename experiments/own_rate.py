"""What an engine serves without HTTP of what `experiments.load` asks: the rate that a server's is compared with.

    python -m experiments.own_rate --checkpoint CKPT --slots 16 --context 640 --data FILE --clients 32 --requests 2800

Each client is a thread that asks for its next reply when it has one; texts are tokenised beforehand and replies stay
token ids. With `--processes N`, the requests of `N` runs of `experiments.load` with the seeds 0 to N - 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
from collections.abc import Sequence

from dvi_jax.command_line import add_loading_options, load_model
from dvi_jax.data.conversations import Message
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.loading import LoadedModel
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.pace import SWITCH_SECONDS
from dvi_jax.serve.requests import Request
from experiments.load import make_requests


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask the requests as often as told, print a line each time."""
    options = _parse(arguments)
    if options.requests < options.processes:
        raise UserError(f"--requests {options.requests} is less than one for each of --processes {options.processes}")
    sys.setswitchinterval(SWITCH_SECONDS)
    model = load_model(options)
    requests = _requests(model, options)
    with Engine(model, slots=options.slots, context=options.context, plan=options.plan, warm_up=True) as engine:
        for _ in range(options.times):
            found = _ask(engine, requests, options.clients)
            if failure := engine.status().failure:
                raise UserError(failure)
            print(json.dumps(found), flush=True)
    return 0


def _requests(model: LoadedModel, options: argparse.Namespace) -> list[Request]:
    """Of all runs of `experiments.load`, by turns."""
    tokenizer = model.need_tokenizer("this checkpoint has no tokenizer, which conversations need")
    settings = argparse.Namespace(**vars(options), leave=0.0, temperature=0.0)
    settings.requests = options.requests // options.processes
    runs = []
    for seed in range(options.processes):
        settings.seed = seed
        runs.append([asked.body for asked in make_requests(settings)])
    requests = []
    for body in itertools.chain.from_iterable(zip(*runs, strict=True)):
        ids = tokenizer.chat([Message(message["role"], message["content"]) for message in body["messages"]])
        if len(ids) + body["max_tokens"] <= options.context:  # else a server refuses it
            requests.append(Request(tuple(ids), body["max_tokens"]))
    return requests


def _ask(engine: Engine, requests: Sequence[Request], clients: int) -> dict[str, float]:
    """Once all of them -> what came, and how fast."""
    waiting, lock, tokens = iter(requests), threading.Lock(), [0] * clients

    def next_request() -> Request | None:
        with lock:
            return next(waiting, None)

    def client(number: int) -> None:
        for request in iter(next_request, None):
            tokens[number] += len(engine.submit(request).whole().ids)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "tokens": sum(tokens),
        "tokens_per_second": sum(tokens) / seconds,
        "requests_per_second": len(requests) / seconds,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m experiments.own_rate", description=__doc__)
    add_loading_options(parser)
    parser.add_argument("--slots", type=at_least_one, default=16, metavar="N")
    parser.add_argument("--context", type=at_least_one, default=640, metavar="N")
    parser.add_argument("--plan", default="auto", metavar="PLAN")
    parser.add_argument("--clients", type=at_least_one, default=32, metavar="N")
    parser.add_argument("--processes", type=at_least_one, default=4, metavar="N", help="of the load that is matched")
    parser.add_argument("--requests", type=at_least_one, default=2800, metavar="N", help="of all processes")
    parser.add_argument("--max-tokens", type=at_least_one, default=128, metavar="N")
    parser.add_argument("--times", type=at_least_one, default=2, metavar="N", help="all requests so often")
    parser.add_argument("--data", metavar="FILE", help="conversations whose first questions are asked")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_cli(main))
