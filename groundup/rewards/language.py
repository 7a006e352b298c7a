"""Is the answer in the language of the question? The share of its words that are (DeepSeek-R1, section 2.3.2)."""

from __future__ import annotations

import re
from typing import Any

from groundup.data.language import language as language_of
from groundup.rewards.said import Prompts, Scores, said

# What is in no language: programs, formulas, tags, links.
_NEUTRAL = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$[^$\n]*\$|\\[A-Za-z]+(?:\{[^{}\n]*\})*|</?[a-z_]+>|https?://\S+", re.DOTALL
)
_WORDS = {
    "zh": re.compile(r"[\u3400-\u9fff\uf900-\ufaff]"),
    "en": re.compile(r"[A-Za-z]{2,}|\b[aAI]\b"),  # single letters are variables
}
_OTHER = re.compile(r"[^\W\d_A-Za-z\u3400-\u9fff\uf900-\ufaff]+")


def language(
    prompts: Prompts, completions: list[str], *, language: str | None = None, thoughts: bool = True,
    **columns: Any,
) -> Scores:  # fmt: skip
    """The share of words (Chinese characters count as words) in the language of the prompt's last message.

    language: zh or en for all, instead. thoughts: they count, too. A prompt in neither language is not judged; an
    answer without words (a number) is in every language.
    """
    if language not in (None, *_WORDS):
        raise ValueError(f"language {language!r} must be one of {', '.join(_WORDS)}")
    wanted = [language or language_of(messages[-1]["content"]) for messages in prompts]
    texts = completions if thoughts else [said(text) for text in completions]
    return [_share(text, want) if want in _WORDS else None for text, want in zip(texts, wanted, strict=True)]


def _share(text: str, want: str) -> float:
    text = _NEUTRAL.sub(" ", text)
    counts = {name: len(words.findall(text)) for name, words in _WORDS.items()}
    words = sum(counts.values()) + len(_OTHER.findall(text))
    return counts[want] / words if words else 1.0
