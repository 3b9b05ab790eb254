"""Lossless self-speculative Llama decoding that learns from its own accept/reject decisions.

Texts       load, generate_text, Completion, Message
Token ids   generate_batch, Stream, DecodeConfig, SamplingConfig, Generation, LoadedModel
One round   decode_round
Adapters    inject_dual_lora
Serve       Engine, Request
Learn       train_online, train_offline, TrainConfig, DistillConfig, load_train_config
"""

from dvi_jax import supported as supported
from dvi_jax.config import DecodeConfig, DistillConfig, SamplingConfig, TrainConfig, load_train_config
from dvi_jax.data.conversations import Message
from dvi_jax.decode.batch import Generation, generate_batch
from dvi_jax.decode.speculative import decode_round
from dvi_jax.decode.stream import Stream
from dvi_jax.errors import UserError
from dvi_jax.learn.offline import train_offline
from dvi_jax.learn.online import train_online
from dvi_jax.loading import LoadedModel, load
from dvi_jax.model.lora import inject_dual_lora
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.requests import Request
from dvi_jax.texts import Completion, generate_text
from dvi_jax.version import __version__

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
