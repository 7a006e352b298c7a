"""Pairs of answers: two documents that stay together, one prompt, only the answers in question trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from groundup.data.batch import PackedDataset, open_dataset
from groundup.data.mix import Source
from groundup.data.truncate import last_answers, truncate_pair
from groundup.errors import UserError
from groundup.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["which is better, this or that? the first is right and the second is wrong"] * 4, 300)


def pair(number: int, chosen: str, rejected: str, before: int = 0) -> dict[str, object]:
    prompt = [{"role": "user", "content": f"which is better, {number}?"}]
    for turn in range(before):
        prompt += [{"role": "assistant", "content": f"that {turn}"}, {"role": "user", "content": "and now?"}]
    return {
        "chosen": [*prompt, {"role": "assistant", "content": chosen}],
        "rejected": [*prompt, {"role": "assistant", "content": rejected}],
    }


def opened(rows: list[dict[str, object]], tokenizer: Tokenizer, folder: Path, seq_len: int = 128) -> PackedDataset:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data, _ = open_dataset(
        [Source(str(path))], tokenizer, kind="preference", seq_len=seq_len, cache_dir=folder / "cache", seed=0
    )
    return data


def test_both_sides_of_a_pair_lie_side_by_side(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [pair(n, "this " * (n % 4 + 1), "that " * (n % 3 + 1), before=n % 2) for n in range(40)]
    data = opened(rows, tokenizer, tmp_path)
    assert data.documents == 40 and len(data) > 1
    seen = set()
    for row in range(len(data)):
        batch = data.row(row)
        docs, ids, labels = (t[0].numpy() for t in (batch.doc_ids_BT, batch.input_ids_BT, batch.labels_BT))
        assert (docs.max() + 1) % 2 == 0
        for chosen in range(0, docs.max() + 1, 2):
            texts = [tokenizer.decode(ids[docs == side].tolist()) for side in (chosen, chosen + 1)]
            said = [tokenizer.decode([i for i in labels[docs == side] if i >= 0]) for side in (chosen, chosen + 1)]
            number = int(texts[0].split("better, ")[1].split("?")[0])
            assert f"better, {number}?" in texts[1]
            seen.add(number)
            assert said[0].count("this") == number % 4 + 1 and "that" not in said[0], "the turns before are prompt"
            assert said[1].count("that") == number % 3 + 1
            assert all(text.endswith(tokenizer.decode([tokenizer.eos_id])) for text in said), "the stop is trained"
    assert seen == set(range(40))


def test_equal_sides_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pairs.jsonl:2: `chosen` equals `rejected`"):
        opened([pair(1, "this", "that"), pair(2, "same", "same")], tokenizer, tmp_path)


def test_a_pair_too_long_is_cut_to_a_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = opened([pair(1, "this " * 90, "that " * 200), pair(2, "this", "that " * 200)], tokenizer, tmp_path)
    for row in range(len(data)):
        batch = data.row(row)
        for side in (0, 1):
            assert ((batch.doc_ids_BT == side) & (batch.labels_BT >= 0)).any()
        prompts = [batch.input_ids_BT[(batch.doc_ids_BT == side)].tolist()[:8] for side in (0, 1)]
        assert prompts[0] == prompts[1]


def test_wrong_rows_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "no pair"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"text.jsonl:1: a row of kind Text where a pair of answers is needed"):
        open_dataset([Source(str(path))], tokenizer, kind="preference", seq_len=64, cache_dir=tmp_path / "c", seed=0)


def test_last_answers() -> None:
    assert last_answers([0, 1, 1, 0, 1], 1) == [0, 0, 0, 0, 1]
    assert last_answers([0, 1, 1, 0, 1], 2) == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("prompt", [3, 40, 200])
@pytest.mark.parametrize("answers", [(5, 9), (50, 9), (300, 400)])
def test_truncated_pairs_fit_and_keep_both_sides(prompt: int, answers: tuple[int, int]) -> None:
    sides = [([*range(prompt), *[7] * n], [0] * prompt + [1] * n) for n in answers]
    kept = truncate_pair(sides, 64, None)
    if prompt * 2 + sum(answers) > 64:
        assert sum(len(ids) for ids, _ in kept) <= 64
    prompts = [ids[: mask.index(1)] for ids, mask in kept]
    assert prompts[0] == prompts[1] == list(range(len(prompts[0])))
    assert all(len(ids) == len(mask) for ids, mask in kept)
    assert min(sum(mask) for _, mask in kept) >= min(*answers, 3)
    assert np.sum([len(ids) for ids, _ in kept]) >= min(60, 2 * prompt + sum(answers)), "no room is given away"
