"""Lossless self-speculative Llama decoding that learns from its own accept/reject decisions.

Decode      load, generate, Stream, DecodeConfig, SamplingConfig, Generation, LoadedModel
One round   decode_round
Adapters    inject_dual_lora
Learn       train, TrainConfig, load_train_config
"""

from dvi_jax.config import DecodeConfig, SamplingConfig, TrainConfig, load_train_config
from dvi_jax.decode.generate import Generation, generate
from dvi_jax.decode.speculative import decode_round
from dvi_jax.decode.stream import Stream
from dvi_jax.errors import UserError
from dvi_jax.learn.online import train
from dvi_jax.load import LoadedModel, load
from dvi_jax.model.lora import inject_dual_lora

__all__ = [
    "DecodeConfig",
    "Generation",
    "LoadedModel",
    "SamplingConfig",
    "Stream",
    "TrainConfig",
    "UserError",
    "decode_round",
    "generate",
    "inject_dual_lora",
    "load",
    "load_train_config",
    "train",
]
