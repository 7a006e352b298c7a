"""How a file of any kind becomes raw records, one at a time, in constant memory: jsonl, a JSON list, csv, txt, parquet.

A record that cannot be read on its own is yielded with its error, and reading goes on behind it. What makes the rest of
the file unreadable (a JSON list broken in the middle, a cut gzip) raises UserError.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from groundup.data.messages import RowError
from groundup.errors import UserError

MAX_LINE_BYTES = 32 * 1024 * 1024
_CHUNK = 1 << 20
_SUFFIXES = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv",
    ".txt": "txt", ".md": "txt", ".parquet": "parquet",
}  # fmt: skip


class Record(NamedTuple):
    """place: 1-based line (row, in parquet). Either value or error is there. raw: the line as it stood, in jsonl."""

    place: int
    value: dict[str, Any] | None
    error: RowError | None = None
    raw: str | None = None


def iter_records(path: Path, *, max_line_bytes: int = MAX_LINE_BYTES, txt: str = "file") -> Iterator[Record]:
    """The records of one file, by what it holds. txt: "file" (one document) or "line" (one a line)."""
    kind = file_kind(path)
    if kind == "parquet":
        yield from _parquet(path)
        return
    try:
        with open_bytes(path) as stream:
            if kind == "json":
                yield from _json(stream, path, max_line_bytes)
            elif kind == "csv":
                yield from _csv(stream, path, max_line_bytes)
            else:
                yield from _txt(stream, path, max_line_bytes, txt)
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(path, f"the gzip file is cut or broken ({error})", "fetch or write it again") from error
    except OSError as error:
        raise UserError(
            path, f"cannot be read ({error.strerror or error})", "check the disk and the permissions"
        ) from error


def file_kind(path: Path) -> str:
    """json, csv, txt or parquet, by the name's ending, else by the first bytes."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = next((one for one in reversed(suffixes) if one != ".gz"), "")
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    try:
        with open_bytes(path) as stream:
            head = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise UserError(path, f"cannot be read ({error})", "check the file") from error
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"{", b"[")):
        return "json"
    raise UserError(path, f"unknown kind of file {suffix!r}", f"use one of {', '.join(_SUFFIXES)}, text kinds also .gz")


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unzipped where they begin as gzip does."""
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    return cast("IO[bytes]", gzip.open(path)) if zipped else path.open("rb")


def broken_utf8(start: int) -> RowError:
    """The error for a byte that is no UTF-8. start: its offset in the (unzipped) file."""
    return RowError(
        f"not UTF-8 at byte {start} of the file", "convert it, for example: iconv -f GB18030 -t UTF-8 OLD > NEW"
    )


def too_long(limit: int, length: int | None = None) -> RowError:
    """The error for a line over the limit, which is there to keep memory bounded."""
    size = f" of {length / 2**20:.0f} MB" if length else ""
    return RowError(
        f"the line{size} is over the limit of {limit / 2**20:g} MB",
        "split the row, remove it, or raise max_line_bytes",
    )


def _json(stream: IO[bytes], path: Path, limit: int) -> Iterator[Record]:
    head = stream.read(_CHUNK).removeprefix(b"\xef\xbb\xbf")
    if head.lstrip()[:1] == b"[":
        from groundup.data.json_list import iter_list

        stream.seek(0)
        yield from iter_list(stream, path, limit)
        return
    stream.seek(0)
    yield from _json_lines(stream, limit)


def _lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, int, bytes | RowError]]:
    """(line number, its first byte's offset, the line); a line over the limit is walked over, never held."""
    number = offset = 0
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) <= limit or line.endswith(b"\n"):
            yield number, offset, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            offset += len(line)
            continue
        length = len(line)
        while not line.endswith(b"\n") and (line := stream.readline(_CHUNK)):
            length += len(line)
        yield number, offset, too_long(limit, length)
        offset += length


