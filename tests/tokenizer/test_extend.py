"""A tokenizer that learns another language: old ids stay, new pieces only glue what was cut as before."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_samples import TEXTS, text
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from groundup.data.texts import extend_tokenizer_on
from groundup.errors import UserError
from groundup.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from groundup.tokenizer.extend import Extended, extend_tokenizer
from groundup.tokenizer.merges import EDGE, learn_merges
from groundup.world import World

ENGLISH = [TEXTS[0], TEXTS[2], TEXTS[4]] * 3
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def byte_level(pre_tokenizer: Any, behind: bool = True, **model: Any) -> Backend:
    """A byte-level BPE whose control tokens stand behind its pieces, outside the vocabulary, or before them in it."""
    backend = Backend(models.BPE(**model))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[] if behind else SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(ENGLISH, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend


def split(pattern: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def sentencepiece(kind: str) -> Backend:
    """Llama 2's ("prepend", "first") and Gemma's way: characters, "▁" for a space, bytes for what has no piece."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    strip = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    specials = ["<unk>", *SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=["▁"],
        show_progress=False,
    )
    backend.train_from_iterator([word for one in ENGLISH for word in one.split()], trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][: len(specials)]  # the bytes are ordinary entries
    return Backend.from_str(json.dumps(spec))


BASES: dict[str, Callable[[], Tokenizer]] = {
    "ours": lambda: train_tokenizer(ENGLISH, 400),
    "qwen": lambda: Tokenizer(byte_level(split(QWEN)), CONFIG, "{{ messages }}"),
    "llama3": lambda: Tokenizer(byte_level(split(LLAMA3), ignore_merges=True), CONFIG, ""),
    "smollm": lambda: Tokenizer(
        byte_level(
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), behind=False
        ),
        CONFIG,
        "",
    ),
    "llama2": lambda: Tokenizer(sentencepiece("prepend"), CONFIG, ""),
    "llama2-metaspace": lambda: Tokenizer(sentencepiece("first"), CONFIG, ""),
    "gemma": lambda: Tokenizer(sentencepiece("gemma"), CONFIG, ""),
}


@pytest.fixture(scope="module")
def chinese() -> list[str]:
    documents = World(seed=0).documents(1500)
    return [one for one in documents if any("\u4e00" <= char <= "\u9fff" for char in one)] + [TEXTS[1], TEXTS[3]] * 2


@pytest.fixture(scope="module", params=list(BASES))
def extended(request: pytest.FixtureRequest, chinese: list[str]) -> tuple[Tokenizer, Extended]:
    base = BASES[request.param]()
    return base, extend_tokenizer(base, chinese, 250)


def test_nothing_old_is_renumbered(extended: tuple[Tokenizer, Extended]) -> None:
    old, (new, pieces) = extended[0], (extended[1].tokenizer, extended[1].pieces)
    assert all(new.backend.id_to_token(i) == old.backend.id_to_token(i) for i in range(old.vocab_size))
    added = [
        {number: token.content for number, token in one.backend.get_added_tokens_decoder().items()}
        for one in (old, new)
    ]
    assert added[0] == added[1] and (new.eos_id, new.pad_id, new.stop_ids) == (old.eos_id, old.pad_id, old.stop_ids)
    assert sorted(pieces) == list(range(old.vocab_size, new.vocab_size)) and len(pieces) == 250
    assert new.chat_template == old.chat_template
    assert all(max(spelled) < old.vocab_size and len(spelled) > 1 for spelled in pieces.values())


def test_text_is_first_cut_as_before_and_then_only_glued(
    extended: tuple[Tokenizer, Extended], chinese: list[str]
) -> None:
    old, (new, pieces) = extended[0], (extended[1].tokenizer, extended[1].pieces)
    rng = random.Random(1)
    for one in [*ENGLISH[:3], *chinese[:100], *(text(rng, specials=True) for _ in range(200))]:
        ids = new.encode(one)
        assert [part for number in ids for part in pieces.get(number, [number])] == old.encode(one), one
        assert new.decode(ids) == old.decode(old.encode(one))
        if old.decode(old.encode(one)) != one:  # some of these swallow a space of their own at the start
            assert old.decode(old.encode(one)).strip() == one.strip()
    assert all(new.encode(one) == old.encode(one) for one in ENGLISH)


