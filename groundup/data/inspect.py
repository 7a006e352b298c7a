"""What is in this file? Its format, counts, lengths in tokens, languages, and rows as the model would see them."""

from __future__ import annotations

import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import groundup.data.rows as kinds
from groundup.data.language import language
from groundup.data.read import Reader, read_rows
from groundup.data.rows import Row, row_text
from groundup.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from groundup.tokenizer import Tokenizer

_OWN_VOCABULARY, _OWN_BYTES = 6400, 1_000_000
_SHOWN = 1200  # characters of a sample on the terminal


@dataclass
class Report:
    """What inspect_file found. lengths and the histogram count tokens a row; a bar's `to` is not in it any more.

    languages: {"zh": {"rows", "characters", "tokens"}}. samples: {"kind", "tokens", "trained_tokens", "pieces"}, a
    piece being (text, whether it is trained). context_answers: answers that are not trained, as the chat template shows
    them otherwise than they were said. template: what check_template found. notes: the first of those answers and the
    first bad row, with a diff.
    """

    path: str
    format: str | None
    rows: int = 0
    bad_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    tokenizer: str = ""
    kinds: dict[str, int] = field(default_factory=dict)
    languages: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: dict[str, float] = field(default_factory=dict)
    histogram: list[dict[str, int]] = field(default_factory=list)
    bad: list[dict[str, str]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    context_answers: int = 0
    template: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    def print(self, console: Console | None = None) -> None:
        """The report for a person; trained tokens are green."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = console or Console()
        made = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        console.print(Text(f"{self.path}: {self.format}, {self.rows:,} rows ({made}), {self.bad_rows:,} bad"))
        share = f"{self.trained_tokens / self.tokens:.0%} trained" if self.tokens else "none"
        console.print(Text(f"{self.tokens:,} tokens ({share}) by {self.tokenizer}"))
        for one in self.bad[:5]:
            console.print(Text(f"  bad {one['where']}: {one['why']}", style="red"))
        if self.context_answers:
            console.print(Text(f"{self.context_answers:,} answers are context alone: the chat template rewrites them"))
        for note in self.notes:
            console.print(Text(note, style="red"))
        if self.template:
            from groundup.tokenizer.check import TemplateReport

            console.print(Text("\n".join(TemplateReport(**self.template).lines())))
        table = Table("language", "rows", "characters", "tokens", "characters a token")
        for name, part in self.languages.items():
            ratio = f"{part['characters'] / max(part['tokens'], 1):.2f}"
            table.add_row(name, f"{part['rows']:,}", f"{part['characters']:,}", f"{part['tokens']:,}", ratio)
        console.print(table)
        console.print(
            Text("tokens a row: " + ", ".join(f"{name} {value:,.0f}" for name, value in self.lengths.items()))
        )
        most = max((bar["rows"] for bar in self.histogram), default=1)
        for bar in self.histogram:
            blocks = "█" * max(1, round(40 * bar["rows"] / most)) if bar["rows"] else ""
            console.print(Text(f"{bar['from']:>9,} - {bar['to'] - 1:<9,} {bar['rows']:>9,} {blocks}"))
        for number, sample in enumerate(self.samples, 1):
            counts = f"{sample['tokens']:,} tokens, {sample['trained_tokens']:,} trained (green)"
            head = f"\n{sample['kind']} {number}: {counts}"
            console.print(Text(head, style="bold"))
            console.print(_coloured(sample["pieces"]))


def inspect_file(path: str | Path, tokenizer: Tokenizer | None = None, *, samples: int = 3, seed: int = 0) -> Report:
    """Reads the whole file once (twice without a tokenizer) in constant memory; lengths take 4 bytes a row.

    Without a tokenizer one of 6,400 entries is trained on an even sample of the file itself, and the report says so.
    samples: rows shown, drawn by the seed. UserError where no row can be read at all.
    """
    path = str(path)
    given = tokenizer
    if tokenizer is None:
        from groundup.tokenizer import train_tokenizer

        texts = (row_text(row) for row in read_rows(path, on_bad="count"))
        tokenizer = train_tokenizer(texts, _OWN_VOCABULARY, max_bytes=_OWN_BYTES)
        name = f"{tokenizer.vocab_size:,} entries trained on a sample of this file"
    else:
        name = f"the tokenizer given ({tokenizer.vocab_size:,} entries)"
    reader = Reader(path, on_bad="count")
    lengths, made = array("I"), Counter[str]()
    languages: dict[str, Counter[str]] = defaultdict(Counter)
    report = Report(path, None, tokenizer=name)
    chosen: list[Row] = []
    draw = random.Random(seed)
    for row in reader:
        try:
            ids, mask, context = _encoded(row, tokenizer)
        except UserError as error:  # a template may refuse a conversation, or teach something else than it holds
            reader.bad.append((reader.where, error.why))
            _note(report, "not trained", reader.where, error)
            continue
        report.context_answers += len(context)
        if context:
            _note(report, "an answer is context alone", reader.where, context[0])
        lengths.append(len(ids))
        report.trained_tokens += sum(mask)
        made[type(row).__name__] += 1
        text = row_text(row)
        languages[language(text)].update(rows=1, characters=len(text), tokens=len(ids))
        _reservoir(chosen, row, len(lengths), samples, draw)
    report.format, report.rows, report.bad_rows = reader.format, len(lengths), len(reader.bad)
    report.tokens, report.kinds = sum(lengths), dict(made)
    report.languages = {key: dict(languages[key]) for key in sorted(languages)}
    report.lengths, report.histogram = _lengths(lengths), _histogram(lengths)
    report.bad = [{"where": where, "why": why} for where, why in reader.bad[:20]]
    report.samples = [_sample(row, tokenizer) for row in chosen]
    if given is not None and given.chat_template and set(made) != {"Text"}:
        from groundup.tokenizer.check import check_template

        report.template = check_template(given).to_json()
    return report


def _note(report: Report, what: str, where: str, error: UserError) -> None:
    """Keep the diff of the first row of each kind of fault."""
    if error.detail and not any(what in note for note in report.notes):
        report.notes.append(f"{where}: {what}: {error.why}\n{error.detail}")


def token_ids(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A row as (ids, mask), mask 1 where training learns the token. A Preference is its two conversations in turn."""
    ids, mask, _ = _encoded(row, tokenizer)
    return ids, mask


def _encoded(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[int], tuple[UserError, ...]]:
    """token_ids, and why some of the answers are context alone."""
    if isinstance(row, kinds.Text):
        ids = [tokenizer.bos_id, *tokenizer.encode(row.text), tokenizer.eos_id]
        return ids, [0] + [1] * (len(ids) - 1), ()
    if isinstance(row, kinds.Choice | kinds.Stepwise):
        ids = tokenizer.encode(row_text(row))
        return ids, [0] * len(ids), ()
    if isinstance(row, kinds.Prompt):
        ids = tokenizer.render(row.messages, row.tools, add_generation_prompt=True).ids
        return ids, [0] * len(ids), ()
    if isinstance(row, kinds.Preference):
        asked = len(tokenizer.render(row.prompt, row.tools).ids)
        both = [tokenizer.render(row.prompt + side, row.tools) for side in (row.chosen, row.rejected)]
        ids = [token for one in both for token in one.ids]
        return ids, [bit for one in both for bit in [0] * asked + list(one.mask[asked:])], ()
    rendered = tokenizer.render(row.messages, row.tools)
    return list(rendered.ids), list(rendered.mask), rendered.context


def _reservoir(chosen: list[Row], row: Row, seen: int, size: int, draw: random.Random) -> None:
    """Keeps `size` rows, every row so far with the same chance."""
    if len(chosen) < size:
        chosen.append(row)
    elif (place := draw.randrange(seen)) < size:
        chosen[place] = row


def _lengths(lengths: array[int]) -> dict[str, float]:
    ordered = sorted(lengths)
    if not ordered:
        return {}
    at = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    ranks = {name: ordered[min(int(share * len(ordered)), len(ordered) - 1)] for name, share in at.items()}
    return {"min": ordered[0], "mean": sum(ordered) / len(ordered), **ranks, "max": ordered[-1]}


def _histogram(lengths: array[int]) -> list[dict[str, int]]:
    """Bars whose ends are powers of two, without a gap from the shortest row to the longest."""
    counts = Counter(length.bit_length() for length in lengths)
    span = range(min(counts, default=0), max(counts, default=-1) + 1)
    return [{"from": (1 << bits) >> 1, "to": 1 << bits, "rows": counts[bits]} for bits in span]


def _sample(row: Row, tokenizer: Tokenizer) -> dict[str, Any]:
    ids, mask = token_ids(row, tokenizer)
    pieces = [(tokenizer.decode(run), bool(trained)) for run, trained in _runs(ids, mask)]
    return {"kind": type(row).__name__, "tokens": len(ids), "trained_tokens": sum(mask), "pieces": pieces}


def _runs(ids: list[int], mask: list[int]) -> Iterator[tuple[list[int], int]]:
    for trained, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        yield [token for token, _ in run], trained


def _coloured(pieces: list[tuple[str, bool]]) -> Any:
    from rich.text import Text

    shown, left = Text(), _SHOWN
    for text, trained in pieces:
        shown.append(text[:left], style="green" if trained else "dim")
        left -= len(text)
        if left <= 0:
            shown.append(" ..", style="bold")
            break
    return shown