def _json_lines(stream: IO[bytes], limit: int) -> Iterator[Record]:
    loads = json.loads
    for number, offset, line in _lines(stream, limit):
        if isinstance(line, RowError):
            yield Record(number, None, line)
            continue
        try:
            raw = line.decode("utf-8")
            value = loads(raw)
        except UnicodeDecodeError as error:
            yield Record(number, None, broken_utf8(offset + error.start))
        except ValueError as error:
            if raw.strip():
                fix = "write one JSON object a line, or one JSON list"
                yield Record(number, None, broken_json(error, len(raw.rstrip()), fix))
        except RecursionError:
            yield Record(number, None, RowError("JSON nested too deep", "flatten the row"))
        else:
            yield _checked(number, value, raw)


def broken_json(error: ValueError, length: int, fix: str) -> RowError:
    """The error for a line of this length that is no JSON; the column is where the parser gave up."""
    if isinstance(error, json.JSONDecodeError):
        return RowError(f"broken JSON at column {min(error.pos, length) + 1}: {error.msg}", fix)
    return RowError(f"broken JSON: {error}", fix)  # an integer of more than 4,300 digits


def _checked(place: int, value: Any, raw: str) -> Record:
    """A record if the value is an object whose strings can be written as UTF-8."""
    if not isinstance(value, dict):
        return Record(place, None, RowError("the row is no object", 'write {"key": value, ..}'))
    if "\\ud" in raw or "\\uD" in raw:  # half of a surrogate pair would fail later, far from here
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Record(place, None, RowError("half of a surrogate pair in a string", "remove the \\ud... escape"))
    return Record(place, value, None, raw)


def _csv(stream: IO[bytes], path: Path, limit: int) -> Iterator[Record]:
    """Rows of a csv or tsv file. A file of six columns without a header, the last a letter, is an exam (MMLU)."""
    faults: list[RowError] = []

    def lines() -> Iterator[str]:
        # Split at \n only: cells may hold \x85 and \u2028, which str.splitlines takes for line ends.
        for _, offset, line in _lines(stream, limit):
            if isinstance(line, RowError):
                faults.append(line)
                continue
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                faults.append(broken_utf8(offset + error.start))
                yield line.decode("utf-8", errors="replace")

    csv.field_size_limit(max(limit, csv.field_size_limit()))
    reader = csv.reader(lines(), strict=True, delimiter="\t" if ".tsv" in path.suffixes else ",")
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            faults.append(RowError(f"broken csv: {error}", 'close every quote, and write a quote inside a cell as ""'))
            cells = ["?"]
        if faults:
            yield Record(start, None, faults[0])
            faults.clear()
        elif cells and header is None:
            exam = len(cells) == 6 and cells[-1].strip() in tuple("ABCD")
            header = ["question", "A", "B", "C", "D", "answer"] if exam else cells
            if exam:
                yield Record(start, dict(zip(header, cells, strict=True)))
        elif cells and header is not None:
            if len(cells) != len(header):
                why = f"{len(cells)} cells where the header has {len(header)}"
                yield Record(start, None, RowError(why, "quote cells that hold a comma or a line end"))
            else:
                yield Record(start, {key: cell for key, cell in zip(header, cells, strict=True) if key})
    if faults:
        yield Record(start, None, faults[0])


def _txt(stream: IO[bytes], path: Path, limit: int, mode: str) -> Iterator[Record]:
    if mode == "file":
        body = stream.read(limit + 1)
        if len(body) > limit:
            why = f"one document of over {limit / 2**20:g} MB"
            raise UserError(path, why, f"read a document a line by naming it {path}:line, or raise max_line_bytes")
        try:
            text = body.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield Record(body.count(b"\n", 0, error.start) + 1, None, broken_utf8(error.start))
        else:
            if text.strip():
                yield Record(1, {"text": text})
        return
    for number, offset, line in _lines(stream, limit):
        if isinstance(line, RowError):
            yield Record(number, None, line)
            continue
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield Record(number, None, broken_utf8(offset + error.start))
        else:
            if text.strip():
                yield Record(number, {"text": text})


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=_CHUNK, pre_buffer=False) as file:
            place = 0
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    place += 1
                    yield Record(place, value)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(
            path, f"is no readable parquet file ({error})", "write it again, or check the download"
        ) from error
