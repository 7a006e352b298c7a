"""What should not be learned twice, or at all? Exact and near duplicates, and rows of the wrong length or letters.

Near duplicates: MinHash over character n-grams (Broder 1997) with LSH bands (datasketch); n-grams of characters need no
words, so Chinese and English go through the same code. Memory: about 4 KB a kept row while near duplicates are sought.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groundup.data.language import charset_ratio, language
from groundup.data.read import Reader
from groundup.data.records import Record
from groundup.data.rows import row_text
from groundup.errors import UserError
from groundup.files import explain

if TYPE_CHECKING:
    from rich.console import Console

_PERMUTATIONS = 128
_EXAMPLES = 3


@dataclass
class CleanReport:
    """rows = kept + the sum of removed. removed: reason -> rows; examples: reason -> [{"where", "why", "text"}]."""

    output: str
    removed_file: str
    format: str | None = None
    rows: int = 0
    kept: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    def print(self, console: Console | None = None) -> None:
        """The report for a person."""
        from rich.console import Console
        from rich.text import Text

        console = console or Console()
        console.print(Text(f"kept {self.kept:,} of {self.rows:,} rows ({self.format}) in {self.output}"))
        for reason, count in self.removed.items():
            console.print(Text(f"{count:>9,} {reason}", style="bold"))
            for one in self.examples[reason]:
                console.print(Text(f"          {one['where']}: {one['why']}: {one['text']}", style="dim"))
        if self.removed:
            console.print(Text(f"what went is in {self.removed_file}"))


@dataclass(frozen=True)
class Limits:
    """Which rows stay, by their characters (`rows.row_text`). 0 or nothing: no limit."""

    min_chars: int = 1
    max_chars: int = 0
    min_charset_ratio: float = 0.0
    languages: Sequence[str] = ()

    def fault(self, text: str) -> tuple[str, str] | None:
        """(reason, detail) why the row goes; None where it stays."""
        if len(text.strip()) < self.min_chars:
            return "too short", f"{len(text.strip())} characters"
        if self.max_chars and len(text) > self.max_chars:
            return "too long", f"{len(text)} characters"
        if self.min_charset_ratio and (share := charset_ratio(text)) < self.min_charset_ratio:
            return "charset", f"{share:.2f} of it is letters and digits"
        if self.languages and (found := language(text)) not in self.languages:
            return "language", found
        return None


def clean(
    paths: Iterable[str | Path],
    output: str | Path,
    *,
    near_threshold: float = 0.8,
    min_chars: int = 1,
    max_chars: int = 0,
    min_charset_ratio: float = 0.0,
    languages: Sequence[str] = (),
) -> CleanReport:
    """Writes the rows worth keeping to `output` as jsonl, each jsonl line as it stood, in the order of the files.

    near_threshold: Jaccard similarity from which a row is a near duplicate of an earlier one; 0 seeks exact ones only.
    min_charset_ratio: least share of letters and digits; languages: codes of `language.language` to keep.
    The rows that went are in `OUTPUT.removed.jsonl` with where and why. Both files appear when all is done, or not at
    all. UserError where formats are mixed, nothing is left, or the output is one of the inputs.
    """
    sources, target = [str(path) for path in paths], Path(output)
    if not 0 <= near_threshold <= 1:
        raise UserError(
            "near_threshold", f"{near_threshold} is not in [0, 1]", "0.8 is usual, 0 seeks exact duplicates"
        )
    if any(Path(source).resolve() == target.resolve() for source in sources):
        raise UserError(target, "is an input as well as the output", "write to another file")
    removed = target.with_name(f"{target.name.removesuffix('.jsonl')}.removed.jsonl")
    report = CleanReport(str(target), str(removed))
    cleaner = _Cleaner(report, Limits(min_chars, max_chars, min_charset_ratio, languages), near_threshold)
    drafts = [path.with_name(f".{path.name}.tmp") for path in (target, removed)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, target) from error
    try:
        with ExitStack() as stack:
            cleaner.kept, cleaner.gone = (
                stack.enter_context(draft.open("w", encoding="utf-8", newline="")) for draft in drafts
            )
            for source in sources:
                cleaner.read(source)
        if not report.kept:
            went = ", ".join(f"{count} {reason}" for reason, count in report.removed.items())
            raise UserError(sources[0] if sources else "clean", f"no row is left ({went})", "loosen the limits")
        for draft, final in zip(drafts, (target, removed), strict=True):
            draft.replace(final)
    except OSError as error:
        raise explain(error, target) from error
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    return report


class _Cleaner:
    """Decides row by row, and remembers what it has seen."""

    def __init__(self, report: CleanReport, limits: Limits, near_threshold: float) -> None:
        self.report, self.limits = report, limits
        self.seen: dict[bytes, str] = {}
        self.near = _Near(near_threshold) if near_threshold else None
        self.kept: Any = None
        self.gone: Any = None

    def read(self, source: str) -> None:
        """All rows of one source."""
        reader = Reader(source, on_bad="count")
        counted = 0
        for row, record in reader.with_records():
            counted = self._bad(reader, counted)
            if self.report.format not in (None, reader.format):
                why = f"is of format {reader.format}, the files before it of {self.report.format}"
                raise UserError(source, why, "clean each format into a file of its own")
            self.report.format = reader.format
            self.report.rows += 1
            text = row_text(row)
            fault = self.limits.fault(text) or self._duplicate(text, reader.where)
            if fault:
                self._remove(reader.where, *fault, text, record)
            else:
                self.report.kept += 1
                self.kept.write(_line(reader, record) + "\n")
        self._bad(reader, counted)

    def _bad(self, reader: Reader, counted: int) -> int:
        """Takes over the rows that the reader could not use since the last call."""
        for where, why in reader.bad[counted:]:
            self.report.rows += 1
            self._remove(where, "unreadable", why, "", None)
        return len(reader.bad)

    def _duplicate(self, text: str, where: str) -> tuple[str, str] | None:
        normal = " ".join(text.lower().split())
        key = hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in self.seen:
            return "exact duplicate", f"as {self.seen[key]}"
        self.seen[key] = where
        return self.near.duplicate(normal, where) if self.near else None

    def _remove(self, where: str, reason: str, why: str, text: str, record: Record | None) -> None:
        self.report.removed[reason] = self.report.removed.get(reason, 0) + 1
        examples = self.report.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append({"where": where, "why": why, "text": " ".join(text[:80].split())})
        row = record.value if record else None
        self.gone.write(json.dumps({"where": where, "reason": reason, "why": why, "row": row}, ensure_ascii=False,
                                   default=lambda value: f"<{type(value).__name__}>") + "\n")  # fmt: skip


class _Near:
    """The rows kept so far, findable by likeness."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self.threshold = threshold
        # LSH alone errs around the threshold; it proposes (a little below it), the signatures decide.
        self.index = MinHashLSH(threshold=max(threshold - 0.05, 0.01), num_perm=_PERMUTATIONS, hashfunc=hash)
        self.signatures: list[np.ndarray] = []
        self.places: list[str] = []

    def duplicate(self, text: str, where: str) -> tuple[str, str] | None:
        """Like which earlier row, if any; else the row is remembered. Text shorter than one n-gram is like none."""
        from datasketch import MinHash

        shingles = shingle_hashes(text)
        if not len(shingles):
            return None
        sketch = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
        for start in range(0, len(shingles), 4096):  # datasketch makes a (shingles, permutations) matrix
            sketch.update_batch(shingles[start : start + 4096].tolist())
        signature = sketch.hashvalues.astype(np.uint32)
        for candidate in self.index.query(sketch):
            alike = float(np.mean(self.signatures[candidate] == signature))
            if alike >= self.threshold:
                return "near duplicate", f"{alike:.2f} like {self.places[candidate]}"
        self.index.insert(len(self.places), sketch, check_duplication=False)
        self.signatures.append(signature)
        self.places.append(where)
        return None


def shingle_hashes(text: str) -> np.ndarray:
    """The set of a text's character n-grams as sorted uint32 hashes: 3 characters where it is Chinese, Japanese or
    Korean, else 5 (about a word either way). Two texts' Jaccard similarity is that of these sets."""
    size = 3 if language(text) in ("zh", "ja", "ko") else 5
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    if len(codes) < size:
        return np.empty(0, dtype=np.uint64)
    count = len(codes) - size + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for step in range(size):  # a polynomial of the n-gram modulo 2^64
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + codes[step : step + count]
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.unique(mixed >> np.uint64(32))


def _line(reader: Reader, record: Record) -> str:
    if record.raw is not None:
        return record.raw.rstrip("\r\n")
    try:
        return json.dumps(record.value, ensure_ascii=False)
    except TypeError:
        why = "holds pictures, which jsonl cannot"
        raise UserError(reader.where, why, "clean a jsonl file that names picture files") from None
