"""Text that a model's weights are rounded by: the beginnings of conversations, none of which is held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import HELD_OUT_SALT, from_first_question, is_held_out
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError

ROWS, ROW_TOKENS = 16, 512
_HELD_OUT_FRACTION = 0.02  # what evaluations keep apart


def calibration_rows(tokenizer: Tokenizer, files: Sequence[str]) -> np.ndarray:
    """int32 [at most ROWS, ROW_TOKENS]: each the beginning of a conversation that has so many; `UserError` for none."""
    found = list(islice(_long_enough(tokenizer, files, ROW_TOKENS), ROWS))
    if not found:
        raise UserError(
            f"{', '.join(files)}: no conversation of {ROW_TOKENS} tokens to calibrate on: name a log with longer ones,"
            " or leave out --calibration"
        )
    return np.asarray(found, np.int32)


def _long_enough(tokenizer: Tokenizer, files: Sequence[str], length: int) -> Iterator[list[int]]:
    for conversation in ConversationStream(files):
        question = next(message.content for message in conversation.messages if message.role == "user")
        if is_held_out(question, _HELD_OUT_FRACTION, HELD_OUT_SALT):
            continue
        try:
            ids, _ = tokenizer.encode_conversation(from_first_question(conversation.messages))
        except TemplateRefusedError:
            continue
        if len(ids) >= length:
            yield list(ids[:length])
