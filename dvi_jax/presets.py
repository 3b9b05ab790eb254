"""Ready-made architectures: a tiny one for tests, published shapes for speed measurements with random weights."""

from __future__ import annotations

from dvi_jax.config import LlamaConfig

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
)


def _shape(
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    vocab: int = 32000,
    *,
    num_kv_heads: int | None = None,
    rope_theta: float = 10000.0,
    tie_word_embeddings: bool = False,
    model_type: str = "llama",
) -> LlamaConfig:
    """A shape with as many key/value heads as query heads unless given."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=num_kv_heads or heads,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=rope_theta,
        tie_word_embeddings=tie_word_embeddings,
        model_type=model_type,
    )


SHAPES = {
    "tiny": TINY,
    "smollm2": _shape(576, 1536, 30, 9, 49152, num_kv_heads=3, rope_theta=100000.0, tie_word_embeddings=True),
    "1b": _shape(2048, 5632, 22, 32, num_kv_heads=4),  # TinyLlama 1.1B
    # Qwen2.5-Coder-1.5B, whose input and output embeddings stand apart in the file that is measured
    "1.5b": _shape(1536, 8960, 28, 12, 151936, num_kv_heads=2, rope_theta=1e6, model_type="qwen2"),
    "7b": _shape(4096, 11008, 32, 32),
    "13b": _shape(5120, 13824, 40, 40),
    "70b": _shape(8192, 28672, 80, 64, num_kv_heads=8),
}
