"""Which paragraphs of some files are about a question? Okapi BM25 (Robertson and Zaragoza 2009, equation 3.15)."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from groundup.errors import UserError

SUFFIXES = (".txt", ".md", ".rst")
MAX_MB = 64  # of text; more is a matter for a search engine
K1, B = 1.2, 0.75
_TOKEN = re.compile(r"[\u3400-\u9fff]+|[^\W_]+")


class Index:
    """The paragraphs of a file or folder, in memory; a longer one than `longest` characters is cut into several."""

    def __init__(self, path: Path, longest: int = 400) -> None:
        self.passages: list[str] = []
        self._counts: list[int] = []
        self._postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for where, text in _passages(path, longest):
            found = Counter(_tokens(text))
            for token, count in found.items():
                self._postings[token].append((len(self.passages), count))
            self.passages.append(f"{where}: {text}")
            self._counts.append(sum(found.values()))
        if not self.passages:
            raise UserError(path, f"holds no text to search ({', '.join(SUFFIXES)})", "give a folder of text files")
        self._mean = sum(self._counts) / len(self._counts) or 1.0

    def best(self, query: str, top: int) -> list[str]:
        """The passages that fit best, best first; none that shares no word with the query."""
        scores = self.scores(query)
        return [self.passages[i] for i in sorted(scores, key=lambda i: (-scores[i], i))[:top]]

    def scores(self, query: str) -> dict[int, float]:
        """Number of a passage -> how well it fits, for those that share a word with the query."""
        scores: dict[int, float] = defaultdict(float)
        for token in sorted(set(_tokens(query))):  # sums come out the same in every process
            found = self._postings.get(token, [])
            rarity = math.log(1 + (len(self.passages) - len(found) + 0.5) / (len(found) + 0.5))
            for passage, count in found:
                length = 1 - B + B * self._counts[passage] / self._mean
                scores[passage] += rarity * count * (K1 + 1) / (count + K1 * length)
        return dict(scores)


def _tokens(text: str) -> Iterator[str]:
    """Words in small letters; of Chinese, which has no spaces, single characters and pairs."""
    for run in _TOKEN.findall(text.lower()):
        if "\u3400" <= run[0] <= "\u9fff":
            yield from run
            yield from ("".join(pair) for pair in pairwise(run))
        else:
            yield run


def _passages(path: Path, longest: int) -> Iterator[tuple[str, str]]:
    """(file:line, paragraph). Links that lead out of the folder are not followed."""
    if not path.exists():
        raise UserError(path, "there is no such file or folder", "give a folder of text files")
    root = path.resolve()
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.suffix in SUFFIXES)
    files = [one for one in files if one.is_file() and one.resolve().is_relative_to(root)]
    size = sum(one.stat().st_size for one in files)
    if size > MAX_MB * 2**20:
        raise UserError(path, f"holds {size / 2**20:.0f} MB of text, over {MAX_MB}", "give a smaller folder")
    for file in files:
        name = file.name if path.is_file() else str(file.relative_to(path))
        line = 1
        for paragraph in re.split(r"(\n\s*\n)", file.read_text(encoding="utf-8", errors="replace")):
            text = " ".join(paragraph.split())
            for at in range(0, len(text), longest):
                yield f"{name}:{line}", text[at : at + longest]
            line += paragraph.count("\n")
