from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from data_samples import chat, sentences

from groundup.data import chunks, shards
from groundup.data.encode import cut_text
from groundup.data.shards import TokenShards, tokenize_files
from groundup.data.truncate import truncate_chat, truncate_lengths
from groundup.errors import UserError
from groundup.tokenizer import Tokenizer, train_tokenizer

Write = Callable[..., str]


def documents(made: TokenShards) -> list[list[int]]:
    return [made.tokens[begin:end].tolist() for begin, end in zip(made.offsets[:-1], made.offsets[1:], strict=True)]


def left_over(cache: Path) -> list[str]:
    return [one.name for one in cache.iterdir() if not one.name.endswith(".lock")]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and real worker processes, for small files too."""
    monkeypatch.setattr(chunks, "CHUNK", 1000)
    monkeypatch.setattr(shards, "ALONE", 0)


def test_a_document_is_bos_text_eos(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    texts = ["the cat", "猫 坐 在 垫子", "<|im_end|> stays text"]
    made = tokenize_files([write("a.jsonl", texts)], tokenizer, "text", tmp_path / "c")
    assert documents(made) == [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert made.bytes.tolist() == [len(text.encode()) for text in texts]
    assert made.trained.tolist() == [len(document) - 1 for document in documents(made)]
    assert made.tokens.dtype == np.uint16 and made.mask is None and len(made) == 3
    assert {"rows": 3, "documents": 3, "tokens": len(made.tokens), "bad_rows": 0}.items() <= made.meta.items()


def test_a_chat_is_what_the_tokenizer_renders(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    rows = [chat("cat?", "mat."), chat("猫?", "鸟 飞 过 了")]
    made = tokenize_files([write("a.jsonl", rows)], tokenizer, "chat", tmp_path / "c")
    rendered = [tokenizer.render(row["messages"]) for row in rows]
    assert documents(made) == [one.ids for one in rendered]
    assert made.mask is not None and made.mask.tolist() == [m for one in rendered for m in one.mask]
    assert made.trained.tolist() == [sum(one.mask) for one in rendered]
    assert made.bytes.tolist() == [4, len("鸟 飞 过 了".encode())]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet", "rows.csv", "rows.txt:line"]
)
def test_every_kind_of_file_gives_the_same_tokens(name: str, tokenizer: Tokenizer, write: Write, tmp_path: Path):
    import csv
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = sentences(30)
    expected = tokenize_files([write("expected.jsonl", texts)], tokenizer, "text", tmp_path / "c")
    path = tmp_path / name.removesuffix(":line")
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(Path(write("a.jsonl", texts)).read_bytes()))
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"text": texts}), path)
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([["text"], *([text] for text in texts)])
    elif name.endswith(".json"):
        path.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps({"text": t}) if name == "rows.jsonl" else t for t in texts), "utf-8")
    assert documents(tokenize_files([tmp_path / name], tokenizer, "text", tmp_path / "c")) == documents(expected)


def test_order_does_not_depend_on_the_workers(small_chunks: None, tokenizer: Tokenizer, write: Write, tmp_path: Path):
    files = [write("a.jsonl", sentences(300, 1)), write("b.jsonl", sentences(200, 2))]
    made = [tokenize_files(files, tokenizer, "text", tmp_path / f"c{n}", workers=n) for n in (1, 3)]
    assert len(made[0]) == 500
    assert documents(made[0]) == documents(made[1]) and made[0].meta == made[1].meta
    assert made[0].path.name == made[1].path.name


def test_conversations_in_workers_too(small_chunks: None, tokenizer: Tokenizer, write: Write, tmp_path: Path):
    file = write("a.jsonl", [chat(f"cat {text}", text) for text in sentences(100)])
    made = [tokenize_files([file], tokenizer, "chat", tmp_path / f"c{n}", n, max_len=40) for n in (1, 2)]
    assert documents(made[0]) == documents(made[1]) and (made[0].mask == made[1].mask).all()
    assert np.diff(made[0].offsets).max() <= 40 and made[0].meta["truncated_rows"] > 10


def test_a_second_call_reads_no_row(
    tokenizer: Tokenizer, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write("a.jsonl", sentences(20))
    first = tokenize_files([file], tokenizer, "text", tmp_path / "c")
    monkeypatch.setattr(shards, "chunks", lambda *_: pytest.fail("it read the file again"))
    again = tokenize_files([file], tokenizer, "text", tmp_path / "c")
    moved = Path(file).rename(tmp_path / "moved.jsonl")
    assert again.path == first.path == tokenize_files([moved], tokenizer, "text", tmp_path / "c").path


def test_what_changes_the_tokens_changes_the_cache(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    rows = [chat("cat?", "mat."), chat("{{name}}?", "bird.")]
    file, cache = write("a.jsonl", rows), tmp_path / "c"
    other = train_tokenizer(sentences(300, seed=8), vocab_size=350)
    made = [
        tokenize_files([file], tokenizer, "chat", cache),
        tokenize_files([file], other, "chat", cache),
        tokenize_files([file], tokenizer, "text", cache),
        tokenize_files([file], tokenizer, "chat", cache, max_len=9),
        tokenize_files([file], tokenizer, "chat", cache, placeholders={"name": "cat"}),
        tokenize_files([file, file], tokenizer, "chat", cache),
    ]
    stat = Path(file).stat()
    write("a.jsonl", [rows[0], chat("{{name}}?", "birds")])  # as many bytes, and the same time
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Path(file).stat().st_size == stat.st_size
    made.append(tokenize_files([file], tokenizer, "chat", cache))
    assert len({one.path for one in made}) == len(made)


def test_large_files_are_known_by_time_and_samples(
    tokenizer: Tokenizer, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards, "HASHED", 1000)
    file = write("a.jsonl", sentences(3000))
    first = tokenize_files([file], tokenizer, "text", tmp_path / "c")
    assert tokenize_files([file], tokenizer, "text", tmp_path / "c").path == first.path
    os.utime(file, ns=(0, 0))
    assert tokenize_files([file], tokenizer, "text", tmp_path / "c").path != first.path


@pytest.mark.parametrize("harm", ["cut tokens", "no meta", "cut meta", "no offsets"])
def test_a_cache_that_is_not_whole_is_built_again(harm: str, tokenizer: Tokenizer, write: Write, tmp_path: Path):
    file = write("a.jsonl", sentences(20))
    made = tokenize_files([file], tokenizer, "text", tmp_path / "c")
    expected, name = documents(made), harm.split()[1]
    victim = next(made.path.glob(f"{name}.*"))
    if harm.startswith("cut"):
        victim.write_bytes(victim.read_bytes()[:-2])
    else:
        victim.unlink()
    assert TokenShards.open(made.path) is None
    assert documents(tokenize_files([file], tokenizer, "text", tmp_path / "c")) == expected


def test_bad_rows_are_an_error_that_names_the_line_whatever_the_chunk(
    small_chunks: None, tokenizer: Tokenizer, write: Write, tmp_path: Path
):
    file = Path(write("a.jsonl", sentences(200)))
    lines = file.read_bytes().split(b"\n")
    lines[0:0] = [b"", b"  "]  # empty lines count, but are no rows
    lines[150] = b'{"text": broken'
    lines[170] = b'{"text": "\xff"}'
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl:151: broken JSON at column 10"):
        tokenize_files([file], tokenizer, "text", tmp_path / "c", workers=2)
    assert not left_over(tmp_path / "c")
    made = tokenize_files([file], tokenizer, "text", tmp_path / "c", workers=2, on_bad="count")
    assert made.meta["bad_rows"] == 2 and len(made) == 198 and made.meta["rows"] == 200
    assert [fault["where"] for fault in made.meta["bad"]] == [f"{file}:151", f"{file}:171"]


def test_bad_rows_of_a_streamed_file_are_named_too(tokenizer: Tokenizer, tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": "cat"}, {"text": 1}, {"text": "mat"}, {"other": "x"}], indent=0))
    with pytest.raises(UserError, match=r"a\.json:5: "):
        tokenize_files([file], tokenizer, "text", tmp_path / "c")
    made = tokenize_files([file], tokenizer, "text", tmp_path / "c", on_bad="count")
    assert made.meta["bad_rows"] == 2 and len(made) == 2
    assert [fault["where"] for fault in made.meta["bad"]] == [f"{file}:5", f"{file}:11"]


def test_rows_of_the_wrong_kind_say_the_way_out(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    preference = {"prompt": "q", "chosen": "a", "rejected": "b"}
    cases = [
        (["a document"], "chat", "pretrain"),
        ([preference], "text", "Preference where a text document or a conversation"),
        ([preference], "chat", "Preference where a conversation"),
    ]
    for rows, kind, words in cases:
        with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{words}"):
            tokenize_files([write("a.jsonl", rows)], tokenizer, kind, tmp_path / "c")


def test_conversations_among_documents_become_documents(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    texts, talks = write("a.jsonl", ["the cat"]), write("b.jsonl", [chat("cat?", "mat.")])
    made = tokenize_files([texts, talks], tokenizer, "text", tmp_path / "c")
    assert documents(made)[1] == tokenizer.render(chat("cat?", "mat.")["messages"]).ids
    assert made.trained[1] == len(documents(made)[1]) - 1


def test_conversations_that_train_nothing(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    silent = {"messages": [{"role": "user", "content": "cat " * 50}, {"role": "assistant", "content": "mat " * 50}]}
    cut = {"tokenizer": tokenizer, "kind": "chat", "cache_dir": tmp_path / "c", "max_len": 1}
    with pytest.raises(UserError, match=r"a\.jsonl:1: 1 of 1 conversations train nothing.*raise seq_len"):
        tokenize_files([write("a.jsonl", [silent])], **cut)


def test_one_percent_that_trains_nothing_is_counted_and_more_is_an_error(
    tokenizer: Tokenizer, write: Write, tmp_path: Path
):
    long = chat("cat " * 400, "mat " * 30)  # in proportion, no token of the answer is left
    for good, fails in ((99, False), (98, True)):
        file = write(f"{good}.jsonl", [*(chat("cat?", "mat.") for _ in range(good)), long])
        if fails:
            with pytest.raises(UserError, match=r"98\.jsonl:99: 1 of 99 conversations train nothing"):
                tokenize_files([file], tokenizer, "chat", tmp_path / "c", max_len=13)
        else:
            made = tokenize_files([file], tokenizer, "chat", tmp_path / "c", max_len=13)
            assert made.meta["dropped_rows"] == 1 and made.meta["rows"] == 100 and len(made) == 99
            assert made.meta["dropped"][0]["where"] == f"{file}:100"


def test_left_out_rows_are_told_every_time(
    tokenizer: Tokenizer, write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = write("a.jsonl", ["cat", {"text": 5}, "mat"])
    for _ in range(2):
        caplog.clear()
        tokenize_files([file], tokenizer, "text", tmp_path / "c", on_bad="count")
        assert "1 bad rows left out, the first at" in caplog.text and f"{file}:2" in caplog.text


def test_no_usable_row_is_an_error(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    with pytest.raises(UserError, match="empty"):
        tokenize_files([write("a.jsonl", [])], tokenizer, "text", tmp_path / "c")
    preference = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for row, why in (({"text": 5}, "not a string"), (preference, "no row can be used; the first: a row of kind")):
        with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{why}"):
            tokenize_files([write("a.jsonl", [row])], tokenizer, "text", tmp_path / "c", on_bad="count")


def test_a_full_disk_is_told_and_leaves_nothing(small_chunks: None, tokenizer: Tokenizer, write: Write, tmp_path: Path):
    file = write("a.jsonl", sentences(2000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writes beyond fail, as they do on a full disk
    try:
        with pytest.raises(UserError, match=r"no room left for the tokens.*free some space") as told:
            tokenize_files([file], tokenizer, "text", tmp_path / "c", workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.tb and not psutil.Process().children()  # though the traceback still holds the generators
    assert not left_over(tmp_path / "c")
    assert len(tokenize_files([file], tokenizer, "text", tmp_path / "c", workers=2)) == 2000


def test_ctrl_c_leaves_no_half_cache_and_no_process(
    small_chunks: None, tokenizer: Tokenizer, write: Write, tmp_path: Path
):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    file = write("a.jsonl", sentences(300))
    with pytest.raises(KeyboardInterrupt):
        tokenize_files([file], tokenizer, "text", tmp_path / "c", workers=2, progress=interrupt)
    assert not left_over(tmp_path / "c") and not psutil.Process().children()
    assert len(tokenize_files([file], tokenizer, "text", tmp_path / "c", workers=2)) == 300


def test_a_killed_worker_is_an_error_and_not_a_wait(
    small_chunks: None, tokenizer: Tokenizer, write: Write, tmp_path: Path
):
    def kill(done: int, total: int) -> None:
        for child in psutil.Process().children():
            child.send_signal(signal.SIGKILL)

    with pytest.raises(UserError, match=r"a worker process: died with code -9.*fewer workers"):
        tokenize_files([write("a.jsonl", sentences(900))], tokenizer, "text", tmp_path / "c", 2, progress=kill)
    assert not left_over(tmp_path / "c")


def test_what_a_killed_builder_left_is_cleared(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    file = write("a.jsonl", sentences(20))
    name = tokenize_files([file], tokenizer, "text", tmp_path / "other").path.name
    (tmp_path / "c" / f".{name}.tmp-123").mkdir(parents=True)
    (tmp_path / "c" / f".{name}.tmp-123" / "tokens.bin").write_bytes(b"half")
    tokenize_files([file], tokenizer, "text", tmp_path / "c")
    assert left_over(tmp_path / "c") == [name]


def test_ranks_that_start_together_build_once(
    tokenizer: Tokenizer, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    builds: list[int] = []
    build = shards._build

    def counted(*args: Any) -> TokenShards:
        builds.append(1)
        return build(*args)

    monkeypatch.setattr(shards, "_build", counted)
    file = write("a.jsonl", sentences(500))
    made: list[TokenShards] = []
    ranks = [
        threading.Thread(target=lambda: made.append(tokenize_files([file], tokenizer, "text", tmp_path / "c")))
        for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(made) == 4 and len(builds) == 1


def test_a_lock_waits_for_the_living_and_not_for_the_dead(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    file = write("a.jsonl", sentences(5))
    name = tokenize_files([file], tokenizer, "text", tmp_path / "other").path.name
    lock = tmp_path / "c" / f".{name}.lock"
    lock.parent.mkdir()
    code = f"import filelock; lock = filelock.FileLock({str(lock)!r}); lock.acquire(); print('held'); input()"
    holder = subprocess.Popen(
        [sys.executable, "-uc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    waiting = threading.Thread(target=tokenize_files, args=([file], tokenizer, "text", tmp_path / "c"))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not (tmp_path / "c" / name).exists()
    holder.kill()
    holder.communicate()
    waiting.join(30)
    assert (tmp_path / "c" / name).exists()


def test_a_cache_folder_that_cannot_be_is_told(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"another cache folder|can be written"):
        tokenize_files([write("a.jsonl", ["cat"])], tokenizer, "text", tmp_path / "file" / "c")


def test_works_from_a_script_without_a_main_guard(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    tokenizer.save(tmp_path / "tok")
    script = f"""
