"""Which language is a text in? By its letters only: enough to count rows and to filter them."""

from __future__ import annotations

import re

_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_KANA = re.compile(r"[\u3040-\u30ff]")
_HANGUL = re.compile(r"[\uac00-\ud7af\u1100-\u11ff]")
_LATIN = re.compile(r"[A-Za-z]")
_LETTER = re.compile(r"[^\W\d_]")
_NO_WORD = re.compile(r"[\W_]+")
_SPACE = re.compile(r"\s+")
_LOOK = 4000  # characters that decide


def language(text: str) -> str:
    """zh, en, ja, ko or other. en stands for unaccented Latin letters; a quarter of han letters makes a text zh."""
    text = text[:_LOOK]
    letters = len(_LETTER.findall(text))
    if not letters:
        return "other"
    han, kana, hangul = (len(script.findall(text)) for script in (_HAN, _KANA, _HANGUL))
    if hangul > letters / 3:
        return "ko"
    if kana > (han + kana) / 5 and han + kana > letters / 3:
        return "ja"
    if han > letters / 4:  # one of them says as much as several Latin letters
        return "zh"
    return "en" if len(_LATIN.findall(text)) > (letters - han) * 0.8 else "other"


def charset_ratio(text: str) -> float:
    """Share of letters and digits of any script among the characters that are no white space; 0 for none."""
    visible = len(_SPACE.sub("", text))
    return len(_NO_WORD.sub("", text)) / visible if visible else 0.0
