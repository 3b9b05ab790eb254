"""The key table: which tensor of a source is which rows of the base tree.

The same table drives imports (names -> tree) and exports (tree -> names), so the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dvi_jax.config import LlamaConfig
from dvi_jax.importing.tensors import Slot

# Our name of each part -> the name in the file; `{i}` is the layer.
HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "attn_norm": "model.layers.{i}.input_layernorm.weight",
    "q": "model.layers.{i}.self_attn.q_proj.weight",
    "k": "model.layers.{i}.self_attn.k_proj.weight",
    "v": "model.layers.{i}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{i}.self_attn.v_proj.bias",
    "out": "model.layers.{i}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "gate": "model.layers.{i}.mlp.gate_proj.weight",
    "up": "model.layers.{i}.mlp.up_proj.weight",
    "down": "model.layers.{i}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
# What Yi called its norms before its models became Llamas by name too.
YI_NAMES = {"attn_norm": "model.layers.{i}.ln1.weight", "mlp_norm": "model.layers.{i}.ln2.weight"}
GGUF_NAMES = {
    "embed": "token_embd.weight",
    "attn_norm": "blk.{i}.attn_norm.weight",
    "q": "blk.{i}.attn_q.weight",
    "k": "blk.{i}.attn_k.weight",
    "v": "blk.{i}.attn_v.weight",
    "q_bias": "blk.{i}.attn_q.bias",
    "k_bias": "blk.{i}.attn_k.bias",
    "v_bias": "blk.{i}.attn_v.bias",
    "out": "blk.{i}.attn_output.weight",
    "mlp_norm": "blk.{i}.ffn_norm.weight",
    "gate": "blk.{i}.ffn_gate.weight",
    "up": "blk.{i}.ffn_up.weight",
    "down": "blk.{i}.ffn_down.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
}


def base_slots(config: LlamaConfig, names: Mapping[str, str]) -> Iterator[Slot]:
    """One slot per source tensor, lazily: a config that claims a billion layers costs nothing here."""
    width, vocab = config.hidden_size, config.vocab_size
    yield Slot(names["embed"], ("embed",), 0, (vocab, width))
    for layer in range(config.num_layers):
        for part, key, start, shape in _layer_parts(config):
            yield Slot(names[part].format(i=layer), ("layers", str(layer), key), start, shape)
    yield Slot(names["norm"], ("norm",), 0, (width,))
    if not config.tie_word_embeddings:
        yield Slot(names["head"], ("head",), 0, (vocab, width))


def attention_parts(width: int, q_rows: int, kv_rows: int) -> list[tuple[str, str, int, tuple[int, ...]]]:
    """(part, key in the tree, first row, shape) of the four projections, q, k and v joined."""
    return [
        ("q", "qkv", 0, (q_rows, width)),
        ("k", "qkv", q_rows, (kv_rows, width)),
        ("v", "qkv", q_rows + kv_rows, (kv_rows, width)),
        ("out", "out", 0, (width, q_rows)),
    ]


def _layer_parts(config: LlamaConfig) -> list[tuple[str, str, int, tuple[int, ...]]]:
    width, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    biases = [
        ("q_bias", "qkv_bias", 0, (q_rows,)),
        ("k_bias", "qkv_bias", q_rows, (kv_rows,)),
        ("v_bias", "qkv_bias", q_rows + kv_rows, (kv_rows,)),
    ]
    return [
        ("attn_norm", "attn_norm", 0, (width,)),
        *attention_parts(width, q_rows, kv_rows),
        *(biases if config.qkv_bias else []),
        ("mlp_norm", "mlp_norm", 0, (width,)),
        ("gate", "gate_up", 0, (inner, width)),
        ("up", "gate_up", inner, (inner, width)),
        ("down", "down", 0, (width, inner)),
    ]
