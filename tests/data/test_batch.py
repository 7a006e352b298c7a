from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import chat, sentences

from groundup.data.batch import IGNORE, Batch, Loader, PackedDataset, open_dataset
from groundup.data.mix import Source
from groundup.errors import UserError
from groundup.tokenizer import Tokenizer

Write = Callable[..., str]
SEQ_LEN = 48


@pytest.fixture
def open_text(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> Callable[..., PackedDataset]:
    def make(texts: list[str], seq_len: int = SEQ_LEN, name: str = "text.jsonl", **options: object) -> PackedDataset:
        source = Source(write(name, texts))
        cache = tmp_path / "cache"
        return open_dataset([source], tokenizer, kind="text", seq_len=seq_len, cache_dir=cache, seed=0, **options)[0]

    return make


def open_chats(tokenizer: Tokenizer, write: Write, tmp_path: Path, rows: list, seq_len: int) -> PackedDataset:
    source = Source(write("chat.jsonl", rows))
    return open_dataset([source], tokenizer, kind="chat", seq_len=seq_len, cache_dir=tmp_path / "c", seed=0)[0]


def whole(dataset: PackedDataset) -> Batch:
    return dataset.batch(np.arange(len(dataset)))


def equal(a: Batch, b: Batch) -> bool:
    pairs = ((a.input_ids_BT, b.input_ids_BT), (a.labels_BT, b.labels_BT), (a.position_ids_BT, b.position_ids_BT))
    return all(torch.equal(x, y) for x, y in (*pairs, (a.doc_ids_BT, b.doc_ids_BT)))


def stack(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.input_ids_BT for batch in batches])