def test_the_new_language_gets_shorter_by_pieces_that_are_used(
    extended: tuple[Tokenizer, Extended], chinese: list[str]
) -> None:
    old, new = extended[0], extended[1].tokenizer
    before, after = ([number for ids in one.encode_batch(chinese) for number in ids] for one in (old, new))
    assert len(after) < 0.5 * len(before)
    whole = [n for n in extended[1].pieces if "\ufffd" not in new.decode([n])]
    assert (len(whole) > 120 and set(whole) - set(after) == set()) or len(set(whole) - set(after)) < 0.5 * len(whole)
    assert all(len(new.decode([number])) <= 16 for number in whole)


def test_a_control_token_is_never_learned_as_text(extended: tuple[Tokenizer, Extended]) -> None:
    forged = [f"甲<|im_end|>乙<0x0A>丙<unk>丁{i}" for i in range(50)]
    new = extend_tokenizer(extended[0], forged, 100).tokenizer
    ids = new.encode("<|im_end|><0x0A>")
    assert not {new.eos_id, new.pad_id} & set(ids) and new.decode(ids).strip() == "<|im_end|><0x0A>"


def test_digits_and_line_ends_go_on_standing_alone(chinese: list[str]) -> None:
    numbers = [f"{one}\n2024年12月\n2024年12月" for one in chinese[:200]]
    for name in ("ours", "qwen", "smollm"):
        base = BASES[name]()
        made = extend_tokenizer(base, numbers, 200)
        learned = [made.tokenizer.decode([number]) for number in made.pieces]
        assert not any(char.isdigit() for piece in learned for char in piece)
        assert name != "ours" or not any("\n" in piece for piece in learned)
    llama = extend_tokenizer(BASES["llama3"](), [*numbers, *(f"{i}" for i in range(100, 999))], 200)
    assert llama.pieces


@pytest.mark.parametrize("name", ["qwen", "llama3", "smollm", "llama2", "gemma"])
def test_transformers_reads_it_alike(name: str, chinese: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = BASES[name]()
    made = extend_tokenizer(base, chinese, 100)
    made.tokenizer.save(tmp_path)
    kinds = ["PreTrainedTokenizerFast", *(["Qwen2Tokenizer"] if name == "qwen" else [])]
    for kind in kinds:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "tokenizer_class": kind}))
        stock = AutoTokenizer.from_pretrained(tmp_path)
        assert len(stock) == made.tokenizer.vocab_size == load_tokenizer(tmp_path).vocab_size
        for one in [*ENGLISH[:3], *chinese[:50]]:
            assert stock(one, add_special_tokens=False)["input_ids"] == made.tokenizer.encode(one)
        assert stock.convert_tokens_to_ids(SPECIAL) == [base.backend.token_to_id(token) for token in SPECIAL]


def merged(ids: list[int], pair: tuple[int, int], number: int) -> list[int]:
    out, at = [], 0
    while at < len(ids):
        hit = at + 1 < len(ids) and (ids[at], ids[at + 1]) == pair
        out.append(number if hit else ids[at])
        at += 2 if hit else 1
    return out


@pytest.mark.parametrize("seed", range(8))
def test_every_merge_is_of_the_most_frequent_pair(seed: int) -> None:
    """Against counting all over again at every step."""
    rng = random.Random(seed)
    ids = [rng.choice([EDGE, *range(4 + seed)]) for _ in range(400)]
    names = {i: chr(97 + i) for i in range(4 + seed)}
    first = len(names)
    merges = learn_merges(np.array(ids, np.int32), dict(names), 25, first, lambda piece: len(piece) <= 6)
    assert [number for _, _, number in merges] == list(range(first, first + 25))
    for left, right, number in merges:
        counts: Counter[tuple[int, int]] = Counter()
        for pair in {one for one in pairwise(ids) if EDGE not in one}:
            if len(names[pair[0]] + names[pair[1]]) <= 6:
                counts[pair] = merged(ids, pair, -9).count(-9)
        assert counts[left, right] == max(counts.values())
        ids, names[number] = merged(ids, (left, right), number), names[left] + names[right]


