"""How does a tokenizer learn another language without forgetting its own? It goes on merging where it had stopped.

The Chinese-LLaMA way (Cui et al. 2023, arXiv:2304.08177): new pieces are appended and nothing is renumbered. What is
learned from is the old tokenizer's own output, and every new merge ranks behind all old ones. So a text is first cut
exactly as before, and only then glued further: each new piece can be reached, and a text in which no new merge fires
keeps its ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from groundup.errors import UserError
from groundup.tokenizer.alphabets import Alphabet, Bytes, Fallback
from groundup.tokenizer.bpe import _even_sample
from groundup.tokenizer.merges import learn_merges
from groundup.tokenizer.tokenizer import Tokenizer

MAX_BYTES = 16_000_000  # of text that is learned from: an even sample of the documents of a longer stream
LONGEST = 16  # characters of a new piece, as SentencePiece has it


@dataclass(frozen=True)
class Extended:
    """pieces: what each new id was spelled with before."""

    tokenizer: Tokenizer
    pieces: dict[int, list[int]]


def extend_tokenizer(tokenizer: Tokenizer, texts: Iterable[str], add: int, max_bytes: int = MAX_BYTES) -> Extended:
    """`tokenizer` with at most `add` further pieces, learned from `texts`. All old ids stay; new ones follow the last.

    Fewer are added where no further pair of neighbours occurs twice. Same texts, same tokenizer.
    UserError: a tokenizer that is not a BPE over bytes, or with bytes to fall back on; no text; nothing to add.
    """
    if add < 1:
        raise UserError("--add", f"{add} is no number of pieces", "give 1 or more")
    spec = json.loads(tokenizer.backend.to_str())
    sample = _even_sample((text for text in texts if text), max_bytes)
    if not sample:
        raise UserError("tokenizer", "there is no text to learn from", "give files that hold text")
    alphabet = _alphabet(spec, tokenizer)
    names = dict(alphabet.names)
    first = tokenizer.vocab_size
    ids = alphabet.read(sample)
    pieces: dict[int, list[int]] = {}
    ids, characters = alphabet.characters(ids, first, add, sum(map(len, sample)))
    for number, (character, spelled) in enumerate(characters, first):
        names[number], pieces[number] = character, spelled
    left_over, next_id = add - len(characters), first + len(characters)

    def allowed(piece: str) -> bool:
        return piece not in alphabet.taken and alphabet.length(piece) <= LONGEST

    merges = learn_merges(ids, names, left_over, next_id, allowed)
    for left, right, number in merges:
        if number >= first:
            pieces.setdefault(number, [*pieces.get(left, [left]), *pieces.get(right, [right])])
    if not pieces:
        raise UserError("tokenizer", "knows all that this text repeats", "give more text, or train with what it has")
    _append(spec, {names[number]: number for number in sorted(pieces)}, [(names[a], names[b]) for a, b, _ in merges])
    backend, old = Backend.from_str(json.dumps(spec)), tokenizer
    again = Tokenizer(backend, old.config, old.chat_template, old.more_stop_ids, old.where)
    return Extended(again, pieces)


def _alphabet(spec: dict[str, Any], tokenizer: Tokenizer) -> Alphabet:
    """How this tokenizer spells. UserError: one that cannot be extended."""
    model, kind = spec["model"], spec["model"]["type"]
    if kind != "BPE":
        why = f"is a {kind} tokenizer, whose pieces are no merges, so none can be added behind the old ones"
        raise UserError(tokenizer.where, why, "extend a BPE tokenizer (Llama, Qwen, SmolLM), or train a new one")
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")):
        raise UserError(tokenizer.where, "marks the ends of words or merges at random", "extend another tokenizer")
    if '"ByteLevel"' in json.dumps(spec["pre_tokenizer"]):
        return Bytes(spec, tokenizer)
    if model.get("byte_fallback"):
        return Fallback(spec, tokenizer)
    raise UserError(tokenizer.where, "is a BPE that cannot spell every text in bytes", "extend another tokenizer")


def _append(spec: dict[str, Any], pieces: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Put pieces and merges behind those of a tokenizer.json."""
    model = spec["model"]
    for token in spec["added_tokens"]:  # outside the vocabulary they would be numbered anew, behind the new pieces
        model["vocab"].setdefault(token["content"], token["id"])
    model["vocab"] |= pieces
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in merges]
