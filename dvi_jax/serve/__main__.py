"""Command line of the server: python -m dvi_jax.serve --checkpoint CKPT [--port 8000] [--slots 8] [--learn] ..."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from dvi_jax.command_line import AUTO, add_loading_options, add_mesh_option, load_model
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, notice, run_cli
from dvi_jax.loading import LoadedModel
from dvi_jax.model.drafters import DRAFTERS
from dvi_jax.processes import add_process_options, is_first, one_of_several
from dvi_jax.serve.desk import Desk
from dvi_jax.serve.engine import Engine, Learns
from dvi_jax.serve.learn_settings import LearnSettings
from dvi_jax.serve.learning_run import LearningRun, load_to_learn
from dvi_jax.serve.logs import say, set_up_logs
from dvi_jax.serve.settings import ServerSettings
from dvi_jax.settings import require

try:
    import dvi_jax.serve.front  # noqa: F401, what the HTTP process needs
    from dvi_jax.serve.front_process import LEARNED, Beginning, FrontProcess
    from dvi_jax.serve.running import address, bind, settled
except ModuleNotFoundError as error:
    MISSING: str | None = f"the server needs {error.name}: pip install 'dvi-jax[serve]'"
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
    learn = _learn_settings(options)
    if options.coordinator is not None and options.mesh is None:
        raise UserError("several processes serve on one mesh of all their devices: add --mesh data=N,model=M")
    with one_of_several(options):
        return _serve(options, settings, learn) if is_first() else _follow(options)


def _serve(options: argparse.Namespace, settings: ServerSettings, learn: LearnSettings | None) -> int:
    """Serve until a signal says to end; the exit status."""
    with ExitStack() as stack:
        # Before the model is loaded, which takes a while.
        listener = stack.enter_context(bind(settings.host, settings.port))
        if settings.api_key is None and settings.host not in LOCAL:
            notice(f"--host {settings.host} without --api-key: whoever reaches this machine may use the model")
        url = address(listener)
        front = stack.enter_context(FrontProcess(listener))
        learning = None if learn is None else _start_learning(options, learn, stack)
        model = load_model(options) if learning is None else learning.model
        learner = None if learning is None else learning.learner
        engine = _engine(model, options, max_waiting=settings.max_queued, learner=learner)
        print(engine.memory.describe(), file=sys.stderr)
        stack.callback(engine.close)  # before the run is left
        desk = Desk(engine, front.link, _sections(learning))
        several = jax.process_count() > 1
        beginning = Beginning(settings, model.tokenizer, *desk.state(), ends_with_engine=several)
        set_up_logs()
        settled()
        print(f"serving {settings.model_name} at {url}/v1", file=sys.stderr)
        print(f"dashboard: {url}/dashboard", file=sys.stderr, flush=True)
        status = front.run(desk, beginning)
        if status and (failure := engine.status().failure):
            raise UserError(failure)
        return status


def _sections(learning: LearningRun | None) -> dict[str, Callable[[], Any]]:
    """What the HTTP process is told of learning."""
    return {} if learning is None else {"learning": learning.section, LEARNED: lambda: learning.learner.status}


def _follow(options: argparse.Namespace) -> int:
    """As another process than the first: run what its engine runs, until it ends."""
    with _engine(load_model(options), options, max_waiting=1, learner=None) as engine:
        engine.follow()
    return 0


def _engine(model: LoadedModel, options: argparse.Namespace, *, max_waiting: int, learner: Learns | None) -> Engine:
    return Engine(
        model,
        slots=options.slots,
        context=options.context,
        plan=options.plan,
        together=options.together,
        max_waiting=max_waiting,
        logprobs=options.logprobs,
        warm_up=True,
        learner=learner,
    )


def _learn_settings(options: argparse.Namespace) -> LearnSettings | None:
    """How to learn, None for not at all; `UserError` for options that say both."""
    if not options.learn:
        usual = LearnSettings()
        given = {
            "--out": options.out,
            "--resume": options.resume,
            "--drafter": options.drafter,
            "--learn-share": options.learn_share != usual.share,
            "--learn-branches": options.learn_branches != usual.branches,
            "--save-seconds": options.save_seconds != usual.save_seconds,
        }
        for name in (name for name, value in given.items() if value):
            raise UserError(f"{name} is of a server that learns: add --learn, or leave it out")
        return None
    if options.out is None:
        raise UserError("--learn needs --out DIR, where what was learned is kept")
    if options.mesh is not None:
        raise UserError("--learn takes one device: leave out --mesh, or learn beforehand with train")
    if options.coordinator is not None:
        raise UserError("--learn takes one process: leave out --coordinator, or learn beforehand with train")
    return LearnSettings(share=options.learn_share, branches=options.learn_branches, save_seconds=options.save_seconds)


def _start_learning(options: argparse.Namespace, settings: LearnSettings, stack: ExitStack) -> LearningRun:
    """What the engine's learner belongs to; it ends with the stack."""
    checkpoint, model = load_to_learn(options)
    learning = LearningRun(
        checkpoint, model, settings, options.out, context=options.context, resume=options.resume, report=_tell
    )
    stack.callback(_tell_of_drafter, learning)
    return stack.enter_context(learning)


