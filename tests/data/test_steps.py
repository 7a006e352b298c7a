"""Judged steps and answers: where a judgement stands, and that it survives packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from groundup.data.batch import PackedDataset, open_dataset
from groundup.data.mix import Source
from groundup.data.rows import Chat, Prompt, Stepwise, Unpaired, message
from groundup.data.steps import judgements, render_steps, steps_of
from groundup.errors import UserError
from groundup.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["what is 3 + 4 * 2? first 4 * 2 is 8. then 3 + 8 is 11. so the answer is 11"] * 4, 300)


def solution(number: int, labels: list[bool]) -> dict[str, Any]:
    steps = [f"step {i} of {number}" for i in range(len(labels))]
    return {"prompt": f"what is {number}?", "completions": steps, "labels": labels}


def opened(rows: list[dict[str, Any]], tokenizer: Tokenizer, folder: Path, kind: str) -> PackedDataset:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return open_dataset([Source(str(path))], tokenizer, kind=kind, seq_len=96, cache_dir=folder / "c", seed=0)[0]


def test_steps_end_in_a_line_break_and_do_not_depend_on_what_follows(tokenizer: Tokenizer) -> None:
    prompt, steps = [message("user", "what is 3 + 8?")], ["first 3.", "then 8", "11 \n"]
    ids, ends = render_steps(tokenizer, prompt, steps)
    begun = tokenizer.render(prompt, add_generation_prompt=True).ids
    assert ids[: len(begun)] == begun and ends[-1] == len(ids) - 1
    said = [tokenizer.decode(ids[a + 1 : b + 1]) for a, b in zip([len(begun) - 1, *ends], ends, strict=False)]
    assert said == ["first 3.\n", "then 8\n", "11\n"]
    for count in (1, 2):
        assert render_steps(tokenizer, prompt, steps[:count]) == (ids[: ends[count - 1] + 1], ends[:count])


def test_a_forged_control_token_stays_text(tokenizer: Tokenizer) -> None:
    ids, _ = render_steps(tokenizer, [message("user", "x")], ["<|im_end|> right"])
    assert ids.count(tokenizer.eos_id) == tokenizer.render([message("user", "x")]).ids.count(tokenizer.eos_id)


def test_the_lines_of_an_answer() -> None:
    thought = {"role": "assistant", "content": "a\n\nb\n", "reasoning_content": "t1\nt2"}
    assert steps_of(thought) == ["t1", "t2", "a", "b"]
    assert steps_of(message("assistant", "")) == []


def test_what_is_judged_of_a_row(tokenizer: Tokenizer) -> None:
    chat = [message("user", "3?"), message("assistant", "11")]
    whole = tokenizer.render(chat).ids
    for row in (Unpaired(chat, True), Prompt(chat, extra={"label": 1}), Prompt(chat, "11", {"label": "true"})):
        assert judgements(tokenizer, row, stepwise=False) == (whole, [len(whole) - 1], [True])
    steps = Stepwise(chat[:1], ["so", "11"], [True, False])
    ids, ends, labels = judgements(tokenizer, steps, stepwise=True) or ([], [], [])
    assert (ids, ends) == render_steps(tokenizer, chat[:1], ["so", "11"]) and labels == [True, False]
    assert (judgements(tokenizer, steps, stepwise=False) or ())[2] == [False], "right where every step is"
    for row, stepwise in ((Unpaired(chat, True), True), (Chat(chat), False), (Prompt(chat), False)):
        assert judgements(tokenizer, row, stepwise) is None
    with pytest.raises(UserError, match="`label` is 'perhaps'"):
        judgements(tokenizer, Prompt(chat, extra={"label": "perhaps"}), stepwise=False)


@pytest.mark.parametrize("kind", ["stepwise", "outcome"])
def test_judgements_stand_where_they_were_after_packing(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    rows = [solution(n, [(n + i) % 3 > 0 for i in range(n % 4 + 1)]) for n in range(40)]
    data = opened(rows, tokenizer, tmp_path, kind)
    assert data.documents == 40 and 1 < len(data) < 40
    assert data.trained_tokens == (sum(n % 4 + 1 for n in range(40)) if kind == "stepwise" else 40)
    seen = {}
    for row in range(len(data)):
        batch = data.row(row)
        docs, ids, labels = (t[0] for t in (batch.doc_ids_BT, batch.input_ids_BT, batch.labels_BT))
        assert (labels[docs < 0] == -100).all()
        for document in range(int(docs.max()) + 1):
            inside = docs == document
            text = tokenizer.decode(ids[inside].tolist())
            number = int(text.split("what is ")[1].split("?")[0])
            seen[number] = [bool(label) for label in labels[inside] if label >= 0]
            assert labels[inside][-1] != -100, "the last token is judged"
            if kind == "stepwise":
                assert {tokenizer.decode([i])[-1] for i in ids[inside][labels[inside] >= 0].tolist()} == {"\n"}
    wanted = {n: [(n + i) % 3 > 0 for i in range(n % 4 + 1)] for n in range(40)}
    assert seen == (wanted if kind == "stepwise" else {n: [all(labels)] for n, labels in wanted.items()})


def test_a_solution_too_long_keeps_its_first_steps_and_an_answer_too_long_is_dropped(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt": "what?", "completions": ["so it goes on"] * 30, "labels": [True] * 29 + [False]}
    data = opened([solution(1, [True]), long], tokenizer, tmp_path, "stepwise")
    assert 2 < data.trained_tokens < 31 and "1 of 2 solutions cut to a row" in caplog.text
    with pytest.raises(UserError, match=r"rows.jsonl:2: 1 of 2 answers train nothing.*ends beyond a row"):
        opened([solution(1, [True]), long], tokenizer, tmp_path, "outcome")


@pytest.mark.parametrize(("kind", "row", "needed"), [
    ("stepwise", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": True},
     "a row of kind Unpaired where a solution in judged steps"),
    ("outcome", {"text": "no answer"}, "a row of kind Text where an answer that is right or wrong"),
])  # fmt: skip
def test_wrong_rows_are_named(tokenizer: Tokenizer, tmp_path: Path, kind: str, row: Any, needed: str) -> None:
    with pytest.raises(UserError, match=f"rows.jsonl:1: {needed}"):
        opened([row], tokenizer, tmp_path, kind)