from groundup.data import chunks, shards
from groundup.tokenizer import load_tokenizer
shards.ALONE, chunks.CHUNK = 0, 1000
made = shards.tokenize_files([{write("a.jsonl", sentences(50))!r}], load_tokenizer({str(tmp_path / "tok")!r}), "text",
                             {str(tmp_path / "c")!r}, workers=2)
print(len(made))
"""
    result = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, check=False)
    assert result.stdout == "50\n", result.stderr


def test_memory_stays_flat(tmp_path: Path):
    """30 MB of text in pieces of 64 KB: were the file, or its tokens as Python numbers, held, it would show."""
    line = json.dumps({"text": "the cat sat on a mat and saw one bird " * 50}) + "\n"
    file = tmp_path / "big.jsonl"
    file.write_text(line * (30_000_000 // len(line)))
    script = f"""
import resource
from types import SimpleNamespace
from groundup.data import chunks, encode, shards
bytes_as_ids = SimpleNamespace(vocab_size=256, bos_id=0, eos_id=1, fingerprint=lambda: "bytes",
                               encode_batch=lambda texts: [list(text.encode()) for text in texts])
chunks.CHUNK = encode.BATCH = 1 << 16
peak = []
shards.tokenize_files([{str(file)!r}], bytes_as_ids, "text", {str(tmp_path / "c")!r}, workers=1,
                      progress=lambda *_: peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
print((peak[-1] - peak[20]) / 1024)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert float(result.stdout) < 12, result.stdout + result.stderr


def test_progress_ends_at_the_total(small_chunks: None, tokenizer: Tokenizer, write: Write, tmp_path: Path):
    file, seen = write("a.jsonl", sentences(200)), []
    tokenize_files([file], tokenizer, "text", tmp_path / "c", 1, progress=lambda *at: seen.append(at))
    size = Path(file).stat().st_size
    assert seen == sorted(seen) and len(seen) > 5 and seen[-1] == (size, size)


@pytest.fixture
def lines() -> Iterator[str]:
    yield "The cat's 12 mats, sat; don't\n\n  猫坐在垫子上。鸟 飞过了！ no_way_ x__. <tag/> é́ 1st\r\n\t" * 40


@pytest.mark.parametrize("limit", [7, 50, 301])
def test_a_huge_document_cut_for_encoding_gets_the_same_ids(limit: int, tokenizer: Tokenizer, lines: str):
    parts = list(cut_text(lines, limit))
    assert "".join(parts) == lines and max(map(len, parts)) <= limit
    if limit > 7:  # a word longer than the limit has no better place to be cut
        assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(lines)


def test_a_document_without_word_ends_is_cut_all_the_same():
    assert list(cut_text("a" * 25, 10)) == ["a" * 10, "a" * 10, "a" * 5]


def test_huge_documents_end_to_end(
    tokenizer: Tokenizer, write: Write, tmp_path: Path, lines: str, monkeypatch: pytest.MonkeyPatch
):
    from groundup.data import encode

    monkeypatch.setattr(encode, "BATCH", 300)
    monkeypatch.setattr(encode.cut_text, "__defaults__", (300,))
    made = tokenize_files([write("a.jsonl", ["cat", lines, "mat"])], tokenizer, "text", tmp_path / "c")
    assert documents(made)[1] == [tokenizer.bos_id, *tokenizer.encode(lines), tokenizer.eos_id]
    assert len(made) == 3


@pytest.mark.parametrize(
    ("source", "target", "cutoff", "kept"),
    [
        (3000, 2000, 1000, (600, 400)),
        (2000, 3000, 1000, (400, 600)),
        (1000, 100, 1000, (900, 100)),
        (100, 1000, 1000, (100, 900)),
        (10, 10, 1000, (10, 10)),
    ],
)
def test_truncation_is_that_of_llama_factory(source: int, target: int, cutoff: int, kept: tuple[int, int]):
    assert truncate_lengths(source, target, cutoff) == kept


def test_a_cut_conversation_keeps_the_header_of_its_answer():
    eos = 2
    question, header, answer = list(range(100, 140)), [eos, 10, 11], [50] * 9 + [eos]
    ids, mask = question + header + answer, [0] * 43 + [1] * 10
    kept, kept_mask = truncate_chat(ids, mask, 25, eos)
    assert kept == [*range(100, 112), *header, *answer]
    assert kept_mask == [0] * 15 + [1] * 10


def test_a_cut_answer_does_not_learn_to_stop_there():
    kept, mask = truncate_chat([5] * 4 + [50] * 30 + [2], [0] * 4 + [1] * 31, 20, 2)
    assert kept == [5] * 4 + [50] * 16 and sum(mask) == 16


def test_turns_that_find_no_room_go_from_the_end():
    turn, mask = [5, 6, 50, 51, 52], [0, 0, 1, 1, 1]
    assert truncate_chat(turn * 4, mask * 4, 12, 2) == (turn * 2 + [5, 50], mask * 2 + [0, 1])
    assert truncate_chat(turn * 4, mask * 4, 10, 2) == (turn * 2, mask * 2)
    assert truncate_chat([*turn, 7], [*mask, 0], 6, 2) == ([*turn, 7], [*mask, 0])
