"""Conversations in, prompts out.

bytes (sources) -> records (records) -> conversations (conversations) -> token ids (tokenizer, prompts)
"""

# Reading conversations
from dvi_jax.data.conversations import Conversation as Conversation
from dvi_jax.data.conversations import ConversationStream as ConversationStream
from dvi_jax.data.conversations import Message as Message
from dvi_jax.data.conversations import StreamLimits as StreamLimits
from dvi_jax.data.conversations import StreamPosition as StreamPosition

# Prompts to train on and prompts kept apart
from dvi_jax.data.prompts import Prompt as Prompt
from dvi_jax.data.prompts import PromptStream as PromptStream
from dvi_jax.data.prompts import is_held_out as is_held_out

# Text and token ids
from dvi_jax.data.tokenizer import Tokenizer as Tokenizer
