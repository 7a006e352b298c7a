"""What does a reply answer in the end? Its last words, found where people and models put them, in a form to compare.

In this order: `<answer>..</answer>`, `\\boxed{..}`, what follows `####` (GSM8K), what "the answer is" or 答案是 names,
else the last line of what is said after the thoughts. Of several the last one counts: a model may correct itself.
"""

from __future__ import annotations

import re
from fractions import Fraction

from groundup.infer.thinking import split_thinking

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHED = re.compile(r"####[ \t]*(\S[^\n]*)")
_NAMED = re.compile(r"(?:\banswer(?:\s+is|\s*[:=])|答案\s*(?:是|为|[:：=]))\s*[:：]?\s*(?=(\S[^\n]*))", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?](?=\s|$)|[。！？]")  # "3.5" goes on
_AROUND = " \t\n*_`\"'“”‘’「」$.!?。！？,，;；:："
_NUMBER = re.compile(r"([+-]?)\s*[$€£¥￥]?\s*(\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*(\d+))?\s*%?")


def final_answer(reply: str) -> str:
    """The answer as it was written, without marks and punctuation around it; "" where the reply never came to one:
    it is empty, or ended within a thought (a reply whose prompt opened the thought must begin with `<think>`)."""
    said = split_thinking(reply)[1]
    for found in (_last(_TAGGED, said), _boxed(said), _last(_HASHED, said)):
        if found is not None:
            return _tidy(found)
    named = _last(_NAMED, said)
    if named is not None:
        return _tidy(_SENTENCE.split(named, maxsplit=1)[0])
    lines = said.strip().splitlines()
    return _tidy(lines[-1]) if lines else ""


def comparable(answer: str) -> str:
    """A key, equal for answers that mean the same: `1,000`, `$1000` and `1000.0`; `1/2` and `.5`; `Tom` and `tom`."""
    number = _NUMBER.fullmatch(answer.strip())
    if number:
        sign, digits, below = number.groups()
        value = Fraction(digits.replace(",", ""))
        if below is None or int(below):
            value = value / int(below or 1)
            return str(-value if sign == "-" else value)
    return " ".join(answer.split()).casefold()


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    """What the pattern's last match holds."""
    found = pattern.findall(text)
    return str(found[-1]) if found else None


def _boxed(text: str) -> str | None:
    """The inside of the last \\boxed{..}, whose braces may hold others; None where they do not close."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    depth, start = 0, begin + len("\\boxed")
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + 1 : at]
    return None


def _tidy(answer: str) -> str:
    return " ".join(answer.split()).strip(_AROUND)
