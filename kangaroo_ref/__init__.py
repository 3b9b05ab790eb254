"""PyTorch reference with the semantics of the original Kangaroo; only `upstream` needs transformers (4.33.3).

It is written for comparison: the JAX port must give the same numbers and the same accept length in every
round, and its speed is measured against this code, eager PyTorch in the manner of transformers 4.33.3.
"""

from kangaroo_ref.decode import (
    DecodeState,
    Generation,
    Round,
    greedy_generate,
    kangaroo_generate,
    prefill,
    prompt_stages,
    spec_decode_step,
)
from kangaroo_ref.model import Adapter, EarlyExitLlamaForCausalLM, KangarooModel, ModelConfig
from kangaroo_ref.weights import build_kangaroo, load_kangaroo, read_config, read_state_dict

__all__ = [
    "Adapter",
    "DecodeState",
    "EarlyExitLlamaForCausalLM",
    "Generation",
    "KangarooModel",
    "ModelConfig",
    "Round",
    "build_kangaroo",
    "greedy_generate",
    "kangaroo_generate",
    "load_kangaroo",
    "prefill",
    "prompt_stages",
    "read_config",
    "read_state_dict",
    "spec_decode_step",
]
