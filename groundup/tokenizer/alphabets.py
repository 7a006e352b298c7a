"""What are pieces spelled with? Bytes as GPT-2 writes them (Qwen, Llama 3, SmolLM, ours), or characters with bytes to
fall back on (Llama 2, Mistral, Gemma). Each can read text as the ids among which new merges are looked for."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.tokenizer.merges import EDGE, Ids
from groundup.tokenizer.stream import BYTE_OF
from groundup.tokenizer.tokenizer import Tokenizer

COVERAGE = 0.9995  # of the characters that are met get a piece of their own, as SentencePiece has it
_CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
_CONTINUED = {character for character, byte in BYTE_OF.items() if 0x80 <= byte < 0xC0}  # of a UTF-8 character
_UNKNOWN = 1 << 24  # this and a code point: a character that has no piece yet
_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Alphabet(ABC):
    """names: id -> spelling, of all pieces that merges may glue or make. taken: spellings that no merge may make."""

    def __init__(self, spec: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        vocabulary: dict[str, int] = spec["model"]["vocab"]
        added = {token["content"] for token in spec["added_tokens"]}
        self.taken = added | {self.spell(token) for token in added} | {str(spec["model"].get("unk_token"))}
        self.taken |= {piece for piece in vocabulary if _BYTE.fullmatch(piece)}
        self.names = {number: piece for piece, number in vocabulary.items() if piece not in self.taken}
        self.joinable = np.zeros(tokenizer.vocab_size, bool)
        self.joinable[list(self.names)] = True
        self._keep_alone()

    def _keep_alone(self) -> None:
        """What never stands in a longer piece (digits in Qwen and SmolLM, line ends in ours) goes on standing alone."""
        for kind in ("[0-9]", f"[\n{_CHARACTER_OF[10]}]"):
            holding = [number for number, piece in self.names.items() if re.search(kind, piece)]
            if all(len(self.names[number]) == 1 for number in holding):
                self.joinable[holding] = False

    @abstractmethod
    def spell(self, text: str) -> str:
        """Text as pieces write it."""

    @abstractmethod
    def length(self, piece: str) -> int:
        """Characters that a piece begins."""

    @abstractmethod
    def read(self, texts: list[str]) -> Ids:
        """The ids of texts, with an EDGE wherever no piece may reach across."""

    def characters(self, ids: Ids, first: int, add: int, met: int) -> tuple[Ids, list[tuple[str, list[int]]]]:
        """`ids` with new ids from `first` on for characters that had no piece, and (character, its old ids) of each.

        add: how many at most. met: characters of the text in all.
        """
        return ids, []


class Bytes(Alphabet):
    """Byte-level: every piece is a run of bytes, within the words that the pre-tokenizer finds."""

    def spell(self, text: str) -> str:
        return "".join(_CHARACTER_OF[byte] for byte in text.encode("utf-8", "replace"))

    def length(self, piece: str) -> int:
        return sum(character not in _CONTINUED for character in piece)

    def read(self, texts: list[str]) -> Ids:
        parts = []
        for text in texts:
            encoding = self.tokenizer.plain.encode(text)
            ids, words = np.array(encoding.ids, np.int32), np.array(encoding.word_ids, np.float64)
            ids[~self.joinable[ids]] = EDGE
            ends = np.flatnonzero(words[1:] != words[:-1]) + 1
            parts.append(np.append(np.insert(ids, ends, EDGE), np.int32(EDGE)))
        return np.concatenate(parts)


class Fallback(Alphabet):
    """Characters, "▁" for a space, and <0x..> for the bytes of a character without a piece.

    There are no words here, so edges are made: before a space, and between letters and what are none. They only say
    what is looked at; at use, merges go by rank alone.
    """

    def __init__(self, spec: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.bytes = {int(piece[3:5], 16): n for piece, n in spec["model"]["vocab"].items() if _BYTE.fullmatch(piece)}
        super().__init__(spec, tokenizer)
        self.begins_word = np.zeros(tokenizer.vocab_size, bool)
        self.ends_in_space = np.zeros(tokenizer.vocab_size, bool)
        self.first_is_letter = np.zeros(tokenizer.vocab_size, bool)
        self.last_is_letter = np.zeros(tokenizer.vocab_size, bool)
        for number, piece in self.names.items():
            bare = piece.lstrip(_SPACE)
            self.begins_word[number], self.ends_in_space[number] = piece.startswith(_SPACE), piece.endswith(_SPACE)
            self.first_is_letter[number], self.last_is_letter[number] = bare[:1].isalpha(), bare[-1:].isalpha()

    def spell(self, text: str) -> str:
        return text.replace(" ", _SPACE)

    def length(self, piece: str) -> int:
        return len(piece)

    def read(self, texts: list[str]) -> Ids:
        value = np.full(self.tokenizer.vocab_size, -1, np.int32)
        for byte, number in self.bytes.items():
            value[number] = byte
        parts = []
        for text in texts:
            ids = _whole_characters(np.array(self.tokenizer.plain.encode(text).ids, np.int32), value)
            parts.append(np.append(ids, np.int32(EDGE)))
        return np.concatenate(parts)

    def characters(self, ids: Ids, first: int, add: int, met: int) -> tuple[Ids, list[tuple[str, list[int]]]]:
        unknown, counts = np.unique(ids[ids >= _UNKNOWN], return_counts=True)
        order = np.lexsort((unknown, -counts))
        unknown, counts = unknown[order], counts[order]
        missed = counts.sum() - np.cumsum(counts)  # where only the first 1, 2, ... were taken
        wanted = int(np.searchsorted(-missed, -(1 - COVERAGE) * met)) + 1
        chosen = unknown[: min(wanted, add, int((counts > 1).sum()))]
        new = [(chr(code - _UNKNOWN), self._spelled(chr(code - _UNKNOWN))) for code in chosen.tolist()]
        return self._with_edges(ids, chosen, first), new

    def _spelled(self, character: str) -> list[int]:
        return [self.bytes[byte] for byte in character.encode()]

    def _with_edges(self, ids: Ids, chosen: Ids, first: int) -> Ids:
        """Number the chosen characters, and part the words."""
        is_letter = np.array([chr(code - _UNKNOWN).isalpha() for code in chosen.tolist()], bool)
        none = np.zeros(len(chosen), bool)
        begins, ends = np.append(self.begins_word, none), np.append(self.ends_in_space, none)
        opens, closes = np.append(self.first_is_letter, is_letter), np.append(self.last_is_letter, is_letter)
        joinable = np.append(self.joinable, ~none)
        if len(chosen):
            order = np.argsort(chosen)
            where = np.minimum(np.searchsorted(chosen[order], ids), len(chosen) - 1)
            ids = np.where(chosen[order][where] == ids, first + order[where], ids).astype(np.int32)
        ids = np.where((ids >= _UNKNOWN) | (ids == EDGE) | ~joinable[np.where(ids < _UNKNOWN, ids, 0)], EDGE, ids)
        left, right = ids[:-1], ids[1:]
        apart = begins[right] | ((closes[left] != opens[right]) & ~ends[left])
        return np.insert(ids, np.flatnonzero(apart & (left != EDGE) & (right != EDGE)) + 1, EDGE).astype(np.int32)


def _whole_characters(ids: Ids, value: NDArray[np.int32]) -> Ids:
    """Each run of bytes that spells a character of several bytes as that character, _UNKNOWN + its code point."""
    byte = value[ids]
    out, gone = ids.copy(), np.zeros(len(ids), bool)
    for size, lead, mask in ((2, 0xC0, 0x1F), (3, 0xE0, 0x0F), (4, 0xF0, 0x07)):
        at = np.flatnonzero((byte >= lead) & (byte <= lead + mask))
        at = at[at + size <= len(ids)]
        code = byte[at] & mask
        for step in range(1, size):
            code = (code << 6) | (byte[at + step] & 0x3F)
            gone[at + step] = True
        out[at] = _UNKNOWN + code
    return out[~gone]
