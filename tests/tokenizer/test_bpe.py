from __future__ import annotations

import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizer_samples import TEXTS, text

from groundup.errors import UserError
from groundup.tokenizer import SPECIAL_TOKENS, Tokenizer, report, train_tokenizer
from groundup.tokenizer.bpe import _even_sample


def test_specials_take_the_first_ids_and_roles_differ(tokenizer: Tokenizer) -> None:
    assert [tokenizer.backend.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(32))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert SPECIAL_TOKENS[:5] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    assert tokenizer.stop_ids == [2]
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size() <= 800


@pytest.mark.parametrize("seed", range(5))
def test_any_text_comes_back_exactly_and_never_as_a_special_token(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    texts = [text(rng, specials=True, length=60) for _ in range(200)] + list(SPECIAL_TOKENS)
    for one, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == one
        assert all(number >= len(SPECIAL_TOKENS) for number in ids)
        assert ids == tokenizer.encode(one)


def test_characters_from_all_of_unicode_come_back(tokenizer: Tokenizer) -> None:
    chars = "".join(chr(code) for code in range(0, 0x110000, 31) if not 0xD800 <= code < 0xE000)
    assert tokenizer.decode(tokenizer.encode(chars)) == chars


def test_newlines_and_digits_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    for token in tokenizer.backend.get_vocab():
        if token not in SPECIAL_TOKENS:
            assert not re.search(r"Ċ.|.Ċ|[0-9].|.[0-9]", token), token
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12\n\n345")] == list("12\n\n345")


def test_the_same_texts_give_the_same_tokenizer_whatever_the_threads(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(TEXTS * 3), 800).fingerprint() == tokenizer.fingerprint()
    code = (
        "from tokenizer_samples import TEXTS\nfrom groundup.tokenizer import train_tokenizer\n"
        "print(train_tokenizer(TEXTS * 3, 800).fingerprint())"
    )
    for threads in ("1", "4"):
        environment = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PYTHONPATH": ":".join(sys.path)}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == tokenizer.fingerprint()


def test_other_texts_or_another_template_change_the_fingerprint(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(TEXTS[:2], 800).fingerprint() != tokenizer.fingerprint()
    other = Tokenizer(tokenizer.backend, tokenizer.config, tokenizer.chat_template + " ")
    assert other.fingerprint() != tokenizer.fingerprint()


def test_more_entries_mean_fewer_tokens() -> None:
    few, many = (report(train_tokenizer(TEXTS, size), {"all": TEXTS})["all"] for size in (288, 500))
    assert few["tokens"] == few["bytes"]  # no merge at all
    assert many["chars_per_token"] > few["chars_per_token"]


@pytest.mark.parametrize(
    ("texts", "size", "said"),
    [
        (["text"], 287, "287 is too small for 32 special tokens and 256 bytes; use 288 or more"),
        ([], 6400, "no text"),
        (["", ""], 6400, "no text"),
        (["half \ud800 a character"], 6400, "surrogate"),
    ],
)
def test_what_cannot_be_learnt_from_is_said(texts: list[str], size: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_tokenizer(texts, size)


def test_a_long_stream_is_sampled_evenly_in_bounded_memory() -> None:
    kept = _even_sample((f"{number:010d}" for number in range(10_000)), max_bytes=1000)
    numbers = [int(one) for one in kept]
    gaps = {b - a for a, b in pairwise(numbers)}
    assert 50 <= len(kept) <= 100 and len(gaps) == 1 and numbers[0] == 0 and numbers[-1] > 9800
    assert _even_sample(iter(["ab", "cd"]), max_bytes=4) == ["ab", "cd"]


def test_half_a_character_is_refused_and_named(tokenizer: Tokenizer) -> None:
    for encode in (lambda: tokenizer.encode("a\udc00"), lambda: tokenizer.encode_batch(["fine", "a\udc00"])):
        with pytest.raises(UserError, match="lone surrogate"):
            encode()


def test_report_measures_each_language(tokenizer: Tokenizer) -> None:
    result = report(tokenizer, {"zh": ["你好", "今天"], "en": iter(["hello"]), "none": []})
    assert result["zh"]["texts"] == 2 and result["zh"]["characters"] == 4 and result["zh"]["bytes"] == 12
    tokens = len(tokenizer.encode("你好")) + len(tokenizer.encode("今天"))
    assert result["zh"]["bytes_per_token"] == pytest.approx(12 / tokens, abs=1e-4)
    assert result["en"]["round_trip_failures"] == 0 and result["none"]["tokens"] == 0


def test_loading_needs_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        f"import sys\nfrom groundup.tokenizer import load_tokenizer\nt = load_tokenizer({str(folder)!r})\n"
        "t.render([{'role': 'user', 'content': 'hi'}])\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