def pieces(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, labels, positions) of every document in every row."""
    found = []
    for ids, labels, positions, docs in zip(
        batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT, batch.doc_ids_BT, strict=True
    ):
        for doc in range(int(docs.max()) + 1):
            here = docs == doc
            found.append((ids[here].tolist(), labels[here].tolist(), positions[here].tolist()))
    return found


def test_a_batch_is_what_the_types_say(open_text: Callable[..., PackedDataset]):
    batch = Loader(open_text(sentences(50)), 4, seed=0).batch_at(0)
    assert {t.shape for t in (batch.input_ids_BT, batch.labels_BT, batch.doc_ids_BT)} == {(4, SEQ_LEN)}
    assert batch.input_ids_BT.dtype == batch.labels_BT.dtype == batch.position_ids_BT.dtype == torch.int64
    assert batch.doc_ids_BT.dtype == torch.int32 and batch.weights_BT is None
    assert equal(batch, batch.to("cpu"))


def test_every_token_is_an_input_once_and_every_target_is_a_label_once(
    tokenizer: Tokenizer, open_text: Callable[..., PackedDataset]
):
    texts = sentences(120, longest=150)
    documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert max(map(len, documents)) > 2 * SEQ_LEN  # some are cut
    dataset = open_text(texts)
    batch = whole(dataset)
    inputs = Counter(batch.input_ids_BT[batch.doc_ids_BT >= 0].tolist())
    labels = Counter(batch.labels_BT[batch.labels_BT != IGNORE].tolist())
    assert inputs == Counter(token for document in documents for token in document)
    assert labels == Counter(token for document in documents for token in document[1:])
    assert dataset.trained_tokens == sum(labels.values()) and dataset.documents == len(texts)
    assert dataset.bytes == sum(len(text.encode()) for text in texts)
    assert dataset.fill == pytest.approx(sum(inputs.values()) / batch.input_ids_BT.numel())


def test_a_cut_document_loses_no_target(tokenizer: Tokenizer, open_text: Callable[..., PackedDataset]):
    text = " ".join(sentences(30))
    document = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    found = pieces(whole(open_text([text])))
    cuts = range(SEQ_LEN - 1, len(document) - 1, SEQ_LEN)
    assert len(found) == len(cuts) + 1 > 3
    last = {(ids[-1], labels[-1]) for ids, labels, _ in found}
    assert last == {*((document[i], document[i + 1]) for i in cuts), (tokenizer.eos_id, IGNORE)}
    assert all(labels[:-1] == ids[1:] and positions[0] == 0 for ids, labels, positions in found)


def test_documents_in_a_row_are_whole_and_apart(tokenizer: Tokenizer, open_text: Callable[..., PackedDataset]):
    texts = sentences(80, longest=20)
    batch = whole(open_text(texts))
    found = pieces(batch)
    assert sorted(tokenizer.decode(ids[1:-1]) for ids, _, _ in found) == sorted(texts)  # one doc id, one document
    for ids, labels, positions in found:
        assert labels == [*ids[1:], IGNORE]
        assert positions == list(range(len(ids)))
    for docs in batch.doc_ids_BT.tolist():
        filled = [doc for doc in docs if doc >= 0]
        assert filled == sorted(filled) and docs == filled + [-1] * (len(docs) - len(filled))


def test_filler_is_at_the_end_trains_nothing_and_has_positions_of_its_own(
    tokenizer: Tokenizer, open_text: Callable[..., PackedDataset]
):
    row = open_text(["cat"]).row(0)
    filler = row.doc_ids_BT[0] == -1
    used = int((~filler).sum())
    assert used == len(tokenizer.encode("cat")) + 2 and filler[used:].all()
    assert (row.input_ids_BT[0][filler] == tokenizer.pad_id).all() and (row.labels_BT[0][filler] == IGNORE).all()
    assert row.position_ids_BT[0][filler].tolist() == list(range(SEQ_LEN - used))


def test_chat_labels_are_the_trained_next_tokens(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    rows = [chat(f"cat {i}?", f"mat {i}.") for i in range(40)]
    dataset = open_chats(tokenizer, write, tmp_path, rows, seq_len=96)
    rendered = [tokenizer.render(row["messages"]) for row in rows]
    expected = sorted(
        [*(i if m else IGNORE for i, m in zip(one.ids[1:], one.mask[1:], strict=True)), IGNORE] for one in rendered
    )
    assert sorted(labels for _, labels, _ in pieces(whole(dataset))) == expected
    assert all(tokenizer.eos_id in labels for labels in expected)  # the stop is trained
    assert dataset.trained_tokens == sum(sum(one.mask) for one in rendered)
    assert dataset.bytes == sum(len(row["messages"][1]["content"].encode()) for row in rows)


def test_conversations_are_cut_to_a_row_and_never_split(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    rows = [chat(question, answer) for question, answer in zip(sentences(40, 1), sentences(40, 2), strict=True)]
    found = pieces(whole(open_chats(tokenizer, write, tmp_path, rows, seq_len=SEQ_LEN)))
    assert len(found) == len(rows)
    assert all(positions[0] == 0 and any(label != IGNORE for label in labels) for _, labels, positions in found)


def test_an_epoch_is_every_row_once_in_another_order_each_time(open_text: Callable[..., PackedDataset]):
    dataset = open_text(sentences(200))
    rows = len(dataset)
    loader = Loader(dataset, 1, seed=0)
    epochs = [[int(loader.rows_at(step)[0]) for step in range(e * rows, (e + 1) * rows)] for e in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [int(Loader(dataset, 1, seed=1).rows_at(step)[0]) for step in range(rows)] != epochs[0]


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_a_batch_that_does_not_divide_the_epoch_drops_nothing(open_text: Callable[..., PackedDataset], batch_size: int):
    dataset = open_text(sentences(200))
    one, many = Loader(dataset, 1, seed=0), Loader(dataset, batch_size, seed=0)
    assert len(dataset) % batch_size
    rows = np.concatenate([many.rows_at(step) for step in range(many.steps_per_epoch + 1)])
    assert rows.tolist() == [int(one.rows_at(i)[0]) for i in range(len(rows))]
    assert set(rows[: many.steps_per_epoch * batch_size]) == set(range(many.rows_per_epoch))
    assert many.batch_at(0).input_ids_BT.shape == (batch_size, SEQ_LEN)


def test_two_ranks_see_what_one_process_sees(open_text: Callable[..., PackedDataset]):
    dataset = open_text(sentences(100))
    alone = Loader(dataset, 6, seed=0)
    ranks = [Loader(dataset, 3, seed=0, rank=rank, world_size=2) for rank in range(2)]
    for step in (0, 1, 5, 40):
        assert torch.equal(alone.batch_at(step).input_ids_BT, stack([rank.batch_at(step) for rank in ranks]))
    assert ranks[0].state() == ranks[1].state() == alone.state()
    assert ranks[0].steps_per_epoch == alone.steps_per_epoch


def test_resumed_is_continued(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    def fresh() -> Loader:
        source = Source(write("text.jsonl", sentences(100)))
        options = {"kind": "text", "seq_len": SEQ_LEN, "seed": 3}
        return Loader(open_dataset([source], tokenizer, cache_dir=tmp_path / "c", **options)[0], 4, seed=3)

    undisturbed = fresh()
    seen = [undisturbed.batch_at(step) for step in range(60)]  # over more than one epoch
    assert undisturbed.steps_per_epoch < 50
    resumed = fresh()
    assert all(equal(resumed.batch_at(step), seen[step]) for step in range(45, 60))
    assert equal(undisturbed.batch_at(2), seen[2])  # and back


def test_evaluation_sees_every_row_once_over_the_ranks(open_text: Callable[..., PackedDataset]):
    dataset = open_text(sentences(100))
    ranks = [list(dataset.batches(4, rank, 3)) for rank in range(3)]
    rows = sorted(map(tuple, stack([batch for rank in ranks for batch in rank]).tolist()))
    assert rows == sorted(map(tuple, whole(dataset).input_ids_BT.tolist()))
    assert ranks[0][-1].input_ids_BT.shape[0] < 4


def test_sources_are_mixed_by_weight(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    sources = [Source(write("a.jsonl", ["cat sat"] * 30), 2.0), Source(write("b.jsonl", ["鸟 飞"] * 40), 0.5)]
    options = {"kind": "text", "seq_len": 32, "cache_dir": tmp_path / "c", "seed": 0}
    dataset, val = open_dataset(sources, tokenizer, **options)
    texts = Counter(tokenizer.decode(ids[1:-1]) for ids, _, _ in pieces(whole(dataset)))
    assert texts == {"cat sat": 60, "鸟 飞": 20} and val is None


def test_validation_is_disjoint_and_of_every_source(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    sources = [Source(write("a.jsonl", [f"cat {i}" for i in range(50)])), Source(write("b.jsonl", ["mat 1", "mat 2"]))]
    options = {"kind": "text", "seq_len": 32, "cache_dir": tmp_path / "c", "seed": 0, "val_fraction": 0.1}
    train, val = (
        {tokenizer.decode(ids[1:-1]) for ids, _, _ in pieces(whole(part))}
        for part in open_dataset(sources, tokenizer, **options)
        if part
    )
    assert not train & val and len(train | val) == 52
    assert any(text.startswith("mat") for text in val) and any(text.startswith("cat") for text in val)


def test_targets_can_weigh_more(tokenizer: Tokenizer, open_text: Callable[..., PackedDataset]):
    batch = open_text(["the cat sat"], token_weights={tokenizer.eos_id: 10.0}).row(0)
    assert batch.weights_BT is not None
    assert batch.weights_BT[batch.labels_BT == tokenizer.eos_id].tolist() == [10.0]
    assert (batch.weights_BT[batch.labels_BT != tokenizer.eos_id] == 1).all()


def test_a_row_of_one_token_is_refused(open_text: Callable[..., PackedDataset]):
    with pytest.raises(UserError, match="seq_len: 1 leaves nothing to predict"):
        open_text(["cat"], seq_len=1)


def test_no_source_and_no_batch_are_refused(tokenizer: Tokenizer, open_text: Callable[..., PackedDataset]):
    with pytest.raises(UserError, match="no source"):
        open_dataset([], tokenizer, kind="text", seq_len=8, cache_dir="c", seed=0)
    with pytest.raises(UserError, match="no document"):
        PackedDataset([], 8, 0)
    with pytest.raises(UserError, match="batch_size"):
        Loader(open_text(["cat"]), 0, seed=0)


def test_a_conversation_longer_than_a_row_is_never_cut_silently(tokenizer: Tokenizer, write: Write, tmp_path: Path):
    from groundup.data.shards import tokenize_files

    shards = tokenize_files([write("c.jsonl", [chat("cat?", "mat. " * 50)])], tokenizer, "chat", tmp_path / "c")
    with pytest.raises(ValueError, match="max_len"):
        PackedDataset([(shards, np.array([0]))], 16, tokenizer.pad_id)