def _tell(kind: str, record: dict[str, Any]) -> None:
    """Records of learning that somebody should see at once, into the log."""
    if kind not in ("update", "held", "summary"):
        say(f"learning: {kind}", logging.INFO if kind in ("resume", "solved") else logging.WARNING, **record)


def _tell_of_drafter(learning: LearningRun) -> None:
    if learning.drafter is not None:
        notice(f"the drafter that was learned: --drafter-from {learning.drafter}")


def _parser() -> argparse.ArgumentParser:
    defaults = ServerSettings(model_name="model")
    parser = ArgumentParser(prog="python -m dvi_jax.serve", description="Serve a model behind OpenAI's HTTP API.")
    add_loading_options(parser)
    add_mesh_option(parser)
    add_process_options(parser)
    parser.add_argument(
        "--plan",
        default=AUTO,
        metavar="PLAN",
        help="how rounds draft: auto (by slots and acceptance), plain, chain:N, block:N, tree:ROWS[xLEVELS] or"
        " early-exit:N",
    )
    parser.add_argument("--slots", type=at_least_one, default=8, metavar="N", help="replies that run at once")
    parser.add_argument(
        "--context", type=at_least_one, default=2048, metavar="N", help="tokens of a request, reply included"
    )
    parser.add_argument(
        "--together",
        type=at_least_one,
        default=1,
        metavar="N",
        help="prompts taken in side by side; above 1 no beginnings are shared",
    )
    parser.add_argument(
        "--logprobs",
        type=int,
        default=0,
        metavar="N",
        help="most alternatives a token with log-probabilities; 0 for none",
    )
    parser.add_argument(
        "--host", default=defaults.host, help="address to listen on; the default is for this machine only"
    )
    parser.add_argument("--port", type=int, default=defaults.port, metavar="N", help="port; 0 for any free one")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call it (default: the checkpoint's)")
    parser.add_argument("--api-key", metavar="KEY", help=f"key that clients must send (better: {KEY_VARIABLE})")
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
    _add_learning_options(parser)
    return parser


def _add_learning_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("learning while serving (docs/serving.md)")
    group.add_argument(
        "--learn", action="store_true", help="train the drafter on replies, except those with store: false"
    )
    group.add_argument("--out", metavar="DIR", help="directory of the run: snapshots, metrics, the drafter at the end")
    group.add_argument("--resume", action="store_true", help="go on with what was learned there, if anything was")
    group.add_argument(
        "--learn-share",
        type=float,
        default=LearnSettings.share,
        metavar="X",
        help="most of the device's time for learning while there are requests",
    )
    group.add_argument(
        "--learn-branches",
        type=int,
        default=LearnSettings.branches,
        metavar="N",
        help="learn from so many drafts of a reply that were not taken, too",
    )
    group.add_argument(
        "--save-seconds",
        type=float,
        default=LearnSettings.save_seconds,
        metavar="S",
        help="between two snapshots",
    )
    group.add_argument(
        "--drafter",
        metavar="KIND",
        help=f"begin with an untrained one: {', '.join(sorted(DRAFTERS))}; of another kind than the checkpoint's, it"
        " has an exit layer only if it needs one or --exit-layer names one",
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
