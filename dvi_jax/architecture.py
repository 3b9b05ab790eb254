"""What a model is: its sizes, its rotary positions, its special tokens. A checkpoint's `config.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dvi_jax.settings import FLOAT32, from_dict, require, require_count


@dataclass(frozen=True)
class RopeScaling:
    """Rescaling of the rotary frequencies, `linear` (position interpolation) or `llama3` (by wavelength)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        require(self.kind in ("linear", "llama3"), "rope_scaling.kind", self.kind, "linear or llama3")
        require(self.factor > 0, "rope_scaling.factor", self.factor, "above 0")
        low, high = self.low_freq_factor, self.high_freq_factor
        require(0 < low < high, "rope_scaling.low_freq_factor/high_freq_factor", (low, high), "above 0, and ascending")
        require_count("rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings)


# Beyond any Llama: a config alone must not make anything allocate.
MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_layers": 1024,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31,
}
MODEL_TYPES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a Llama model; names follow Hugging Face where they have one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    model_type: str = "llama"  # Hugging Face's name of the family, which an export gives back

    def __post_init__(self) -> None:
        require(self.model_type in MODEL_TYPES, "model_type", self.model_type, " or ".join(MODEL_TYPES))
        for name, most in MOST.items():
            require(0 < getattr(self, name) <= most, name, getattr(self, name), f"at least 1 and at most {most}")
        require(self.num_layers >= 2, "num_layers", self.num_layers, "at least 2, so that it can be split")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        require(0 < self.rms_norm_eps < 1, "rms_norm_eps", self.rms_norm_eps, "above 0 and below 1")
        require(0 < self.rope_theta < FLOAT32, "rope_theta", self.rope_theta, "above 0")
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_ids", self.eos_token_ids)):
            for token in ids:
                if token is not None:
                    require_count(name, token, 0)
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even (rotary embeddings turn pairs)")

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.model_type == "qwen2"

    @property
    def context_length(self) -> int:
        """Positions that the model can take: `linear` scaling squeezes more of them into those it was trained on."""
        scaling = self.rope_scaling
        stretch = scaling.factor if scaling is not None and scaling.kind == "linear" else 1.0
        return int(min(self.max_position_embeddings * max(stretch, 1.0), MOST["max_position_embeddings"]))

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str = "config.json") -> LlamaConfig:
        """Read what `to_json` wrote; unknown, missing or ill-typed keys raise `UserError`."""
        return from_dict(cls, data, where)
