"""Ids arrive one by one, a character may take several: hold its bytes back until it is whole."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import cached_property

from tokenizers import decoders

from groundup.tokenizer.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class StreamDecoder:
    """feed() ids as they come, print what it returns, and finish() at the end: together that is decode() of all ids.

    No piece ever splits a UTF-8 character. skip_special_tokens: as in Tokenizer.decode.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._bytes = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Decoders that are not byte-level: the ids of the last piece shown, then those not shown yet. Some decoders
        # drop the space of a first token, so a piece is only read after another one.
        self._ids: list[int] = []
        self._shown, self._shown_ids = "", 0

    def feed(self, ids: Iterable[int]) -> str:
        """Take more ids; return the text that is now certain ("" while a character is still incomplete)."""
        if self._bytes:
            return self._utf8.decode(b"".join(self._token_bytes(number) for number in ids))
        return "".join(self._step(number) for number in ids)

    def finish(self) -> str:
        """What was held back: a character cut short comes out as U+FFFD. The decoder can then be used anew."""
        if self._bytes:
            return self._utf8.decode(b"", final=True)
        rest = self._decode()[len(self._shown) :]
        self._ids, self._shown, self._shown_ids = [], "", 0
        return rest

    def _token_bytes(self, number: int) -> bytes:
        token = self._tokenizer.backend.id_to_token(number)
        if token is None or (self._skip and number in self._special):
            return b""
        try:
            return bytes(BYTE_OF[char] for char in token)
        except KeyError:  # an added token beyond ASCII is spelled as itself
            return token.encode()

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._tokenizer.backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def _step(self, number: int) -> str:
        self._ids.append(number)
        text = self._decode()
        if text.endswith(REPLACEMENT):  # perhaps the start of a character
            return ""
        new = text[len(self._shown) :]
        if new:
            self._ids = self._ids[self._shown_ids :]
            self._shown, self._shown_ids = self._decode(), len(self._ids)
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of()
