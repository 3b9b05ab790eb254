"""Lossless self-speculative Llama decoding that learns from its own accept/reject decisions.

Decode      load, generate_batch, Stream, DecodeConfig, SamplingConfig, Generation, LoadedModel
One round   decode_round
Adapters    inject_dual_lora
Serve       Engine, Request
Learn       train_online, train_offline, TrainConfig, DistillConfig, load_train_config
"""

from dvi_jax.config import DecodeConfig, DistillConfig, SamplingConfig, TrainConfig, load_train_config
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

__all__ = [
    "DecodeConfig",
    "DistillConfig",
    "Engine",
    "Generation",
    "LoadedModel",
    "Request",
    "SamplingConfig",
    "Stream",
    "TrainConfig",
    "UserError",
    "decode_round",
    "generate_batch",
    "inject_dual_lora",
    "load",
    "load_train_config",
    "train_offline",
    "train_online",
]
