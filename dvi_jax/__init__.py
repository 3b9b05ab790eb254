"""Lossless self-speculative Llama decoding that learns from its own accept/reject decisions.

Texts       load, generate_text, Completion, Message
Token ids   generate_batch, Stream, DecodeConfig, SamplingConfig, Generation, LoadedModel
One round   decode_round
Adapters    inject_dual_lora
Serve       Engine, Request
Learn       train_online, train_offline, TrainConfig, DistillConfig, load_train_config
"""

from typing import TYPE_CHECKING, Any

from dvi_jax import supported as supported
from dvi_jax.version import __version__

if TYPE_CHECKING:
    from dvi_jax.api import (
        Completion,
        DecodeConfig,
        DistillConfig,
        Engine,
        Generation,
        LoadedModel,
        Message,
        Request,
        SamplingConfig,
        Stream,
        TrainConfig,
        UserError,
        decode_round,
        generate_batch,
        generate_text,
        inject_dual_lora,
        load,
        load_train_config,
        train_offline,
        train_online,
    )

__all__ = [
    "Completion",
    "DecodeConfig",
    "DistillConfig",
    "Engine",
    "Generation",
    "LoadedModel",
    "Message",
    "Request",
    "SamplingConfig",
    "Stream",
    "TrainConfig",
    "UserError",
    "__version__",
    "decode_round",
    "generate_batch",
    "generate_text",
    "inject_dual_lora",
    "load",
    "load_train_config",
    "train_offline",
    "train_online",
]


def __getattr__(name: str) -> Any:
    """A public name. All come with the first: the command `dvi` answers, and hears Ctrl-C, before jax is there."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dvi_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
