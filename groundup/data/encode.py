"""What does one worker do? Rows in, arrays of token ids out: no state, so any worker may take any chunk."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from groundup.data.rows import Chat, Message, Preference, Row, Text, Tools, Unpaired
from groundup.data.steps import judgements
from groundup.data.truncate import last_answers, truncate_chat, truncate_pair
from groundup.errors import UserError

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

# What a row of each kind is called, many of them; a pair among judged answers is two of those.
UNITS = {
    "text": "documents", "chat": "conversations", "preference": "pairs", "unpaired": "judged answers",
    "stepwise": "solutions", "outcome": "answers",
}  # fmt: skip
KINDS = tuple(UNITS)
MASKED = ("chat", "preference", "unpaired", "stepwise", "outcome")  # kinds of which only answers are trained
JUDGED = ("stepwise", "outcome")  # kinds whose mask says 1 where something wrong ends, 2 where something right does
BATCH = 1 << 18  # characters encoded at a time: what the tokenizer's library holds for them is 30 times that
NAMED = 10  # rows of a chunk that are named; the rest are only counted
# Between a letter or digit and what is neither, every byte-level pre-tokenizer ends a word: the ids of the two sides
# are the ids of the whole.
_WORD_END = re.compile(r"[^\W_](?=\W)")


@dataclass(frozen=True)
class Fault:
    """A row that gives no document: where it stands (its line in the chunk, or file:line) and why."""

    where: int | str
    why: str
    fix: str = ""
    detail: str = ""


@dataclass
class Faults:
    """How many, and the first few of them."""

    count: int = 0
    first: list[Fault] = field(default_factory=list)

    def add(self, fault: Fault) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(fault)


@dataclass
class Encoded:
    """A chunk's documents. tokens, mask (1: trained; None: all) are flat; lengths, bytes, trained have one entry each.

    bytes: UTF-8 bytes of the trained text. trained: tokens that are some token's target.
    lines: in the chunk, where it is a part of a file. truncated: rows (UNITS) that were cut, and kept. context: answers
    that are not trained, as the chat template shows them otherwise than they were said. wanted: of judged answers, 1
    where the document's is a good one.
    """

    tokens: NDArray[Any]
    mask: NDArray[np.uint8] | None
    lengths: NDArray[np.int64]
    bytes: NDArray[np.int32]
    trained: NDArray[np.int32]
    lines: int
    truncated: int
    bad: Faults
    dropped: Faults
    context: int = 0
    wanted: NDArray[np.uint8] | None = None


def encode_rows(
    rows: Iterable[tuple[int | str, Row | Fault]], tokenizer: Tokenizer, kind: str, max_len: int | None = None
) -> Encoded:
    """Token arrays of rows that come with the place where they stand (a line number, or file:line).

    kind "text": `bos + text + eos`, all trained; a conversation becomes the document that it renders to.
    kind "chat": rendered by the chat template, cut to max_len; a row that then trains nothing is dropped.
    kind "preference": two documents a row, the chosen and the rejected conversation, cut so that both together have
    max_len tokens and equal prompts. Only the answers in question are marked.
    kind "unpaired": conversations with a judged last answer, which alone is marked; a pair becomes two of them.
    kind "stepwise": solutions, marked where each step ends. "outcome": conversations, marked at their end (steps.py).
    Of a solution too long the steps that fit are kept; an answer that lost its end would not be what was judged, so it
    is dropped.
    """
    return _Chunk(tokenizer, kind, max_len).encode(rows)


class _Chunk:
    """The documents of one chunk, while they come in."""

    def __init__(self, tokenizer: Tokenizer, kind: str, max_len: int | None) -> None:
        self.tokenizer, self.kind = tokenizer, kind
        self.room = sys.maxsize if max_len is None else max_len
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.ids: list[NDArray[Any]] = []
        self.masks: list[NDArray[np.uint8]] = []
        self.columns: list[tuple[int, int, int]] = []  # length, bytes, trained
        self.texts: list[str] = []
        self.wanted: list[bool] = []
        self.waiting = self.truncated = self.context = 0
        self.bad, self.dropped = Faults(), Faults()

    def encode(self, rows: Iterable[tuple[int | str, Row | Fault]]) -> Encoded:
        for where, row in rows:
            if isinstance(row, Fault):
                self.bad.add(row)
            elif self.kind == "text" and isinstance(row, Text):
                self._add_text(row.text)
            elif self.kind == "preference" and isinstance(row, Preference):
                self._add_pair(where, row)
            elif self.kind == "unpaired" and isinstance(row, Unpaired):
                self._add_judged(where, row.messages, 1, row.label, row.tools)
            elif self.kind == "unpaired" and isinstance(row, Preference):
                for answers, wanted in ((row.chosen, True), (row.rejected, False)):
                    said = sum(one["role"] == "assistant" for one in answers)
                    self._add_judged(where, [*row.prompt, *answers], said, wanted, row.tools)
            elif self.kind in JUDGED:
                self._add_judgements(where, row)
            elif self.kind in ("text", "chat") and isinstance(row, Chat):
                self._add_chat(where, row)
            else:
                self.bad.add(Fault(where, *_wrong_kind(row, self.kind)))
        self._flush()
        columns = np.array(self.columns, np.int64).reshape(-1, 3)
        return Encoded(
            tokens=np.concatenate([np.zeros(0, self.dtype), *self.ids]),
            mask=np.concatenate([np.zeros(0, np.uint8), *self.masks]) if self.kind in MASKED else None,
            lengths=columns[:, 0],
            bytes=columns[:, 1].astype(np.int32),
            trained=columns[:, 2].astype(np.int32),
            lines=0,
            truncated=self.truncated,
            bad=self.bad,
            dropped=self.dropped,
            context=self.context,
            wanted=np.array(self.wanted, np.uint8) if self.kind == "unpaired" else None,
        )

    def _add_text(self, text: str) -> None:
        self.texts.append(text)
        self.waiting += len(text)
        if self.waiting >= BATCH:
            self._flush()

    def _flush(self) -> None:
        """Encode the waiting texts in one call of the library."""
        texts, self.texts, self.waiting = self.texts, [], 0
        parts = [list(cut_text(text)) for text in texts]
        encoded = iter(self._encode_in_batches(list(chain.from_iterable(parts))))
        for text, its_parts in zip(texts, parts, strict=True):
            ids = chain([self.tokenizer.bos_id], *(next(encoded) for _ in its_parts), [self.tokenizer.eos_id])
            self._add_document(np.fromiter(ids, self.dtype), len(text.encode("utf-8", "surrogatepass")))

    def _encode_in_batches(self, texts: list[str]) -> Iterator[list[int]]:
        """One call while the texts fit into BATCH characters, more for the parts of a huge document."""
        begin, size = 0, 0
        for end, text in enumerate(texts, 1):
            size += len(text)
            if size >= BATCH or end == len(texts):
                yield from self.tokenizer.encode_batch(texts[begin:end])
                begin, size = end, 0

    def _add_document(self, ids: NDArray[Any], size: int) -> None:
        self.ids.append(ids)
        self.columns.append((len(ids), size, len(ids) - 1))

    def _add_chat(self, where: int | str, row: Chat) -> None:
        try:
            rendered = self.tokenizer.render(row.messages, row.tools)
        except UserError as error:
            self.bad.add(Fault(where, error.why, error.fix, error.detail))
            return
        self.context += len(rendered.context)
        if self.kind == "text":
            self._flush()  # documents keep the order of the file
            self._add_document(np.array(rendered.ids, self.dtype), self._size(rendered.ids))
            return
        self._add_cut(where, rendered.ids, rendered.mask)

    def _add_cut(self, where: int | str, ids: list[int], mask: list[int]) -> bool:
        """A conversation, cut to max_len; False where nothing of it would be trained then."""
        longer = len(ids) > self.room
        if longer:
            ids, mask = truncate_chat(ids, mask, self.room, self.tokenizer.eos_id)
        if not sum(mask[1:]):
            self.dropped.add(Fault(where, "no token of it would be trained", "it needs an answer that fits into a row"))
            return False
        self.truncated += longer
        self._add_masked(ids, mask)
        return True

    def _add_pair(self, where: int | str, row: Preference) -> None:
        """The chosen conversation, then the rejected one."""
        sides: list[tuple[list[int], list[int]]] = []
        try:
            for answers in (row.chosen, row.rejected):
                rendered = self.tokenizer.render([*row.prompt, *answers], row.tools)
                said = sum(one["role"] == "assistant" for one in answers)
                sides.append((rendered.ids, last_answers(rendered.mask, said)))
        except UserError as error:
            self.bad.add(Fault(where, error.why, error.fix, error.detail))
            return
        longer = sum(len(ids) for ids, _ in sides) > self.room
        if longer:
            sides = truncate_pair(sides, self.room, self.tokenizer.eos_id)
        if not all(sum(mask[1:]) for _, mask in sides) or sides[0][0] == sides[1][0]:
            why = "both sides are the same tokens, or none is left of one of them in a row"
            self.dropped.add(Fault(where, why, "both answers must fit into a row, with their prompts"))
            return
        self.truncated += longer
        for ids, mask in sides:
            self._add_masked(ids, mask)

    def _add_judged(self, where: int | str, messages: list[Message], said: int, wanted: bool, tools: Tools) -> None:
        """A conversation of which the last `said` answers are judged."""
        try:
            rendered = self.tokenizer.render(messages, tools)
        except UserError as error:
            self.bad.add(Fault(where, error.why, error.fix, error.detail))
            return
        if self._add_cut(where, rendered.ids, last_answers(rendered.mask, said)):
            self.wanted.append(wanted)

    def _add_judgements(self, where: int | str, row: Row) -> None:
        """A document with marks where something right or wrong ends."""
        try:
            found = judgements(self.tokenizer, row, self.kind == "stepwise")
        except UserError as error:
            self.bad.add(Fault(where, error.why, error.fix, error.detail))
            return
        if found is None:
            self.bad.add(Fault(where, *_wrong_kind(row, self.kind)))
            return
        ids, ends, labels = found
        if len(ids) > self.room:
            ends = [end for end in ends if end < self.room]
            ids = ids[: ends[-1] + 1] if ends else []
            self.truncated += bool(ends)
        if not ends:
            self.dropped.add(Fault(where, "what is judged of it ends beyond a row", "it must fit into a row"))
            return
        mask = np.zeros(len(ids), np.uint8)
        mask[ends] = [1 + label for label in labels[: len(ends)]]
        self.ids.append(np.array(ids, self.dtype))
        self.masks.append(mask)
        self.columns.append((len(ids), self._size(ids), len(ends)))

    def _add_masked(self, ids: list[int], mask: list[int]) -> None:
        self.ids.append(np.array(ids, self.dtype))
        self.masks.append(np.array(mask, np.uint8))
        self.columns.append((len(ids), self._size([i for i, m in zip(ids, mask, strict=True) if m]), sum(mask[1:])))

    def _size(self, ids: list[int]) -> int:
        return len(self.tokenizer.decode(ids, skip_special_tokens=True).encode("utf-8", "surrogatepass"))


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Two bytes a token while every id fits."""
    return np.uint16 if vocab_size < 2**16 else np.uint32


def cut_text(text: str, limit: int = BATCH) -> Iterator[str]:
    """A huge document in parts that encode to the same ids: cut where a word ends, at most 1,000 characters early."""
    begin = 0
    while len(text) - begin > limit:
        end = begin + limit
        ends = [found.end() for found in _WORD_END.finditer(text, end - min(limit, 1000), end)]
        end = ends[-1] if ends else end
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _wrong_kind(row: Row, kind: str) -> tuple[str, str]:
    name = type(row).__name__
    if isinstance(row, Text) and kind == "chat":
        return "a text document among conversations", "train it with stage pretrain, or give a file of conversations"
    needed = {
        "text": "a text document or a conversation", "preference": "a pair of answers", "chat": "a conversation",
        "unpaired": "a judged answer (label, kto_tag) or a pair of answers",
        "stepwise": "a solution in judged steps (prompt, completions, labels)",
        "outcome": "an answer that is right or wrong (label)",
    }  # fmt: skip
    wanted = needed[kind]
    return f"a row of kind {name} where {wanted} is needed", "use a stage that takes such rows, or another file"
