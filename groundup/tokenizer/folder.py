"""Stock tokenizer folders, in and out: the files that transformers, vLLM and llama.cpp's converter read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from groundup.errors import UserError
from groundup.tokenizer.tokenizer import Tokenizer

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


def load_tokenizer(dir: str | Path) -> Tokenizer:
    """Load the tokenizer of any stock model folder (ours, Qwen, Llama, SmolLM, ...), without torch or transformers.

    Raises UserError that names the files looked for when the folder has no tokenizer.json.
    """
    folder = Path(dir)
    if not folder.is_dir():
        raise UserError(folder, "is not a folder", "give the folder of a model or tokenizer")
    if not (folder / TOKENIZER).is_file():
        raise _no_tokenizer(folder)
    try:
        backend = Backend.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the backend raises bare Exception for whatever is wrong with the file
        why = f"cannot be read as a tokenizer ({error})"
        raise UserError(folder / TOKENIZER, why, "copy the file again") from error
    backend.no_truncation()
    backend.no_padding()
    config = {**_special_tokens_map(folder), **_json(folder / CONFIG)}
    stop = _json(folder / "generation_config.json").get("eos_token_id")
    stops = tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,)
    return Tokenizer(backend, config, _template(folder, config), stops, str(folder))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend.save(str(folder / TOKENIZER), pretty=True)
    config = {key: value for key, value in tokenizer.config.items() if key != "chat_template"}
    (folder / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if tokenizer.chat_template:
        (folder / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")


def _no_tokenizer(folder: Path) -> UserError:
    others = ("tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
    found = [name for name in others if (folder / name).is_file()]
    if found:
        make = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        how = f'python -c "from transformers import AutoTokenizer; {make}"'
        return UserError(folder, f"has {', '.join(found)} but no {TOKENIZER}", f"make one: {how}")
    why = f"has no tokenizer: looked for {TOKENIZER} (beside it {CONFIG}, {TEMPLATE})"
    return UserError(folder, why, "copy the files there, or make them: groundup tokenizer train FILES --output DIR")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(path, f"is not valid JSON ({error})", "copy the file again") from error
    if not isinstance(content, dict):
        raise UserError(path, "does not hold a JSON object", "copy the file again")
    return content


def _special_tokens_map(folder: Path) -> dict[str, Any]:
    tokens = _json(folder / "special_tokens_map.json")
    return {
        name: token for name, token in tokens.items() if name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }


def _template(folder: Path, config: dict[str, Any]) -> str:
    """chat_template.jinja first, as transformers does; then chat_template.json; then inside tokenizer_config.json."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    template = _json(folder / "chat_template.json").get("chat_template") or config.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default", next(iter(named.values()), ""))
    return template
