"""How is text cut before merges apply? llama.cpp knows each way by a name; tokenizer.json spells it out as regexes.

A wrong name changes the ids of ordinary text without a word, so a way that is not in this table is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from groundup.errors import UserError

# What tokenizers' ByteLevel(use_regex=True) cuts by, in its own spelling and in OpenAI's.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_SPELLINGS = (GPT2, r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
DIGIT = r"\p{N}"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
QWEN2 = _HEAD + r"\p{N}" + _TAIL
LLAMA3 = _HEAD + r"\p{N}{1,3}" + _TAIL


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut. cuts: regexes applied in turn. ignore_merges: a piece that is an entry is taken whole.

    aliases: other names of llama.cpp for the same. nfc: its stock tokenizers normalise to NFC (llama.cpp does not).
    adds_bos: what llama.cpp does where the file says nothing.
    """

    name: str
    cuts: tuple[str, ...]
    ignore_merges: bool = False
    aliases: tuple[str, ...] = ()
    nfc: bool = False
    adds_bos: bool = False


KNOWN = (
    PreTokenizer("gpt-2", (GPT2,), aliases=("phi-2", "olmo", "mpt")),
    PreTokenizer("smollm", (DIGIT, GPT2), aliases=("starcoder", "refact", "command-r")),
    PreTokenizer("qwen2", (QWEN2,), aliases=("deepseek-r1-qwen",), nfc=True),
    PreTokenizer("llama-bpe", (LLAMA3,), ignore_merges=True, aliases=("llama3", "llama-v3"), adds_bos=True),
    PreTokenizer("dbrx", (LLAMA3,), aliases=("smaug-bpe",)),
)
NAMES = ", ".join(known.name for known in KNOWN)


def recognise(spec: dict[str, Any], where: object) -> PreTokenizer:
    """The way a tokenizer.json (as a dict) cuts. UserError naming `where` for one that is not in the table."""
    model = spec["model"]
    fix = f"known: {NAMES}"
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        raise UserError(where, f"its {model['type']} tokenizer is not byte-level BPE", "only byte-level BPE goes out")
    normalizers = [step["type"] for step in _steps(spec.get("normalizer"), "normalizers")]
    if [kind for kind in normalizers if kind != "NFC"]:
        raise UserError(where, f"its normalizer ({', '.join(normalizers)}) has no like in llama.cpp", fix)
    cuts = _cuts(spec.get("pre_tokenizer"), where, fix)
    for known in KNOWN:
        if (known.cuts, known.ignore_merges) == (cuts, bool(model.get("ignore_merges"))):
            return known
    way = " then ".join(map(repr, cuts))
    raise UserError(where, f"its pre-tokenizer cuts by {way}, which is none that we know", fix)


def by_name(name: str, where: object) -> PreTokenizer:
    """The entry for a GGUF's tokenizer.ggml.pre. UserError for one that we cannot spell out."""
    for known in KNOWN:
        if name == known.name or name in known.aliases:
            return known
    raise UserError(where, f"its pre-tokenizer {name or 'default'!r} is none that we know", f"known: {NAMES}")


def spell_out(known: PreTokenizer) -> dict[str, Any]:
    """The pre_tokenizer of a tokenizer.json."""
    steps = [_step(cut) for cut in known.cuts if cut != GPT2]
    steps.append({**_BYTES, "use_regex": GPT2 in known.cuts})
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _step(cut: str) -> dict[str, Any]:
    if cut == DIGIT:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}


def _cuts(pre_tokenizer: dict[str, Any] | None, where: object, fix: str) -> tuple[str, ...]:
    """The regexes of a pre-tokenizer, in turn; it must end by writing bytes as characters."""
    cuts: list[str] = []
    steps = _steps(pre_tokenizer, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise UserError(where, "its pre-tokenizer does not end in a ByteLevel without a prefix space", fix)
    for step in steps:
        if step["type"] == "ByteLevel":
            cuts += [GPT2] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step.get("individual_digits"):
            cuts.append(DIGIT)
        elif step["type"] == "Split" and (step["behavior"], step["invert"]) in _ALIKE and "Regex" in step["pattern"]:
            regex = step["pattern"]["Regex"]
            cuts.append(GPT2 if regex in GPT2_SPELLINGS else regex)
        else:
            raise UserError(where, f"its pre-tokenizer has a step {step['type']} that llama.cpp does not take", fix)
    return tuple(cuts)


# A regex that matches everything leaves the same pieces whether matches are cut out or gaps are thrown away.
_ALIKE = {("Isolated", False), ("Removed", True)}


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, nested sequences opened."""
    if part is None:
        return []
    return [step for child in part[inner] for step in _steps(child, inner)] if part["type"] == "Sequence" else [part]
