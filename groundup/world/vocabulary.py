"""What a tokenizer should see: the texts of the world with its words set apart.

Chinese is written without spaces, so byte-pair merges learnt on plain sentences run across words (`绿` + `色的书`), and
one word gets a different spelling in tokens in every sentence. A small model then has to learn each word many times.
With each word of the world on a line of its own, merges stop at its edges; the tokenizer itself stays a plain one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from groundup.world import words
from groundup.world.kinds.kinship import RELATIONS
from groundup.world.rows import Chat
from groundup.world.tools import EVENTS, TOOLS
from groundup.world.words import Word

REPEATS = 200  # of the bare list of words: enough that each becomes one token, with and without a space before it


def all_words() -> list[Word]:
    """Every word of the world that fills a place in a sentence."""
    lists = [value for value in vars(words).values() if isinstance(value, list)]
    found = [word for table in lists for word in table if isinstance(word, Word)] + list(RELATIONS.values()) + EVENTS
    return list(dict.fromkeys(found))


def set_apart(texts: Iterable[str]) -> Iterator[str]:
    """The same texts with each Chinese word of the world on a line of its own."""
    chinese = {word.zh for word in all_words()} | {word.measure for word in all_words()}
    pattern = re.compile("|".join(sorted(chinese, key=lambda word: (-len(word), word))))
    return (pattern.sub(r"\n\g<0>\n", text) for text in texts)


def spoken(chats: Iterable[Chat]) -> Iterator[str]:
    """The text of conversations, with the names of the roles as the chat template writes them."""
    for chat in chats:
        for message in chat.messages:
            yield f"{message['role']}\n"
            yield message["content"]
            yield message.get("reasoning_content", "")


def word_list() -> Iterator[str]:
    """The words by themselves, as they start a line and as they follow a space."""
    english = [form for word in all_words() for form in (word.en, word.plural) if form]
    for _ in range(REPEATS):
        for form in english:
            yield f"{form}\n {form}"
        yield json.dumps(TOOLS)
