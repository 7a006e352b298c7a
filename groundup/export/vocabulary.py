"""The tokenizer as GGUF fields, and back.

A GGUF keeps tokens, their kinds, merges and the name of the pre-tokenizer; pretokenizer.py turns that name into
regexes. What it cannot keep (tokens that swallow the space beside them) is said in the notes of the report.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer as Backend

from groundup.errors import UserError
from groundup.export.pretokenizer import PreTokenizer, by_name, recognise, spell_out
from groundup.export.reader import GgufFile
from groundup.export.template import inside_template, outside_template
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.chat import turn_end

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # llama.cpp's kinds of tokens
# llama.cpp stops at tokens spelled like these, whatever ids a file names as ends.
ENDS_BY_NAME = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>")
PADDING = re.compile(r"\[PAD\d+\]")  # the name that llama.cpp's own converter gives to a row without a token
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def vocabulary_fields(tokenizer: Tokenizer, rows: int) -> tuple[dict[str, Any], list[str]]:
    """(GGUF fields, notes for the report) of a tokenizer whose model has `rows` embeddings.

    Raises UserError for a tokenizer that is not byte-level BPE, cuts text in a way that llama.cpp has no name for, or
    has more tokens than the model.
    """
    spec = json.loads(tokenizer.backend.to_str())
    known = recognise(spec, tokenizer.where)
    tokens, kinds = _tokens(tokenizer, rows)
    begin = _added_at_start(tokenizer)
    fields: dict[str, Any] = {
        "model": "gpt2",
        "pre": known.name,
        "tokens": tokens,
        "token_type": kinds,
        "merges": [_merge(merge, tokenizer.where) for merge in spec["model"]["merges"]],
        "bos_token_id": begin[0] if begin else tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "eot_token_id": min(turn_end(tokenizer), default=tokenizer.eos_id),
        "eos_token_ids": tokenizer.stop_ids,
        "padding_token_id": tokenizer.pad_id,
        "add_bos_token": bool(begin),
        "add_eos_token": False,
    }
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    if tokenizer.chat_template:
        fields["tokenizer.chat_template"] = outside_template(tokenizer)
    return fields, _notes(tokenizer, spec)


def read_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer of a GGUF, ready to save. UserError for another kind than byte-level BPE, or a name we know not."""
    kind = file.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(file.path, f"holds a {kind or 'missing'!s} tokenizer", "only byte-level BPE (gpt2) comes in")
    known = by_name(file.get("tokenizer.ggml.pre", ""), file.path)
    tokens: list[str] = file.get("tokenizer.ggml.tokens", [])
    kinds: list[int] = file.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or not file.get("tokenizer.ggml.merges"):
        raise UserError(file.path, "its tokens, their kinds and merges do not fit together", "fetch the file again")
    found = {name: _token_at(file, tokens, f"{role}_token_id") for name, role in ROLES.items()}
    special = {name: text for name, text in found.items() if text is not None}
    adds_bos = bool(file.get("tokenizer.ggml.add_bos_token", known.adds_bos)) and "bos_token" in special
    spec = _spec(tokens, kinds, file.get("tokenizer.ggml.merges"), known)
    if adds_bos:
        spec["post_processor"] = _begin_with(special["bos_token"], tokens)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.need("context_length"),
    }
    ends = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    ends += file.get("tokenizer.ggml.eos_token_ids") or []
    more = tuple(dict.fromkeys(end for end in ends if end is not None and end < len(tokens)))
    template = inside_template(file.get("tokenizer.chat_template", ""))
    try:
        backend = Backend.from_str(json.dumps(spec))
    except Exception as error:  # the backend raises bare Exception for whatever is wrong with its JSON
        why = f"its tokenizer cannot be built ({error})"
        raise UserError(file.path, why, "fetch the file again") from error
    return Tokenizer(backend, config, template, more, str(file.path))


def _tokens(tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """A token and its kind for each of the model's rows."""
    if tokenizer.vocab_size > rows:
        why = f"has {tokenizer.vocab_size} tokens, but the model only {rows} embeddings"
        raise UserError(tokenizer.where, why, "use the tokenizer that the model was trained with")
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        tokens[number], kinds[number] = token, NORMAL
    for number, added in tokenizer.backend.get_added_tokens_decoder().items():
        tokens[number], kinds[number] = added.content, CONTROL if added.special else USER_DEFINED
    return tokens, kinds


def _merge(merge: str | list[str], where: str) -> str:
    """`a b`, from either spelling of tokenizer.json."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if len(pair) != 2 or any(not piece or " " in piece for piece in pair):
        raise UserError(where, f"merge {merge!r} is no pair of byte-level pieces", "only byte-level BPE goes out")
    return " ".join(pair)


def _added_at_start(tokenizer: Tokenizer) -> list[int]:
    """What the stock tokenizer puts before every text (Llama 3: its bos); found by looking, not by believing a flag."""
    with_special = tokenizer.backend.encode("a", add_special_tokens=True).ids
    without = tokenizer.backend.encode("a", add_special_tokens=False).ids
    return with_special[: len(with_special) - len(without)] if with_special[-len(without) :] == without else []


def _notes(tokenizer: Tokenizer, spec: dict[str, Any]) -> list[str]:
    """What the file cannot say."""
    notes = []
    if spec.get("normalizer"):
        notes.append("llama.cpp does not normalise text to NFC, as the tokenizer does")
    odd = [t["content"] for t in spec["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if odd:
        notes.append(f"{', '.join(odd)}: their lstrip, rstrip or single_word is not kept")
    named = {tokenizer.eos_id, *turn_end(tokenizer)}
    others = [tokenizer.backend.id_to_token(number) or "" for number in tokenizer.stop_ids if number not in named]
    others = [token for token in others if token not in ENDS_BY_NAME]
    if others:
        notes.append(f"llama.cpp may not stop at {', '.join(others)}: give it as a stop string")
    return notes


def _token_at(file: GgufFile, tokens: list[str], name: str) -> str | None:
    number = file.get(f"tokenizer.ggml.{name}")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _spec(tokens: list[str], kinds: list[int], merges: list[str], known: PreTokenizer) -> dict[str, Any]:
    """A tokenizer.json. Padding rows are left out; control and user-defined tokens are matched before anything else."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    vocab = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if not (kind == UNUSED and PADDING.fullmatch(token))
    }
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"ignore_merges": known.ignore_merges, "vocab": vocab, "merges": [merge.split(" ") for merge in merges]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if known.nfc else None,
        "pre_tokenizer": spell_out(known),
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": model,
    }


def _begin_with(token: str, tokens: list[str]) -> dict[str, Any]:
    """A post-processor that puts `token` before every text."""
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    known = {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, text[0]],
        "pair": [begin, text[0], {"SpecialToken": {"id": token, "type_id": 1}}, text[1]],
        "special_tokens": known,
    }
