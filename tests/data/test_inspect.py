"""`data inspect`: the numbers are those of the file and of the tokenizer, and what is green is what is trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from groundup.data.inspect import inspect_file, token_ids
from groundup.data.language import charset_ratio, language
from groundup.data.rows import Chat, Choice, ImageChat, Preference, Prompt, Stepwise, Text, Unpaired
from groundup.errors import UserError
from groundup.tokenizer import Tokenizer, train_tokenizer

Q, A, B = (
    {"role": role, "content": text}
    for role, text in (("user", "你好 hello"), ("assistant", "yes"), ("assistant", "no"))
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["hello world yes no", "你好世界"] * 20, 320)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_counts_lengths_and_languages_are_exact(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["hello world " * n for n in range(1, 40)] + ["你好世界" * n for n in range(1, 20)]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts] + [{"text": ""}])
    report = inspect_file(path, tokenizer, samples=5)
    lengths = [len(tokenizer.encode(text)) + 2 for text in texts]
    assert (report.format, report.rows, report.bad_rows) == ("text", 58, 1)
    assert report.tokens == sum(lengths)
    assert report.trained_tokens == sum(lengths) - 58  # all but bos
    assert report.lengths["max"] == max(lengths) and report.lengths["min"] == min(lengths)
    assert sum(bar["rows"] for bar in report.histogram) == 58
    assert all(any(bar["from"] <= length < bar["to"] for bar in report.histogram) for length in lengths)
    assert {name: part["rows"] for name, part in report.languages.items()} == {"en": 39, "zh": 19}
    assert sum(part["tokens"] for part in report.languages.values()) == report.tokens
    assert report.bad[0]["where"].endswith("a.jsonl:59")
    assert len(report.samples) == 5


def test_json_has_the_promised_keys_and_a_real_number_without_a_tokenizer(tmp_path: Path) -> None:
    rows = [{"conversations": [Q, A | {"content": f"answer {n}"}]} for n in range(50)]
    found = json.loads(json.dumps(inspect_file(write(tmp_path / "a.jsonl", rows)).to_json()))
    assert {"format", "rows", "bad_rows", "tokens"} <= found.keys()
    assert (found["format"], found["rows"], found["bad_rows"]) == ("minimind", 50, 0)
    assert found["tokens"] > 50 * 5 and 0 < found["trained_tokens"] < found["tokens"]
    assert "trained on a sample of this file" in found["tokenizer"]


def test_the_pieces_are_the_conversation_and_the_trained_ones_the_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = inspect_file(write(tmp_path / "a.jsonl", [{"messages": [Q, A]}]), tokenizer)
    pieces = report.samples[0]["pieces"]
    rendered = tokenizer.render([Q, A])
    assert "".join(text for text, _ in pieces) == tokenizer.decode(rendered.ids)
    assert "".join(text for text, trained in pieces if trained) == "yes<|im_end|>"


def test_print_colours_trained_tokens_green(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from rich.console import Console

    report = inspect_file(write(tmp_path / "a.jsonl", [{"messages": [Q, A]}, {"messages": []}]), tokenizer)
    out = io.StringIO()
    report.print(Console(file=out, force_terminal=True, color_system="standard", width=200))
    shown = out.getvalue()
    assert "\x1b[32myes<|im_end|>" in shown
    assert "openai, 1 rows (1 Chat), 1 bad" in shown and "a.jsonl:2" in shown


def test_masks_of_every_kind_of_row(tokenizer: Tokenizer) -> None:
    def trained(row: Any) -> str:
        ids, mask = token_ids(row, tokenizer)
        assert len(ids) == len(mask) > 0
        return tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])

    assert trained(Text("hello")) == "hello<|im_end|>"
    assert trained(Chat([Q, A, Q, B])) == "yes<|im_end|>no<|im_end|>"
    assert trained(Preference([Q, A, Q], [A], [B])) == "yes<|im_end|>no<|im_end|>"  # not the turn inside the prompt
    assert trained(Unpaired([Q, A], False)) == "yes<|im_end|>"
    assert trained(ImageChat([Q, A], [b""])) == "yes<|im_end|>"
    assert trained(Prompt([Q])) == trained(Choice("q", ["a", "b"], 0)) == trained(Stepwise([Q], ["s"], [True])) == ""


def test_a_file_of_bad_rows_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: no known format has the keys: txt"):
        inspect_file(write(tmp_path / "a.jsonl", [{"txt": "x"}] * 3))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("今天天气很好。", "zh"),
        ("The weather is fine.", "en"),
        ("用 Python 写一个函数 sort", "zh"),
        ("今日はとても良い天気です", "ja"),
        ("오늘은 날씨가 좋다", "ko"),
        ("Сегодня хорошая погода", "other"),
        ("123 + 456", "other"),
    ],
)
def test_language_by_letters(text: str, code: str) -> None:
    assert language(text) == code


def test_charset_ratio_counts_letters_and_digits_of_any_script() -> None:
    assert charset_ratio("ab 12 你好") == 1
    assert charset_ratio("ab----") == pytest.approx(1 / 3)
    assert charset_ratio(" \n") == 0
