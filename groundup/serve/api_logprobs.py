"""How likely was each token? In the two shapes that OpenAI has for it, with the tokens spelled out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from groundup.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from groundup.infer.params import TokenLogprob
    from groundup.infer.sequence import Delta
    from groundup.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no minus infinity; OpenAI's clients know this number


def shown(delta: Delta) -> list[TokenLogprob]:
    """The logprobs of a delta without that of the stop token that ended it: it is no part of the text."""
    entries = delta.logprobs or []
    ended = delta.finish_reason == "stop" and delta.ids and delta.ids[-1] in delta.request.stop_ids
    return entries[:-1] if ended else entries


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token stands for, which may be a part of a character."""
    decoder = StreamDecoder(tokenizer)
    if decoder._bytes:
        return decoder._token_bytes(token)
    return tokenizer.decode([token]).encode()


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """The "content" list of a chat's logprobs."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(tokenizer, token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}

    return [
        one(entry.id, entry.logprob) | {"top_logprobs": [one(*likely) for likely in entry.top]} for entry in entries
    ]


class CompletionLogprobs:
    """The "logprobs" object of a text completion, filled as tokens come. offset: characters of text before them."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._tokenizer, self._offset = tokenizer, offset
        self._decoder = StreamDecoder(tokenizer)
        self._entries: list[tuple[int, float | None, Sequence[tuple[int, float]]]] = []

    def add(self, token: int, logprob: float | None = None, top: Sequence[tuple[int, float]] = ()) -> None:
        self._entries.append((token, logprob, top))

    def take(self) -> dict[str, Any]:
        """What was added since the last take, as OpenAI writes it."""
        names, logprobs, tops, offsets = [], [], [], []
        for token, logprob, top in self._entries:
            names.append(self._name(token))
            offsets.append(self._offset)
            self._offset += len(self._decoder.feed([token]))
            logprobs.append(None if logprob is None else _finite(logprob))
            likely = {
                self._name(other): _finite(value) for other, value in [*top, (token, logprob)] if value is not None
            }
            tops.append(likely or None)
        self._entries = []
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, token: int) -> str:
        """The text of a token, or its bytes where they are no whole characters, as OpenAI spells them."""
        raw = token_bytes(self._tokenizer, token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST) if math.isfinite(logprob) else LEAST
