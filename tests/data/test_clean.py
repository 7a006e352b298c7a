"""`data clean`: what goes is what should, what stays is byte for byte what it was, and every row is accounted for."""

from __future__ import annotations

import errno
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from groundup.data.clean import CleanReport, clean, shingle_hashes
from groundup.data.read import read_rows
from groundup.errors import UserError

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 400)]
WORDS = ["river", "stone", "lamp", "quiet", "garden", "seven", "morning", "copper", "window", "bridge", "early", "salt"]


def chinese(seed: int, length: int = 200) -> str:
    return "".join(random.Random(seed).choices(HAN, k=length))


def english(seed: int, length: int = 80) -> str:
    draw = random.Random(seed)
    return " ".join(f"{draw.choice(WORDS)}{draw.randrange(100)}" for _ in range(length))


def write(path: Path, rows: list[dict[str, Any]] | list[str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def kept(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def removed(report: CleanReport) -> list[dict[str, Any]]:
    return [json.loads(line) for line in kept(Path(report.removed_file))]


def test_kept_lines_are_unchanged_and_exact_duplicates_go(tmp_path: Path) -> None:
    odd = '{"text":  "caf\\u00e9 one",   "extra": [1]}'
    one = write(tmp_path / "a.jsonl", [odd, '{"text": "two"}', '{"text": "CAFÉ  one\\n"}'])
    two = write(tmp_path / "b.jsonl", ['{"text": "two"}', '{"text": "three"}'])
    report = clean([one, two], tmp_path / "out" / "c.jsonl")
    assert kept(tmp_path / "out" / "c.jsonl") == [odd, '{"text": "two"}', '{"text": "three"}']
    assert (report.rows, report.kept, report.removed) == (5, 3, {"exact duplicate": 2})
    assert [one["why"] for one in removed(report)] == [f"as {one}:1", f"as {one}:2"]
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("make", [chinese, english])
def test_near_duplicates_go_in_both_languages(tmp_path: Path, make: Any) -> None:
    texts = [make(seed) for seed in range(60)]
    changed = [text[:50] + "新" + text[51:] for text in texts[:20]]
    half = [text[: len(text) // 2] + make(seed + 1000)[: len(text) // 2] for seed, text in enumerate(texts[:20])]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts + changed + half])
    report = clean([path], tmp_path / "c.jsonl")
    assert report.removed == {"near duplicate": 20}
    assert {row["row"]["text"] for row in removed(report)} == set(changed)
    assert all(
        "like" in row["why"] and f"{path}:{number}" in row["why"] for number, row in enumerate(removed(report), 1)
    )
    assert clean([path], tmp_path / "d.jsonl", near_threshold=0).kept == 100


def test_shingles_give_the_jaccard_similarity() -> None:
    one, two = chinese(1, 500), chinese(1, 400) + chinese(2, 100)
    sets = [{text[at : at + 3] for at in range(len(text) - 2)} for text in (one, two)]
    hashed = [set(shingle_hashes(text).tolist()) for text in (one, two)]
    exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert len(hashed[0] & hashed[1]) / len(hashed[0] | hashed[1]) == pytest.approx(exact)
    assert len(shingle_hashes("ab")) == 0


def test_limits_and_reasons(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("ok english words", "x", "long " * 50, "?!?!?!?!ab", "只有中文的一句话", "  ")]
    path = write(tmp_path / "a.jsonl", rows)
    report = clean([path], tmp_path / "c.jsonl", min_chars=3, max_chars=100, min_charset_ratio=0.5, languages=["en"])
    assert [json.loads(line)["text"] for line in kept(tmp_path / "c.jsonl")] == ["ok english words"]
    assert report.removed == {"too short": 1, "too long": 1, "charset": 1, "language": 1, "unreadable": 1}
    assert report.rows == report.kept + sum(report.removed.values())
    assert report.examples["language"][0] == {"where": f"{path}:5", "why": "zh", "text": "只有中文的一句话"}


def test_unreadable_rows_are_counted_and_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ['{"text": "a"}', '{"text": ', '{"text": "b"}', '{"txt": "c"}'])
    report = clean([path], tmp_path / "c.jsonl")
    assert (report.rows, report.kept, report.removed) == (4, 2, {"unreadable": 2})
    assert [row["where"] for row in removed(report)] == [f"{path}:2", f"{path}:4"]


def test_chats_and_other_files_become_jsonl_that_reads_the_same(tmp_path: Path) -> None:
    rows = [{"instruction": f"question {n}", "input": "", "output": chinese(n)} for n in range(5)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows + rows[:2]))
    report = clean([path], tmp_path / "c.jsonl")
    assert report.removed == {"exact duplicate": 2}
    assert list(read_rows(tmp_path / "c.jsonl")) == list(read_rows(path))[:5]


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    text, chat = write(tmp_path / "a.jsonl", ['{"text": "a"}']), write(tmp_path / "b.jsonl", ['{"prompt": "a"}'])
    before = text.read_bytes()
    with pytest.raises(UserError, match="input as well as the output"):
        clean([text], text)
    with pytest.raises(UserError, match="is of format prompt"):
        clean([text, chat], tmp_path / "c.jsonl")
    with pytest.raises(UserError, match="no row is left"):
        clean([text], tmp_path / "c.jsonl", min_chars=10)
    with pytest.raises(UserError, match="near_threshold"):
        clean([text], tmp_path / "c.jsonl", near_threshold=1.5)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        clean([text], tmp_path / "file" / "c.jsonl")
    assert text.read_bytes() == before
    assert {one.name for one in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", "file"}


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, output = write(tmp_path / "a.jsonl", ['{"text": "a"}']), write(tmp_path / "c.jsonl", ["old"])

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("groundup.data.clean._line", full)
    with pytest.raises(UserError, match="the disk is full"):
        clean([path], output)
    assert kept(output) == ["old"] and len(list(tmp_path.iterdir())) == 2


def test_an_old_output_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    output = write(tmp_path / "c.jsonl", ['{"text": "old"}'])
    broken = tmp_path / "a.json"
    broken.write_text('[{"text": "a"}, {"text": "b"')
    with pytest.raises(UserError, match=r"a\.json:1"):
        clean([broken], output)
    assert kept(output) == ['{"text": "old"}']


def test_report_for_people_and_programs(tmp_path: Path) -> None:
    from rich.console import Console

    report = clean([write(tmp_path / "a.jsonl", ['{"text": "a"}', '{"text": "a"}'])], tmp_path / "c.jsonl")
    found = json.loads(json.dumps(report.to_json()))
    assert (found["rows"], found["kept"], found["removed"]) == (2, 1, {"exact duplicate": 1})
    out = io.StringIO()
    report.print(Console(file=out, width=300))
    assert "kept 1 of 2 rows (text)" in out.getvalue() and "1 exact duplicate" in out.getvalue()