def test_the_same_texts_give_the_same_tokenizer(chinese: list[str]) -> None:
    base = BASES["qwen"]()
    assert extend_tokenizer(base, chinese, 60).tokenizer.fingerprint() == (
        extend_tokenizer(base, iter(chinese), 60).tokenizer.fingerprint()
    )


def test_a_tokenizer_can_be_extended_again(chinese: list[str]) -> None:
    base = BASES["qwen"]()
    once = extend_tokenizer(base, chinese, 60)
    twice = extend_tokenizer(once.tokenizer, chinese, 60)
    assert min(twice.pieces) == once.tokenizer.vocab_size == base.vocab_size + 60
    assert twice.tokenizer.decode(twice.tokenizer.encode(TEXTS[1])) == TEXTS[1]


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_report_measures_what_was_held_out(chinese: list[str], tmp_path: Path) -> None:
    base = BASES["qwen"]()
    base.save(tmp_path / "base")
    rows = [f"秘密配方{'鑫森淼焱垚' * 9}" if (i + 1) % 20 == 0 else one for i, one in enumerate(chinese)]
    new_text, known = write(tmp_path / "new.jsonl", rows), write(tmp_path / "known.jsonl", ENGLISH)
    summary, pieces = extend_tokenizer_on(tmp_path / "base", [new_text], 150, tmp_path / "out", [known])
    out = load_tokenizer(tmp_path / "out")
    assert summary["added"] == len(pieces) == 150 and summary["vocab_size"] == out.vocab_size == base.vocab_size + 150
    assert not any("鑫" in out.decode([number]) for number in pieces)
    before, after = summary["new_text"]["before"], summary["new_text"]["after"]
    assert summary["new_text"]["texts"] == len(rows) // 20 and before["tokens_per_character"] > 2.5
    assert before["tokens_per_character"] >= after["tokens_per_character"] > 0
    assert before["tokens_per_byte"] == pytest.approx(before["tokens_per_character"] / 3, rel=0.1)
    assert summary["control"]["before"] == summary["control"]["after"] and not after["round_trip_failures"]
    with pytest.raises(UserError, match="holds a tokenizer or a model already"):
        extend_tokenizer_on(tmp_path / "base", [new_text], 150, tmp_path / "out")
    few, _ = extend_tokenizer_on(tmp_path / "base", [write(tmp_path / "few.jsonl", chinese[:3])], 5, tmp_path / "few")
    assert few["new_text"]["texts"] == 3 and "control" not in few


def test_what_cannot_be_extended_is_named(tokenizer: Tokenizer) -> None:
    unigram = Backend(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0))
    unigram.add_special_tokens(["</s>"])
    with pytest.raises(UserError, match="is a Unigram tokenizer"):
        extend_tokenizer(Tokenizer(unigram, {"eos_token": "</s>"}, ""), ["aaaa"], 10)
    letters = Backend(models.BPE({"a": 0, "</s>": 1}, []))
    with pytest.raises(UserError, match="cannot spell every text"):
        extend_tokenizer(Tokenizer(letters, {"eos_token": "</s>"}, ""), ["aaaa"], 10)
    with pytest.raises(UserError, match="--add: 0"):
        extend_tokenizer(tokenizer, TEXTS, 0)
    with pytest.raises(UserError, match="no text"):
        extend_tokenizer(tokenizer, ["", ""], 10)
    with pytest.raises(UserError, match="knows all that this text repeats"):
        extend_tokenizer(tokenizer, ["1 2 3\n"], 10)
