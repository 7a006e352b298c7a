"""How is a file cut into chunks that workers take? A jsonl file by byte ranges; any other is read here, row by row."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from groundup.data import formats
from groundup.data.encode import Encoded, Fault, Faults, encode_rows
from groundup.data.messages import RowError
from groundup.data.read import OnBad, Reader
from groundup.data.records import MAX_LINE_BYTES, Record, _json_lines, file_kind, open_bytes
from groundup.data.rows import Row, row_text
from groundup.data.sources import open_source

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

CHUNK = 1 << 21  # bytes of a file, or characters of rows, in a chunk


@dataclass(frozen=True)
class ByteRange:
    """Whole lines of a jsonl file, for a worker to read itself. format: how the file was recognised, if it was."""

    file: Path
    start: int
    stop: int
    format: str | None


@dataclass(frozen=True)
class RowBatch:
    """Rows read here, each with where it stands."""

    file: Path
    rows: list[tuple[int | str, Row | Fault]]
    size: int


Chunk: TypeAlias = "ByteRange | RowBatch"


@dataclass(frozen=True)
class Reading:
    """How one source is read: the path as the user gave it and read_rows' options."""

    path: str
    format: str | None = None
    on_bad: OnBad = "raise"
    placeholders: Mapping[str, str] | None = None

    def reader(self, bad: list[tuple[str, str]]) -> Reader:
        return Reader(self.path, format=self.format, on_bad=self.on_bad, bad=bad, placeholders=self.placeholders)


class Worker:
    """What a worker process does with a chunk of one source. Picklable, and built anew in each process."""

    def __init__(self, reading: Reading, tokenizer: Tokenizer, kind: str, max_len: int | None) -> None:
        self.reading = reading
        self.convert = open_source(reading.path).convert
        self.encode = partial(encode_rows, tokenizer=tokenizer, kind=kind, max_len=max_len)

    def __call__(self, chunk: Chunk) -> Encoded:
        if isinstance(chunk, RowBatch):
            return self.encode(chunk.rows)
        with chunk.file.open("rb") as stream:
            stream.seek(chunk.start)
            part = _Bounded(stream, chunk.stop - chunk.start)
            encoded = self.encode(self._rows(part, chunk))
        encoded.lines = part.lines
        return encoded

    def _rows(self, part: _Bounded, chunk: ByteRange) -> Iterator[tuple[int, Row | Fault]]:
        known = formats.by_name(chunk.format) if chunk.format else None
        for record in _json_lines(io.BufferedReader(part), MAX_LINE_BYTES):
            try:
                value = self._value(record)
                known = known or formats.recognise(value)
                yield record.place, formats.parse(value, known)
            except RowError as error:
                # The reader counts bytes from where it began to read.
                why = error.why.replace("of the file", f"after byte {chunk.start} of the file")
                yield record.place, Fault(record.place, why if chunk.start else error.why, error.fix)

    def _value(self, record: Record) -> dict[str, Any]:
        if record.error is not None:
            raise record.error
        value = record.value or {}
        if self.convert:
            value = self.convert(value)
        return formats.fill(value, self.reading.placeholders) if self.reading.placeholders else value


class _Bounded(io.RawIOBase):
    """The next `size` bytes of a stream; `lines` counts the line ends among those read."""

    def __init__(self, stream: io.BufferedReader, size: int) -> None:
        self.stream, self.left, self.lines = stream, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.stream.readinto(memoryview(buffer)[: self.left])
        self.left -= count
        self.lines += bytes(buffer[:count]).count(b"\n")
        return count


def chunks(reading: Reading, bad: Faults) -> Iterator[Chunk]:
    """The chunks of a source, in order. Rows that are bad already for this reader are raised, or counted in `bad`."""
    files = open_source(reading.path).files
    if all(_is_lines(file) for file in files):
        first = reading.reader([])
        next(iter(first), None)  # the first row decides the format of all
        for file in files:
            yield from _ranges(file, first.format)
    else:
        yield from _batches(reading, bad)


def _is_lines(file: Path) -> bool:
    """Is it jsonl, not zipped?"""
    if file_kind(file) != "json":
        return False
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
    return not head.startswith(b"\x1f\x8b") and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"["


def _ranges(file: Path, format: str | None) -> Iterator[ByteRange]:
    """About CHUNK bytes each, ending where a line ends."""
    size, start = file.stat().st_size, 0
    with open_bytes(file) as stream:
        while start < size:
            stream.seek(min(start + CHUNK, size) - 1)
            while (rest := stream.readline(CHUNK)) and not rest.endswith(b"\n"):
                pass  # a line may be far longer than memory
            yield ByteRange(file, start, stream.tell(), format)
            start = stream.tell()


def _batches(reading: Reading, bad: Faults) -> Iterator[RowBatch]:
    noted: list[tuple[str, str]] = []
    reader = reading.reader(noted)
    rows: list[tuple[int | str, Row | Fault]] = []
    size = 0
    for row in reader:
        rows.append((reader.where, row))
        size += len(row_text(row))
        if size >= CHUNK:
            yield RowBatch(reader.file, rows, size)
            rows, size = [], 0
            _count(noted, bad)
    yield RowBatch(reader.file, rows, size)
    _count(noted, bad)


def _count(noted: list[tuple[str, str]], bad: Faults) -> None:
    for fault in noted:
        bad.add(Fault(*fault))
    noted.clear()


def identity(path: str) -> str:
    """What a `DIR:NAME` source adds to its files: the entry that says how to read them."""
    base, _, name = path.rpartition(":")
    folder = Path(path) if Path(path).is_dir() else Path(base)
    index = folder / "dataset_info.json"
    if open_source(path).convert is None or not index.is_file():
        return ""
    entries = json.loads(index.read_text(encoding="utf-8-sig"))
    return json.dumps(entries.get(name, entries), sort_keys=True)
