"""Conversation files as packed text for distillation, and prompts for the verifier to answer (self_generate.py).

    python -m experiments.pack --checkpoint CKPT --data FILE --out DIR

Writes DIR/text.npz (whole conversations) and DIR/prompts.npz (user turns with their context, and openings of text rows
for the verifier to go on with). Conversations whose first question falls into the held-out share are left out of both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.data.conversations import Conversation, ConversationStream
from dvi_jax.data.prompts import PromptSettings, context_of_turn, from_first_question, is_held_out
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.learn.packing import pack


def main() -> int:
    """Tokenise everything once and write both files."""
    parser = ArgumentParser(prog="python -m experiments.pack", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--max-prompt-tokens", type=int, default=192)
    parser.add_argument("--openings", type=int, default=12000, help="text rows whose opening becomes a prompt")
    parser.add_argument("--held-out-fraction", type=float, default=0.02)
    options = parser.parse_args()
    checkpoint = read_checkpoint(options.checkpoint)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    settings = PromptSettings(options.max_prompt_tokens, "all", options.held_out_fraction)
    prompts: dict[bytes, np.ndarray] = {}

    def sequences() -> Iterator[tuple[list[int], list[bool]]]:
        for conversation in training_conversations(options.data, settings):
            try:
                ids_and_mask = tokenizer.encode_conversation(from_first_question(conversation.messages))
            except TemplateRefusedError:
                continue
            for prompt in user_turns(conversation, tokenizer, settings.max_prompt_tokens):
                prompts.setdefault(prompt.tobytes(), prompt)
            yield ids_and_mask

    packed = pack(sequences(), options.row_length, checkpoint.config.vocab_size)
    chosen = np.random.default_rng(0).permutation(len(packed.tokens))[: options.openings]
    every = [*prompts.values(), *(packed.tokens[row, : options.max_prompt_tokens] for row in chosen)]
    options.out.mkdir(parents=True, exist_ok=True)
    packed.save(options.out / "text.npz")
    lengths = np.array([len(prompt) for prompt in every], np.int32)
    np.savez_compressed(options.out / "prompts.npz", lengths=lengths, ids=np.concatenate(every))
    print(f"{packed.tokens.shape[0]} rows of {options.row_length} tokens, {len(every)} prompts")
    return 0


def training_conversations(files: list[str], settings: PromptSettings) -> Iterator[Conversation]:
    """Conversations outside the held-out share."""
    for conversation in ConversationStream(files):
        question = next(message.content for message in conversation.messages if message.role == "user")
        if not is_held_out(question, settings.held_out_fraction, settings.salt):
            yield conversation


def user_turns(conversation: Conversation, tokenizer: Tokenizer, longest: int) -> Iterator[np.ndarray]:
    """Prompts up to each user turn while they fit."""
    users = sum(message.role == "user" for message in conversation.messages)
    for turn in range(users):
        ids = tokenizer.chat(context_of_turn(conversation.messages, turn))
        if len(ids) > longest:
            return
        yield np.array(ids, np.int32)


if __name__ == "__main__":
    sys.exit(run_cli(main))
