"""Command line of the server: python -m dvi_jax.serve --checkpoint CKPT [--port 8000] [--slots 8] ..."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dvi_jax.command_line import AUTO, add_loading_options, load_model
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, notice, run_cli
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.logs import set_up_logs
from dvi_jax.serve.settings import ServerSettings
from dvi_jax.settings import require

try:
    from dvi_jax.serve.app import create_app
    from dvi_jax.serve.running import address, bind, run
except ModuleNotFoundError as error:
    MISSING: str | None = f"the server needs {error.name}: pip install 'dvi_jax[serve]'"
else:
    MISSING = None

LOCAL = ("127.0.0.1", "::1", "localhost")
KEY_VARIABLE = "DVI_JAX_API_KEY"  # a command line can be read by everybody on a machine


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, load the model, serve until a signal says to end."""
    options = _parser().parse_args(arguments)
    if MISSING is not None:
        raise UserError(MISSING)
    require(0 <= options.logprobs <= 20, "--logprobs", options.logprobs, "between 0 and 20")
    settings = ServerSettings(
        model_name=options.model_name or Path(options.checkpoint).resolve().name,
        host=options.host,
        port=options.port,
        api_key=os.environ.get(KEY_VARIABLE) if options.api_key is None else options.api_key,
        max_queued=options.max_queued,
        drain_seconds=options.drain_seconds,
    )
    with bind(settings.host, settings.port) as listener:  # before the model is loaded, which takes a while
        if settings.api_key is None and settings.host not in LOCAL:
            notice(f"--host {settings.host} without --api-key: whoever reaches this machine may use the model")
        model = load_model(options)
        engine = Engine(
            model,
            slots=options.slots,
            context=options.context,
            plan=options.plan,
            max_waiting=settings.max_queued,
            logprobs=options.logprobs,
            warm_up=True,
        )
        print(engine.memory.describe(), file=sys.stderr)
        set_up_logs()
        print(f"serving {settings.model_name} at {address(listener)}/v1", file=sys.stderr)
        print(f"dashboard: {address(listener)}/dashboard", file=sys.stderr, flush=True)
        return run(create_app(engine, model.tokenizer, settings), listener)


def _parser() -> argparse.ArgumentParser:
    defaults = ServerSettings(model_name="model")
    parser = ArgumentParser(prog="python -m dvi_jax.serve", description="Serve a model behind OpenAI's HTTP API.")
    add_loading_options(parser)
    parser.add_argument("--plan", default=AUTO, metavar="PLAN", help="how rounds draft (default: auto, by load)")
    parser.add_argument("--slots", type=at_least_one, default=8, metavar="N", help="replies that run at once")
    parser.add_argument(
        "--context", type=at_least_one, default=2048, metavar="N", help="tokens of a request, reply included"
    )
    parser.add_argument(
        "--logprobs", type=int, default=0, metavar="N", help="most alternatives with log-probabilities (default: none)"
    )
    parser.add_argument("--host", default=defaults.host, help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=defaults.port, metavar="N", help="0 for any free one")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call it (default: the checkpoint's)")
    parser.add_argument("--api-key", metavar="KEY", help=f"that clients must send (better: {KEY_VARIABLE})")
    parser.add_argument(
        "--max-queued", type=int, default=defaults.max_queued, metavar="N", help="requests that may wait for a slot"
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=defaults.drain_seconds,
        metavar="S",
        help="how long running replies may take after SIGTERM",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
