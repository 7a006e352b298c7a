"""Telling the template's control tokens from the same spelling in what people wrote."""

from __future__ import annotations

import re
from typing import Any

from tokenizers import AddedToken


class Shield:
    """Breaks control tokens in people's strings with a mark, so that every one found later is the template's own.

    tokens: the control tokens, as the backend knows them (some swallow the white space beside them).
    """

    def __init__(self, tokens: list[AddedToken]) -> None:
        tokens = sorted(tokens, key=lambda token: len(token.content), reverse=True)  # the longest one wins
        spellings = [token.content for token in tokens]
        self._written = re.compile("|".join(map(re.escape, spellings)) or "(?!)")
        # `found` matches a control token in rendered text; its group "token" is the spelling alone.
        self.found = re.compile(
            "|".join(
                (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
                for token in tokens
            )
            or "(?!)"
        )
        self._heads = {spelling[:i] for spelling in spellings for i in range(1, len(spelling))}
        self._tails = {spelling[i:] for spelling in spellings for i in range(1, len(spelling))}
        self._longest = max(map(len, spellings), default=0)

    def protect(self, value: Any, mark: str) -> Any:
        """`value` (text, or lists and dicts of it) with `mark` inside every control token that it spells, and at an
        end that could become one together with the text beside it."""
        if isinstance(value, dict):
            return {self.protect(key, mark): self.protect(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.protect(item, mark) for item in value]
        if not isinstance(value, str):
            return value
        text = self._written.sub(lambda match: "".join(char + mark for char in match[0]), value)
        sizes = range(1, min(self._longest, len(value) + 1))
        if any(value[-size:] in self._heads for size in sizes):
            text += mark
        if any(value[:size] in self._tails for size in sizes):
            text = mark + text
        return text
