"""Byte-level BPE: start from the 256 bytes, glue the most frequent neighbours again and again.

Sennrich et al. 2016 (arXiv:1508.07909) for the merges, GPT-2 (Radford et al. 2019) for working on bytes, so that any
text has ids and comes back exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from groundup.errors import UserError
from groundup.tokenizer.plain import lone_surrogate
from groundup.tokenizer.tokenizer import Tokenizer

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# As in Qwen3: these are single ids, but a reader of the answer sees them, so they are not "special" to decode().
VISIBLE = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
VISION = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(20))
SPECIAL_TOKENS = (PAD, BOS, EOS, *VISIBLE, *VISION, *RESERVED)
BYTES = 256
TEMPLATE = Path(__file__).with_name("template.jinja")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 6400, max_bytes: int | None = None) -> Tokenizer:
    """Learn a byte-level BPE of at most `vocab_size` entries; the special tokens take the first ids.

    texts: any stream of documents, read once. Same texts, same tokenizer, byte for byte.
    max_bytes: how much UTF-8 to learn from, by default 2,500 bytes an entry (16 MB at 6,400: 15 s of one core, 700 MB;
        twice the text gains 0.1 % there). Of a longer stream an even sample of documents is kept.
    Raises UserError when vocab_size cannot hold the specials and the 256 bytes, or when there is no text.
    """
    smallest = len(SPECIAL_TOKENS) + BYTES
    if vocab_size < smallest:
        why = f"{vocab_size} is too small for {len(SPECIAL_TOKENS)} special tokens and {BYTES} bytes"
        raise UserError("vocab_size", why, f"use {smallest} or more")
    sample = _even_sample((text for text in texts if text), max_bytes or 2500 * vocab_size)
    if not sample:
        raise UserError("tokenizer", "there is no text to learn from", "give files that hold text")

    backend = Backend(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # While learning, a newline and a digit stand alone, so no merge ever holds one. A chat can then be cut after any
    # "\n" without changing an id, and numbers are read digit by digit. In use the splitting is plain GPT-2, which every
    # engine knows: with no such merge to apply, the outcome is the same.
    alone = pre_tokenizers.Split(Regex("[\n0-9]"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([alone, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    try:
        backend.train_from_iterator(sample, trainer=trainer)
    except UnicodeEncodeError as error:
        raise lone_surrogate("a text to learn from") from error
    backend.pre_tokenizer = byte_level
    return Tokenizer(_unhide(backend, VISIBLE), default_config(), TEMPLATE.read_text(encoding="utf-8"))


def default_config() -> dict[str, object]:
    """tokenizer_config.json of a tokenizer that we make."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }


def _even_sample(texts: Iterator[str], max_bytes: int) -> list[str]:
    """Every k-th text, with the smallest k = 1, 2, 4, ... that fits: one pass, bounded memory, no bias to the start."""
    kept: list[str] = []
    total, every = 0, 1
    for number, text in enumerate(texts):
        if number % every:
            continue
        kept.append(text)
        total += _utf8_size(text)
        while total > max_bytes and len(kept) > 1:
            kept, every = kept[::2], every * 2
            total = sum(map(_utf8_size, kept))
    return kept


def _utf8_size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _unhide(backend: Backend, tokens: tuple[str, ...]) -> Backend:
    """Keep `tokens` in what decode(skip_special_tokens=True) returns (the trainer marks all it adds as special)."""
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] not in tokens
    return Backend.from_str(json.dumps(spec))
