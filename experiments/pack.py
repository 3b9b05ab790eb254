"""Conversation files as packed text for distillation.

    python -m experiments.pack --checkpoint CKPT --data FILE --row-length 1024 --out text1024.npz

Conversations whose first question falls into the held-out share are left out. With `--domain chat` only those that are
chat throughout are taken (experiments/domains.py), for a warm start that has met neither code nor translation:

    python -m experiments.pack ... --domain chat --unseen chat.jsonl code.jsonl translation.jsonl --out chat1024.npz

`--unseen` names the streams (experiments/prompts.py) of which nothing may be in it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dvi_jax.data.conversations import Conversation, ConversationStream
from dvi_jax.data.prompts import HELD_OUT_SALT, from_first_question, is_held_out
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.packing import pack
from experiments.domains import HELD_OUT_FRACTION, chat_alone, question_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Tokenise every conversation once and write the rows."""
    parser = ArgumentParser(prog="python -m experiments.pack", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--out", required=True, type=Path, help="the .npz to write")
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--held-out-fraction", type=float, default=HELD_OUT_FRACTION)
    parser.add_argument("--domain", choices=("all", "chat"), default="all")
    parser.add_argument("--unseen", nargs="+", default=[], metavar="FILE", help="with --domain chat: share no text")
    options = parser.parse_args(arguments)
    if options.unseen and options.domain == "all":
        raise UserError("--unseen goes with --domain chat; all conversations share text with the streams made of them")
    checkpoint = open_checkpoint(options.checkpoint)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    conversations = training_conversations(options.data, options.held_out_fraction)
    if options.domain == "chat":
        conversations = chat_alone(conversations, options.unseen)
    packed = pack(encoded(conversations, tokenizer), options.row_length, checkpoint.config.vocab_size)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    packed.save(options.out)
    rows, answers = len(packed.tokens), packed.mask.mean()
    print(f"{options.out}: {rows} rows of {options.row_length}, {packed.tokens.size} tokens, {answers:.0%} answers")
    return 0


def training_conversations(files: Sequence[str], fraction: float) -> Iterator[Conversation]:
    """Conversations outside the held-out share."""
    for conversation in ConversationStream(files):
        if not is_held_out(question_of(conversation), fraction, HELD_OUT_SALT):
            yield conversation


def encoded(conversations: Iterator[Conversation], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of each conversation from its first question on, answers marked; refused ones are left out."""
    for conversation in conversations:
        try:
            yield tokenizer.encode_conversation(from_first_question(conversation.messages))
        except TemplateRefusedError:
            continue


if __name__ == "__main__":
    sys.exit(run_cli(main))
