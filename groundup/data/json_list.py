"""How is a JSON list of any length read? Element by element, holding one element and one chunk at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from groundup.data.messages import RowError
from groundup.data.records import Record, broken_utf8, too_long
from groundup.errors import UserError

_CHUNK = 1 << 20
_SPACE = " \t\r\n"


def iter_list(stream: IO[bytes], path: Path, limit: int) -> Iterator[Record]:
    """The objects of a JSON list, with the line each begins on. A list broken in the middle raises UserError there."""
    text = _Text(stream, path, limit)
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
    else:
        while True:
            text.peek()
            line, value = text.line, text.value()
            if isinstance(value, dict):
                yield Record(line, value)
            else:
                yield Record(line, None, RowError("the row is no object", 'write {"key": value, ..}'))
            if text.expect(",]") == "]":
                break
    if text.peek():
        raise text.broken("something follows the end of the list")


class _Text:
    """The stream as a moving piece of text: `buffer[at:]` is unread, `line` is the line of `buffer[at]`."""

    def __init__(self, stream: IO[bytes], path: Path, limit: int) -> None:
        self.stream, self.path, self.limit = stream, path, limit
        self.buffer, self.at, self.line = "", 0, 1
        self.carry, self.offset, self.ended = b"", 0, False
        self.decoder = json.JSONDecoder()

    def fill(self) -> bool:
        """Reads as much again as is unread, at least a chunk, so that a long element is parsed a few times only."""
        unread = self.buffer[self.at :]
        data = self.carry + self.stream.read(max(_CHUNK, len(unread)))
        self.ended = len(data) == len(self.carry)
        if self.offset == 0:
            data = data.removeprefix(b"\xef\xbb\xbf")
        try:
            text, self.carry = data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if self.ended or error.reason != "unexpected end of data":
                line = self.line + unread.count("\n") + data.count(b"\n", 0, error.start)
                fault = broken_utf8(self.offset + error.start)
                raise UserError(f"{self.path}:{line}", fault.why, fault.fix) from None
            text, self.carry = data[: error.start].decode("utf-8"), data[error.start :]
        self.offset += len(data) - len(self.carry)
        self.buffer, self.at = unread + text, 0
        return not self.ended

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end of the file."""
        while True:
            while self.at < len(self.buffer):
                character = self.buffer[self.at]
                if character not in _SPACE:
                    return character
                self.line += character == "\n"
                self.at += 1
            if not self.fill():
                return ""

    def expect(self, characters: str) -> str:
        """Steps over one of these characters."""
        found = self.peek()
        if not found or found not in characters:
            raise self.broken(f"expected {' or '.join(characters)}, found {found or 'the end of the file'}")
        self.at += 1
        return found

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - 12
                if len(self.buffer) - self.at > self.limit:
                    fault = too_long(self.limit)
                    raise UserError(f"{self.path}:{self.line}", fault.why, fault.fix) from None
                if cut and self.fill():
                    continue
                line = self.line + self.buffer.count("\n", self.at, error.pos)
                raise self.broken(error.msg, line) from None
            except (ValueError, RecursionError) as error:  # an integer of over 4,300 digits, or nesting
                raise self.broken(f"nested too deep, or a number too long ({error})") from None
            self.line += self.buffer.count("\n", self.at, end)
            self.at = end
            return value

    def broken(self, what: str, line: int = 0) -> UserError:
        """The error for a list that cannot be read on; line: where, if not here."""
        fix = "repair the list there, or write one JSON object a line"
        return UserError(f"{self.path}:{line or self.line}", f"broken JSON in the list: {what}", fix)
