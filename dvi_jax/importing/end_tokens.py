"""Which tokens end a generation by llama.cpp's rules: those that a GGUF file names, and those known by their text.

Early Llama 3 files name `<|end_of_text|>` alone, and their chats end with `<|eot_id|>`.
"""

from __future__ import annotations

from typing import Any

from dvi_jax.errors import UserError

_NAMED = ("eos", "eot", "eom")
END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
# Where a SentencePiece vocabulary has its end, if the file does not say.
_LLAMA_EOS = 2


def end_ids(metadata: dict[str, Any], vocab_size: int, label: str) -> list[int]:
    """Token ids that end a generation, the file's own eos first; one outside the vocabulary is a `UserError`."""
    default = _LLAMA_EOS if metadata.get("tokenizer.ggml.model") == "llama" and vocab_size > _LLAMA_EOS else None
    found = []
    for name in _NAMED:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id", default if name == "eos" else None)
        if token is None:
            continue
        if type(token) is not int or not 0 <= token < vocab_size:
            raise UserError(f"{label}: {name}_token_id {token} is outside the vocabulary of {vocab_size}")
        found.append(token)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        known = {text: index for index, text in enumerate(tokens[:vocab_size])}
        found += [known[text] for text in END_TEXTS if text in known]
    return list(dict.fromkeys(found))
