"""Domains of traffic in a conversation log: which conversation serves which purpose, and what counts as chat alone.

The streams of experiments/domain_shift.py (chat, code, translation) and the text of a drafter that has met no other
domain than chat (`python -m experiments.pack --domain chat`) follow the same rules, kept here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from dvi_jax.data.conversations import Conversation, ConversationStream, Message
from dvi_jax.data.prompts import HELD_OUT_SALT, is_held_out

HELD_OUT_FRACTION = 0.02
DOMAIN_FRACTION = 0.35  # of the training conversations, used for the domains' streams and for nothing else
SHARED_WORDS = 8  # that many words in a row, in a prompt and in a conversation, are no accident
FOREIGN_SHARE = 0.01  # of a message's characters that may be letters outside ASCII
ENGLISH_SHARE, ENGLISH_WORDS = 0.06, 30  # the least share of `COMMON_WORDS` in a message of so many words

CODE = re.compile(r"```|\b(python|java(script)?|code|function|sql|html|css|c\+\+|script|regex|api|bash|react)\b", re.I)
# For chat alone both are wider than a stream's rule: a conversation left out without need does no harm.
PROGRAMMING = re.compile(  # in what a user asks
    r"\b(coding|codes|coded|codebase|programming|programmers?|functions|scripting|apis|csv|ubuntu|docker|kubernetes|git"
    r"|github|database|postgres\w*|mongodb|algorithms?|compiler|excel|vba|latex|golang|rust|kotlin|matlab|pandas|django"
    r"|flask|angular|vue|sdk|ide|debug\w*|backend|frontend|localhost|arduino|raspberry|stm32|software|developers?)\b"
    r"|c#|\.(py|js|ts|cpp|java|sh)\b",
    re.I,
)
WRITTEN_CODE = re.compile(  # in any message: languages that have no other meaning, and what only code looks like
    r"`|copy code|\b(python|java(script)?|sql|html|css|regex|bash|json|xml|yaml|typescript|php|linux|mysql|numpy"
    r"|node\.?js)\b|c\+\+|\w\(\)|[;{]\s*$|^\s*(#include|import \w+$|def |public class|<\w+)",
    re.I | re.M,
)
COMMON_WORDS = {
    "English": "the of and to in is that for it you are with this on be as can your i a",
    "German": "der die und ist nicht das ein eine mit für auf den von zu im sie ich wie werden auch",
    "French": "le la les et est des une pour dans que qui pas sur avec du vous il plus au ce",
    "Spanish": "el los las y es una para que con del por en se un su como más de la lo",
    "Italian": "il che di e per un una non con sono del della gli le in è nel come da",
    "Portuguese": "o os as e um uma para que com não do da em de por mais como é se no",
    "Dutch": "de het een en van is niet dat met voor op te zijn je in ook aan als er",
}
WORD_SETS = {language: frozenset(words.split()) for language, words in COMMON_WORDS.items()}
INTO_LANGUAGES = (
    *("Spanish", "French", "German", "Italian", "Portuguese", "Dutch", "Swedish", "Polish", "Russian"),
    *("Chinese", "Japanese", "Turkish", "Hindi"),
)
OTHER_LANGUAGES = (
    *("English", "Korean", "Arabic", "Hebrew", "Latin", "Greek", "Danish", "Norwegian", "Finnish", "Czech"),
    *("Vietnamese", "Thai", "Indonesian", "Ukrainian", "Romanian", "Hungarian", "Bengali", "Urdu"),
)
TRANSLATION = re.compile(rf"translat|\b({'|'.join(INTO_LANGUAGES + OTHER_LANGUAGES)})\b|how do (you|i) say", re.I)


def question_of(conversation: Conversation) -> str:
    """The first user message, whose hash decides on which side a conversation is."""
    return next(message.content for message in conversation.messages if message.role == "user")


def purpose(question: str) -> str:
    """What a conversation that opens with `question` is for: `held out`, `domains` or `replies`."""
    if is_held_out(question, HELD_OUT_FRACTION, HELD_OUT_SALT):
        return "held out"
    return "domains" if is_held_out(question, DOMAIN_FRACTION, "domains") else "replies"


def domain_of(question: str) -> str | None:
    """`chat` or `code`; None for one that asks for a translation, a domain of its own."""
    if "translat" in question.lower():
        return None
    return "code" if CODE.search(question) else "chat"


def chat_alone(stream: Iterable[Conversation], unseen: Sequence[str]) -> Iterator[Conversation]:
    """Conversations that are English chat throughout, without text of any prompt in the files `unseen`."""
    prompts = [message.content for file in unseen for found in ConversationStream(file) for message in found.messages]
    overlaps = Overlaps(prompts)
    for conversation in stream:
        if purpose(question_of(conversation)) == "replies" and not any(
            is_code(message) or is_foreign(message.content) or overlaps(message.content)
            for message in conversation.messages
        ):
            yield conversation


def is_code(message: Message) -> bool:
    """Whether a message shows code or, unless it is an answer, speaks of programming."""
    asks = message.role != "assistant" and (CODE.search(message.content) or PROGRAMMING.search(message.content))
    return bool(asks or WRITTEN_CODE.search(message.content))


def is_foreign(text: str) -> bool:
    """Whether a message speaks of translating, names a language, or is not English throughout."""
    letters = sum(letter.isalpha() and not letter.isascii() for letter in text) if not text.isascii() else 0
    if letters > FOREIGN_SHARE * len(text) or TRANSLATION.search(text):
        return True
    words = re.findall(r"[^\W\d_]+", text.lower())
    english = sum(word in WORD_SETS["English"] for word in words)
    if len(words) >= ENGLISH_WORDS and english < ENGLISH_SHARE * len(words):
        return True
    return any(language_of(sentence) not in (None, "English") for sentence in sentences(text))


class Overlaps:
    """Whether a text is one of `prompts` or has `SHARED_WORDS` words in a row with one of them; case is ignored."""

    def __init__(self, prompts: Iterable[str]):
        self._whole: set[tuple[str, ...]] = set()
        self._runs: set[tuple[str, ...]] = set()
        for prompt in prompts:
            words = prompt.casefold().split()
            self._whole.add(tuple(words))
            self._runs.update(runs(words))

    def __call__(self, text: str) -> bool:
        words = text.casefold().split()
        return tuple(words) in self._whole or not self._runs.isdisjoint(runs(words))


def runs(words: list[str]) -> Iterator[tuple[str, ...]]:
    """Every run of `SHARED_WORDS` words."""
    return zip(*(words[start:] for start in range(SHARED_WORDS)), strict=False)


def sentences(text: str) -> list[str]:
    """Whole sentences of 30 to 220 characters on one line."""
    parts = re.split(r"(?<=[.!?])\s+|\n+", text)
    return [p for p in parts if 30 <= len(p) <= 220 and p[0].isupper() and p[-1] in ".!?" and "`" not in p]


def language_of(sentence: str) -> str | None:
    """The language whose most common words make up a fourth of the words, and clearly more than any other's."""
    words = re.findall(r"[^\W\d_]+", sentence.lower())
    shares = {language: sum(word in common for word in words) for language, common in WORD_SETS.items()}
    (best, most), (_, second) = Counter(shares).most_common(2)
    return best if most >= max(3, len(words) / 4, second + 2) else None
