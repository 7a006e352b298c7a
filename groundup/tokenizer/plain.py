"""Ordinary text stays ordinary: encoding in which no spelling of a control token counts.

A stock tokenizer turns "<|im_end|>" into one id wherever it stands, so a user who types it ends the turn. Here a text
is encoded by a twin of the backend that has the same merges and the same ids, but looks past every control token.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from groundup.errors import UserError
from groundup.tokenizer.shield import Shield


def lone_surrogate(where: str) -> UserError:
    return UserError(where, "holds half a character (a lone surrogate), which UTF-8 cannot write", "remove it")


def control_tokens(backend: Backend, chat_template: str) -> dict[int, AddedToken]:
    """Added tokens that steer a model, by id: the special ones, those the chat template writes, and those that look it
    (<think> in Qwen3 is not "special"). Other added tokens (runs of spaces, HTML tags in Gemma) are plain text."""
    return {
        number: token
        for number, token in backend.get_added_tokens_decoder().items()
        if not token.content.isspace()
        and (token.special or token.content in chat_template or _CONTROL_SHAPE.fullmatch(token.content))
    }


_CONTROL_SHAPE = re.compile(r"<\|.*\|>|</?(think|tool_call|tool_response)>")


class Plain:
    """Encode text without control tokens; `place` says what stands before it, for tokenizers that add a space.

    place "start": the text begins here. "after": a control token stands before. "inside": text stands before.
    """

    def __init__(self, backend: Backend, chat_template: str) -> None:
        self._spec: dict[str, Any] = json.loads(backend.to_str())
        tokens = control_tokens(backend, chat_template)
        self.control = {token.content: number for number, token in tokens.items()}  # spelling -> id
        self.shield = Shield(list(tokens.values()))
        unknown = _unknown_token(self._spec["model"])  # stands for characters that a vocabulary lacks
        self._forbidden = frozenset(number for text, number in self.control.items() if text != unknown)
        for token in self._spec["added_tokens"]:
            token["special"] = token["content"] in self.control
        self._spec |= {"post_processor": None, "truncation": None, "padding": None}
        self._start = self._build(self._spec)

    def ids(self, text: str) -> list[int]:
        return self.encode(text).ids

    def encode(self, text: str, place: str = "start") -> Encoding:
        backend = {"start": self._start, "after": self._after, "inside": self._inside}[place]
        try:
            encoding = backend.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise _unusable(text) from error
        self._check(encoding)
        return encoding

    def ids_batch(self, texts: list[str]) -> list[list[int]]:
        """On all cores, without the GIL, unless TOKENIZERS_PARALLELISM=false."""
        try:
            encodings = self._start.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError as error:
            raise next((_unusable(text) for text in texts if _is_unusable(text)), error) from error
        for encoding in encodings:
            self._check(encoding)
        return [encoding.ids for encoding in encodings]

    def _check(self, encoding: Encoding) -> None:
        # Never so with BPE; a unigram model may hold "</s>" as an ordinary piece.
        if not self._forbidden.isdisjoint(encoding.ids):
            number = next(number for number in encoding.ids if number in self._forbidden)
            token = self._start.id_to_token(number)
            raise UserError("text", f"spells {token}, which this tokenizer cannot write as text", "remove it")

    @cached_property
    def _after(self) -> Backend:
        """Metaspace "first" adds its space at the start of the whole text only."""
        return self._without_prefix(lambda step: step.get("prepend_scheme") == "first")

    @cached_property
    def _inside(self) -> Backend:
        return self._without_prefix(lambda step: True)

    def _without_prefix(self, applies: Any) -> Backend:
        spec = json.loads(json.dumps(self._spec))
        for step in _steps(spec["normalizer"]) + _steps(spec["pre_tokenizer"]):
            if not applies(step):
                continue
            if step["type"] == "Metaspace":
                step["prepend_scheme"] = "never"
            elif step["type"] == "ByteLevel":
                step["add_prefix_space"] = False
            elif step["type"] == "Prepend":
                step["prepend"] = ""
        return self._start if spec == self._spec else self._build(spec)

    @staticmethod
    def _build(spec: dict[str, Any]) -> Backend:
        backend = Backend.from_str(json.dumps(spec))
        backend.encode_special_tokens = True
        return backend


def _unknown_token(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, nested sequences opened."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [step for child in inner for step in _steps(child)] if inner else [part]


def _is_unusable(text: object) -> bool:
    return not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text)


def _unusable(text: object) -> Exception:
    if isinstance(text, str):
        return lone_surrogate("text")
    return TypeError(f"text must be str, not {type(text).__name__}")
