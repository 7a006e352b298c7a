"""Which name of llama.cpp stands for a tokenizer.json's way to cut text: known ones by regex, others refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from groundup.errors import UserError
from groundup.export.pretokenizer import KNOWN, LLAMA3, QWEN2, by_name, recognise, spell_out
from groundup.export.vocabulary import vocabulary_fields
from groundup.tokenizer import Tokenizer

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def split(regex: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **changes}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def spec(pre_tokenizer: Any, normalizer: Any = None, **model: Any) -> dict[str, Any]:
    return {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer, "model": {"type": "BPE", **model}}


# As the released tokenizer.json of each family has it.
RELEASED = {
    "gpt-2": spec({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}),
    "smollm": spec(sequence({"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True})),
    "qwen2": spec(sequence(split(QWEN2), BYTES), {"type": "NFC"}, ignore_merges=False),
    "llama-bpe": spec(sequence(split(LLAMA3), BYTES), ignore_merges=True),
    "dbrx": spec(sequence(split(LLAMA3, behavior="Removed", invert=True), BYTES)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_known_families_by_their_regexes(name: str) -> None:
    assert recognise(RELEASED[name], "x").name == name


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_spelled_out_and_recognised_again(known: Any) -> None:
    assert recognise(spec(spell_out(known), ignore_merges=known.ignore_merges), "x") == known
    assert all(by_name(alias, "x") == known for alias in (known.name, *known.aliases))


@pytest.mark.parametrize(
    "unknown, said",
    [
        (spec(sequence(split(r"\w+|\W+"), BYTES)), r"cuts by .*\\w"),
        (spec(sequence(split(QWEN2), BYTES), ignore_merges=True), "none that we know"),
        (spec(sequence(split(QWEN2, behavior="MergedWithNext"), BYTES)), "a step Split"),
        (spec({"type": "Whitespace"}), "ByteLevel"),
        (spec(None), "ByteLevel"),
        (spec({**BYTES, "use_regex": True, "add_prefix_space": True}), "prefix space"),
        (spec(sequence({"type": "Digits", "individual_digits": False}, BYTES)), "a step Digits"),
        (spec({**BYTES, "use_regex": True}, {"type": "Lowercase"}), "normalizer"),
        (spec({**BYTES, "use_regex": True}, byte_fallback=True), "byte-level BPE"),
        ({**spec(BYTES), "model": {"type": "Unigram"}}, "Unigram"),
    ],
)
def test_an_unknown_way_to_cut_is_refused(unknown: dict, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        recognise(unknown, "/models/x")
    assert str(caught.value).startswith("/models/x: ")


def test_an_unknown_name_is_refused() -> None:
    for name in ("default", "", "tekken"):
        with pytest.raises(UserError, match="gpt-2, smollm, qwen2"):
            by_name(name, "x.gguf")


def test_a_tokenizer_we_cannot_name_never_goes_out_as_a_default(tokenizer: Tokenizer) -> None:
    changed = json.loads(tokenizer.backend.to_str())
    changed["pre_tokenizer"] = sequence(split(r"\p{L}+|[^\p{L}]+"), BYTES)
    other = Tokenizer(Backend.from_str(json.dumps(changed)), tokenizer.config, tokenizer.chat_template)
    with pytest.raises(UserError, match="known: gpt-2"):
        vocabulary_fields(other, other.vocab_size)


def test_our_merges_do_not_care_whether_text_is_cut_as_gpt2_or_as_qwen2(tokenizer: Tokenizer) -> None:
    """Ollama's own engine cuts every qwen3's text as Qwen's is. No merge of ours crosses such a cut (bpe.py keeps
    digits and newlines alone), so ids stay, but for a contraction in capitals right before letters."""
    changed = json.loads(tokenizer.backend.to_str())
    changed["pre_tokenizer"] = sequence(split(QWEN2), BYTES)
    qwen = Tokenizer(Backend.from_str(json.dumps(changed)), tokenizer.config, tokenizer.chat_template)
    texts = [
        "The cat's (old) hat, 12 34!\n\n  x\t.y",
        "def add(a, b):\n    return a+b",
        "他有3只猫。“好”！",
        " \n \n a ",
    ]
    assert tokenizer.encode_batch(texts) == qwen.encode_batch(texts)
