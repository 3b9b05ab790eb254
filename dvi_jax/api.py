"""The names that users import from `dvi_jax`, which gets them from here when the first one is asked for."""

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
    "decode_round",
    "generate_batch",
    "generate_text",
    "inject_dual_lora",
    "load",
    "load_train_config",
    "train_offline",
    "train_online",
]
