"""How well does a tokenizer fit a language?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

from groundup.tokenizer.tokenizer import Tokenizer


def report(tokenizer: Tokenizer, texts: Mapping[str, Iterable[str]]) -> dict[str, dict[str, float | int]]:
    """Characters and UTF-8 bytes per token, by language (more is better: fewer tokens for the same text).

    texts: language -> documents. Returns language -> texts, characters, bytes, tokens, chars_per_token,
    bytes_per_token, and round_trip_failures (documents that decode to something else; 0 for a byte-level tokenizer).
    """
    return {language: _measure(tokenizer, iter(documents)) for language, documents in texts.items()}


def _measure(tokenizer: Tokenizer, documents: Iterable[str]) -> dict[str, float | int]:
    count = characters = size = tokens = failures = 0
    while batch := list(islice(documents, 256)):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            count += 1
            characters += len(text)
            size += len(text.encode())
            tokens += len(ids)
            failures += tokenizer.decode(ids) != text
    return {
        "texts": count,
        "characters": characters,
        "bytes": size,
        "tokens": tokens,
        "chars_per_token": round(characters / max(tokens, 1), 4),
        "bytes_per_token": round(size / max(tokens, 1), 4),
        "round_trip_failures": failures,
    }
