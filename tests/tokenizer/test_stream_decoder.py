from __future__ import annotations

import random

import pytest
from tokenizer_samples import text
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from groundup.tokenizer import StreamDecoder, Tokenizer


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """The other common kind, as in Llama 2: "▁" for a space, <0xE4> for a byte without a piece."""
    words = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "你", "a", "b"]
    backend = Backend(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"}, "")


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = False) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skip)
    return [*(decoder.feed([number]) for number in ids), decoder.finish()]


def test_pieces_add_up_and_never_hold_half_a_character(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(100):
        one = text(rng).replace("\ufffd", "")
        pieces = stream(tokenizer, tokenizer.encode(one))
        assert "".join(pieces) == one
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab😀\ufffdc")
    pieces = stream(tokenizer, ids)
    assert pieces[-1] == "" and "😀" in pieces and "\ufffd" in pieces
    assert len(ids) >= 8 and pieces[2:6] == ["", "", "", "😀"]


@pytest.mark.parametrize("skip", [False, True])
def test_any_ids_stream_to_what_decode_says(tokenizer: Tokenizer, skip: bool) -> None:
    """An untrained model emits bytes that are no UTF-8 at all."""
    rng = random.Random(2)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size if rng.random() < 0.5 else 300) for _ in range(rng.randrange(40))]
        assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)
        whole = StreamDecoder(tokenizer, skip)
        assert whole.feed(ids) + whole.finish() == tokenizer.decode(ids, skip)


def test_skipping_keeps_reasoning_and_calls_visible(tokenizer: Tokenizer) -> None:
    ids = tokenizer.render([{"role": "assistant", "content": "a", "reasoning_content": "b"}]).ids
    assert "".join(stream(tokenizer, ids, skip=True)) == "assistant\n<think>\nb\n</think>\n\na\n"


def test_a_character_cut_short_is_flushed_and_the_decoder_starts_anew(tokenizer: Tokenizer) -> None:
    first, second, third = tokenizer.encode("😀")[:3]
    decoder = StreamDecoder(tokenizer)
    assert decoder.feed([first, second, third]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.feed(tokenizer.encode("ok")) == "ok" and decoder.finish() == ""


def test_tokenizers_that_are_not_byte_level(metaspace: Tokenizer) -> None:
    for one in ("hello world", "hello 你好😀 a", "😀", " a  b", "你a"):
        ids = metaspace.encode(one)
        pieces = stream(metaspace, ids)
        assert "".join(pieces) == metaspace.decode(ids) == one.removeprefix(" ")  # this kind drops a first space
        assert not any("\ufffd" in piece for piece in pieces)
    assert stream(metaspace, metaspace.encode("😀")[:3])[-1] == metaspace.decode(metaspace.encode("😀")[:3])
