"""How does a file become rows? Records as they stand, recognised by the first one, parsed one at a time.

    for row in read_rows("sft.jsonl"):  # Chat(messages=[..])
        ...

Nothing is silent: a row that cannot be used raises UserError with its file and line, or, with on_bad="count", is noted
in `bad` as (where, why). A file without a single usable row is an error either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from groundup.data import formats
from groundup.data.messages import RowError
from groundup.data.records import MAX_LINE_BYTES, Record, file_kind, iter_records
from groundup.data.rows import ImageChat, Row
from groundup.data.sources import Opened, open_source
from groundup.errors import UserError

OnBad = Literal["raise", "count"]
_HOPELESS = 1000  # so many bad rows and no good one: this is not the file that was meant, however long it is
__all__ = ["Reader", "open_source", "read_rows"]


def read_rows(
    path: str | Path,
    *,
    format: str | None = None,
    on_bad: OnBad = "raise",
    bad: list[tuple[str, str]] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    placeholders: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """The rows of a file, `FILE.txt:line`, or `DIR:NAME`, in constant memory.

    format: a name of `formats.FORMATS`, where the keys of the first row should not decide.
    on_bad: "raise" UserError at the first bad row, or "count": note it in `bad` as (where, why) and go on.
    placeholders: {"name": ..} fills `{{name}}` in every string.
    """
    return iter(Reader(path, format=format, on_bad=on_bad, bad=bad, max_line_bytes=max_line_bytes,
                       placeholders=placeholders))  # fmt: skip


class Reader:
    """read_rows with a memory: after iterating, `format`, `rows` and `bad` say what was found. Iterable once."""

    def __init__(
        self,
        path: str | Path,
        *,
        format: str | None = None,
        on_bad: OnBad = "raise",
        bad: list[tuple[str, str]] | None = None,
        max_line_bytes: int = MAX_LINE_BYTES,
        placeholders: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.on_bad, self.bad = path, on_bad, [] if bad is None else bad
        self.max_line_bytes, self.placeholders = max_line_bytes, placeholders
        self.rows, self.bad_rows, self.file, self.place = 0, 0, Path(path), 0
        self._first_error: UserError | None = None
        self.source: Opened = open_source(path)
        self._format: formats.Format | None = None
        if format is not None:
            try:
                self._format = formats.by_name(format)
            except ValueError as error:
                raise UserError("format", str(error)) from None

    @property
    def format(self) -> str | None:
        """The format's name; None until a row was recognised."""
        return self._format.name if self._format else None

    def __iter__(self) -> Iterator[Row]:
        for row, _ in self.with_records():
            yield row

    def with_records(self) -> Iterator[tuple[Row, Record]]:
        """Each row beside the record that it was made from."""
        for file in self.source.files:
            self.file = file
            for record in iter_records(file, max_line_bytes=self.max_line_bytes, txt=self.source.txt):
                self.place = record.place
                try:
                    row = self._parse(record)
                except RowError as error:
                    self._reject(error)
                    continue
                self.rows += 1
                yield row, record
        if not self.rows:
            raise self._first_error or UserError(self.path, "the file holds no rows", "give a file with at least one")

    @property
    def where(self) -> str:
        """The row just read, as file:line."""
        unit = " row " if file_kind(self.file) == "parquet" else ":"
        return f"{self.file}{unit}{self.place}"

    def _parse(self, record: Record) -> Row:
        if record.error is not None:
            raise record.error
        value = record.value or {}
        if self.source.convert:
            value = self.source.convert(value)
        if self.placeholders:
            value = formats.fill(value, self.placeholders)
        if self._format is None:
            self._format = formats.recognise(value)
        row = formats.parse(value, self._format)
        return self._find_images(row) if isinstance(row, ImageChat) else row

    def _reject(self, error: RowError) -> None:
        fault = UserError(self.where, error.why, error.fix)
        self._first_error = self._first_error or fault
        self.bad_rows += 1
        if self.on_bad == "raise":
            raise fault from None
        if not self.rows and self.bad_rows == _HOPELESS:
            raise self._first_error from None
        self.bad.append((self.where, error.why))

    def _find_images(self, row: ImageChat) -> ImageChat:
        """Relative picture paths are looked for beside the file, then in the folder above; else left as written."""
        found: list[str | bytes] = []
        for image in row.images:
            if isinstance(image, str) and not Path(image).is_absolute():
                beside = [folder / image for folder in (self.file.parent, self.file.parent.parent)]
                image = next((str(one) for one in beside if one.is_file()), image)
            found.append(image)
        return replace(row, images=found)
