"""Files in, rows out: every kind of file, in constant memory, and one line that says where a file is broken."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from groundup.data.read import Reader, open_source, read_rows
from groundup.data.rows import Chat, Choice, ImageChat, Preference, Prompt, Text, Unpaired
from groundup.errors import UserError

SHARED = Path(os.environ.get("GROUNDUP_SHARED", Path(__file__).parents[2].parent / "shared")) / "data"


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fault(path: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(path, **options))
    line = str(caught.value)
    assert "\n" not in line
    return line


TEXTS = [{"text": "one"}, {"text": "二\u2028二\x85二"}, {"text": "three"}]
ROWS = [Text("one"), Text("二\u2028二\x85二"), Text("three")]


@pytest.mark.parametrize("ascii_only", [False, True])
def test_jsonl_and_json_list_plain_zipped_with_bom_and_crlf(tmp_path: Path, ascii_only: bool) -> None:
    lines = "\r\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in TEXTS) + "\n\n"
    whole = json.dumps(TEXTS, ensure_ascii=ascii_only, indent=1)
    for number, content in enumerate((lines, whole, "\ufeff" + lines, "\ufeff \n" + whole)):
        assert list(read_rows(put(tmp_path, f"{number}.json", content))) == ROWS
        assert list(read_rows(put(tmp_path, f"{number}.jsonl.gz", gzip.compress(content.encode())))) == ROWS
        assert list(read_rows(put(tmp_path, f"{number}", content))) == ROWS  # no ending: by the first bytes


def test_a_long_list_is_read_in_pieces(tmp_path: Path) -> None:
    rows = [{"text": f"{number} " + "长" * (number * 37 % 5000)} for number in range(1200)]
    path = put(tmp_path, "a.json", json.dumps(rows, ensure_ascii=False))
    assert path.stat().st_size > 4 << 20
    assert [row.text for row in read_rows(path)] == [row["text"] for row in rows]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_memory_is_constant(tmp_path: Path, name: str) -> None:
    row = json.dumps({"text": "x" * 1000})
    content = (f"[{','.join([row] * 12000)}]" if name == "a.json" else f"{row}\n" * 12000).encode()
    path = put(tmp_path, name, gzip.compress(content, 1) if name.endswith("gz") else content)
    tracemalloc.start()
    count = sum(1 for _ in read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 12000
    assert peak < 6 << 20 < len(content)


def test_csv_keeps_cells_as_they_are(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", 'text,note\n"a, ""b""\r\nc",x\nd\x85e\u2028f,y\n')
    assert list(read_rows(path)) == [Text('a, "b"\r\nc'), Text("d\x85e\u2028f")]
    path = put(tmp_path, "a.tsv", "instruction\toutput\nq, r\ta\n")
    assert list(read_rows(path)) == [Chat([{"role": "user", "content": "q, r"}, {"role": "assistant", "content": "a"}])]


@pytest.mark.parametrize(
    "content",
    [
        "id,question,A,B,C,D,answer,explanation\n0,q,w,x,y,z,C,because\n",
        ",Question,A,B,C,D,Answer\n0,q,w,x,y,z,C\n",
        "q,w,x,y,z,C\n",
        "\ufeffquestion,a,b,c,d,answer\nq,w,x,y,z,2\n".replace(",2", ",y"),
    ],
)
def test_exams_with_and_without_a_header(tmp_path: Path, content: str) -> None:
    assert list(read_rows(put(tmp_path, "a.csv", content))) == [Choice("q", ["w", "x", "y", "z"], 2)]


def test_csv_faults_name_the_line_and_reading_goes_on(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", b'text,n\n"two\nlines",1\nshort\nbad \xff,3\n"a"b,4\ngood,5\n')
    bad: list[tuple[str, str]] = []
    assert list(read_rows(path, on_bad="count", bad=bad)) == [Text("two\nlines"), Text("good")]
    assert [where.rsplit(":", 1)[1] for where, _ in bad] == ["4", "5", "6"]
    assert [word in why for word, (_, why) in zip(("1 cells", "byte 31", "csv"), bad, strict=True)] == [True] * 3


def test_txt_is_a_document_or_a_document_a_line(tmp_path: Path) -> None:
    path = put(tmp_path, "a.txt", "one\n\n二\u2028二\r\n")
    assert list(read_rows(path)) == [Text("one\n\n二\u2028二\r\n")]
    assert list(read_rows(f"{path}:line")) == [Text("one"), Text("二\u2028二")]
    assert ":line" in fault(path, max_line_bytes=4)


def test_parquet_columns_are_keys(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    said = json.dumps([{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"conversations": [said] * 600, "image_bytes": [b"\x89PNG"] * 600}), path)
    rows = list(read_rows(path))
    assert len(rows) == 600
    assert rows[0] == ImageChat(json.loads(said), [b"\x89PNG"])
    pq.write_table(pa.table({"text": ["a", None]}), path)
    bad: list[tuple[str, str]] = []
    assert list(read_rows(path, on_bad="count", bad=bad)) == [Text("a")]
    assert bad[0][0].endswith("a.parquet row 2")
    assert "parquet" in fault(put(tmp_path, "b.parquet", b"PAR1 nonsense"))


BROKEN_LINES = [
    (b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', ":2", "broken JSON at column"),
    (b'{"text": "a"}\n{"text": \n{"text": "c"}', ":2", "broken JSON at column 9"),
    (b'{"text": "a"}\n{"text": ' + b"1" * 5000 + b'}\n{"text": "c"}', ":2", "broken JSON"),
    (b'{"text": "a"}\n\n["x"]\n{"text": "c"}', ":3", "no object"),
    (b'{"text": "a"}\n{"text": "\xb0\xa1"}\n{"text": "c"}', ":2", "byte 24 of the file"),
    (b'{"text": "a"}\n{"txt": "b"}\n{"text": "c"}', ":2", "keys: txt"),
    (b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "c"}', ":2", "surrogate"),
    (b'{"text": "a"}\n' + b"[" * 200_000 + b'\n{"text": "c"}', ":2", "deep"),
    (b'{"text": "a"}\n{"prompt": "b"}\n{"text": "c"}', ":2", "format prompt in a file of format text"),
    (b'{"text": "a"}\n{"text": "' + b"x" * 5000 + b'"}\n{"text": "c"}', ":2", "over the limit"),
]


@pytest.mark.parametrize(("content", "place", "says"), BROKEN_LINES)
def test_a_broken_line_is_named_or_counted(tmp_path: Path, content: bytes, place: str, says: str) -> None:
    path = put(tmp_path, "a.jsonl", content)
    limit = 4096 if "limit" in says else 1 << 20
    line = fault(path, max_line_bytes=limit)
    assert line.startswith(f"{path}{place}: ") and says in line
    bad: list[tuple[str, str]] = []
    assert list(read_rows(path, on_bad="count", bad=bad, max_line_bytes=limit)) == [Text("a"), Text("c")]
    assert len(bad) == 1 and bad[0][0] == f"{path}{place}" and says in bad[0][1]


def test_a_50_mb_line_is_walked_over_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(50):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "c"}\n')
    bad: list[tuple[str, str]] = []
    tracemalloc.start()
    rows = list(read_rows(path, on_bad="count", bad=bad, max_line_bytes=4 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == [Text("a"), Text("c")]
    assert peak < 16 << 20
    assert "50 MB" in bad[0][1]
    assert "max_line_bytes" in fault(path)  # over the default limit too
    assert len(list(read_rows(path, max_line_bytes=64 << 20))) == 3


@pytest.mark.parametrize(
    ("content", "place", "says"),
    [
        ('[\n{"text": "a"},\n{"text" "b"},\n{"text": "c"}]', ":3", "broken JSON"),
        ('[\n{"text": "a"}\n{"text": "b"}]', ":3", "expected , or ]"),
        ('[{"text": "a"},\n{"text": "b"}', ":2", "the end of the file"),
        ('[{"text": "a"},\n{"text": "b', ":2", "Unterminated"),
        ('[{"text": "a"},\n{"text": "b"}]\n{}', ":3", "follows the end"),
        ('[{"text": "a"},\n' + '{"x":' * 100_000 + "]", ":2", "deep"),
        ('[{"text": "a"},\n{"x":' + "1" * 5000 + "}]", ":2", "too long"),
        ('[{"text": "a"},\n{"text": "' + "x" * 9_000_000 + '"}]', ":2", "over the limit"),
    ],
)
def test_a_list_broken_in_the_middle_stops_there(tmp_path: Path, content: str, place: str, says: str) -> None:
    path = put(tmp_path, "a.json", content)
    for on_bad in ("raise", "count"):  # what follows the break cannot be found again, so nothing is passed over
        line = fault(path, on_bad=on_bad, max_line_bytes=1 << 20)
        assert line.startswith(f"{path}{place}: ") and says in line


def test_a_list_with_a_bad_byte_names_line_and_byte(tmp_path: Path) -> None:
    line = fault(put(tmp_path, "a.json", b'[\n{"text": "a"},\n{"text": "\xb0\xa1"}]'))
    assert "a.json:3: not UTF-8 at byte 27 of the file" in line


def test_files_that_cannot_be_used_at_all(tmp_path: Path) -> None:
    assert "the file is empty" in fault(put(tmp_path, "empty.jsonl", ""))
    assert "holds no rows" in fault(put(tmp_path, "blank.jsonl", "\n \n"))
    assert "directory without dataset_info.json" in fault(tmp_path)
    assert "did you mean empty.jsonl" in fault(tmp_path / "emty.jsonl")
    assert "no folder" in fault(tmp_path / "no" / "a.jsonl")
    assert "unknown kind of file '.exe'" in fault(put(tmp_path, "a.exe", "MZ"))
    zipped = gzip.compress(b'{"text": "a"}\n' * 99999)
    assert "cut or broken" in fault(put(tmp_path, "a.jsonl.gz", zipped[: len(zipped) // 2]))
    assert "sharegpt" in fault(put(tmp_path, "a.jsonl", '{"text": "a"}'), format="sharegtp")


def test_a_file_without_one_usable_row_is_an_error_even_when_counting(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '{"txt": "b"}\n' * 3)
    assert "a.jsonl:1: no known format has the keys: txt" in fault(path, on_bad="count")
    bad: list[tuple[str, str]] = []
    assert "b.jsonl:1" in fault(put(tmp_path, "b.jsonl", '{"txt": "b"}\n' * 5000), on_bad="count", bad=bad)
    assert len(bad) < 1000


def test_the_format_can_be_said_and_placeholders_filled(tmp_path: Path) -> None:
    path = put(tmp_path, "a.json", '[{"prompt": "{{name}}?", "completion": "I am {{name}}", "label": true}]')
    assert isinstance(next(read_rows(path)), Unpaired)
    row = next(read_rows(path, format="prompt-completion", placeholders={"name": "小地"}))
    assert row == Chat([{"role": "user", "content": "小地?"}, {"role": "assistant", "content": "I am 小地"}])


def test_pictures_are_found_beside_the_file_or_above(tmp_path: Path) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    put(tmp_path / "set" / "images", "1.png", b"x")
    raw = {"conversations": [{"from": "human", "value": "<image><image><image>"}, {"from": "gpt", "value": "a"}]}
    raw["images"] = ["images/1.png", "set/images/1.png", "images/2.png"]  # type: ignore[assignment]
    row = next(read_rows(put(tmp_path / "set", "a.jsonl", json.dumps(raw))))
    found = str(tmp_path / "set" / "images" / "1.png")
    assert isinstance(row, ImageChat) and row.images == [found, found, "images/2.png"]


def folder(tmp_path: Path, entries: dict[str, Any], name: str, rows: list[dict[str, Any]]) -> Path:
    put(tmp_path, "dataset_info.json", json.dumps(entries))
    put(tmp_path, name, json.dumps(rows))
    return tmp_path


def test_dataset_info_maps_columns_and_tags(tmp_path: Path) -> None:
    q, a = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    b = {"role": "assistant", "content": "b"}
    entries = {
        "mine": {"file_name": "a.json", "columns": {"prompt": "ask", "response": "say", "system": "sys"}},
        "docs": {"file_name": "a.json", "columns": {"prompt": "ask"}},
        "pairs": {"file_name": "a.json", "ranking": True,
                  "columns": {"prompt": "ask", "chosen": "say", "rejected": "bad"}},
        "talk": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "talk", "kto_tag": "ok"},
                 "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"}},
        "wrong": {"file_name": "a.json", "columns": {"prompt": "question", "response": "say"}},
        "away": {"hf_hub_url": "x/y"},
    }  # fmt: skip
    row = {"ask": "q", "say": "a", "bad": "b", "sys": "s", "ok": False,
           "talk": [{"who": "me", "what": "q"}, {"who": "it", "what": "a"}]}  # fmt: skip
    path = folder(tmp_path, entries, "a.json", [row])
    assert list(read_rows(f"{path}:mine")) == [Chat([{"role": "system", "content": "s"}, q, a])]
    assert list(read_rows(f"{path}:docs")) == [Text("q")]
    assert list(read_rows(f"{path}:pairs")) == [Preference([q], [a], [b])]
    assert list(read_rows(f"{path}:talk")) == [Unpaired([q, a], False)]
    assert "no key 'question' for prompt" in fault(f"{path}:wrong")
    assert "no file_name" in fault(f"{path}:away")
    assert "did you" in fault(f"{path}:mein") or "mine" in fault(f"{path}:mein")
    assert "has 6 entries" in fault(path)


def test_a_single_entry_needs_no_name_and_a_folder_of_files_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for number in (2, 1):
        put(tmp_path / "parts", f"{number}.jsonl", json.dumps({"text": str(number)}))
    put(tmp_path, "dataset_info.json", json.dumps({"only": {"file_name": "parts"}}))
    assert list(read_rows(tmp_path)) == [Text("1"), Text("2")]
    assert [one.name for one in open_source(tmp_path).files] == ["1.jsonl", "2.jsonl"]
    put(tmp_path, "dataset_info.json", "{")
    assert "broken JSON" in fault(tmp_path)


# What shared/data/MANIFEST.tsv says, by the kind of row that each folder must become.
SHARED_ROWS = {
    "pretrain": {Text: 35666},
    "sft": {Chat: 21735},
    "preference": {Preference: 3329, Unpaired: 271},
    "reasoning": {Prompt: 22743, Chat: 1987},
    "eval": {Choice: 23464, Prompt: 1935},
    "vlm": {ImageChat: 11738},
}


@pytest.mark.parametrize("part", list(SHARED_ROWS))
def test_every_shared_file_is_read_without_a_bad_row(part: str) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED} (set GROUNDUP_SHARED)")
    kinds: Counter[type] = Counter()
    for path in sorted((SHARED / part).rglob("*")):
        if path.suffix in (".jsonl", ".json", ".csv", ".parquet"):
            reader = Reader(path)
            kinds.update(type(row) for row in reader)
            assert reader.rows and not reader.bad
    assert kinds == SHARED_ROWS[part]
