"""A folder for Ollama: the GGUF, a Modelfile that says how it speaks and where it stops, and what to type."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from groundup.errors import UserError
from groundup.export.gguf_file import write_gguf
from groundup.export.go_template import go_template
from groundup.files import write_atomic
from groundup.model.config import ModelConfig
from groundup.tokenizer import Tokenizer, load_tokenizer

GGUF, MODELFILE, README = "model.gguf", "Modelfile", "README.md"
MOST_CONTEXT = 32768  # tokens: Ollama reserves memory for all of num_ctx at once
HABITS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def write_ollama(directory: Path, quant: str, folder: Path, name: str) -> dict[str, Any]:
    """Write model.gguf, Modelfile and README.md into `folder`, check them, and report. UserError as write_gguf, and for
    a chat template that Ollama's language cannot say."""
    config, tokenizer = ModelConfig.from_dir(directory), load_tokenizer(directory)
    template, notes = go_template(tokenizer)  # before the long part: it may be refused
    text = modelfile(template, tokenizer, config, _habits(directory))
    check_modelfile(text, tokenizer)
    folder.mkdir()
    report = write_gguf(directory, quant, folder / GGUF, name)
    write_atomic(folder / MODELFILE, text)
    write_atomic(folder / README, _readme(_tag(name), report))
    report["notes"] += [*notes, *_engine_notes(config, report["pre_tokenizer"])]
    report["bytes"] = sum(path.stat().st_size for path in folder.iterdir())
    return {**report, "files": [GGUF, MODELFILE, README], "stops": _stops(tokenizer)}


def modelfile(template: str, tokenizer: Tokenizer, config: ModelConfig, habits: dict[str, Any]) -> str:
    """The Modelfile. No SYSTEM: a system prompt is the client's to give. habits: sampling, in Ollama's names."""
    lines = [f"FROM ./{GGUF}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in _stops(tokenizer)]
    lines.append(f"PARAMETER num_ctx {min(config.max_position_embeddings, MOST_CONTEXT)}")
    lines += [f"PARAMETER {key} {value}" for key, value in habits.items()]
    return "\n".join(lines) + "\n"


def check_modelfile(text: str, tokenizer: Tokenizer) -> None:
    """UserError unless every stop is listed and the template's blocks close: a structure that Ollama would refuse."""
    template = text.partition('"""')[2].partition('"""')[0]
    words = [match[1] for match in re.finditer(r"\{\{-?\s*(\w+|\S)", template)]
    depth = 0
    for word in words:
        depth += {"if": 1, "range": 1, "with": 1, "end": -1}.get(word, 0)
        if depth < 0:
            break
    stops = re.findall(r"^PARAMETER stop (.+)$", text, re.MULTILINE)
    if depth or template.count("{{") != template.count("}}") or ".Messages" not in template:
        raise UserError(MODELFILE, "its template does not close", "please report the chat template")
    if [json.loads(stop) for stop in stops] != _stops(tokenizer):
        raise UserError(MODELFILE, "does not list every stop", "please report the tokenizer")


def _stops(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.backend.id_to_token(number) or "" for number in tokenizer.stop_ids]


def _habits(directory: Path) -> dict[str, Any]:
    """Sampling as the folder's generation_config.json has it; greedy without one that samples, as everywhere here."""
    path = directory / "generation_config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise UserError(path, "is not valid JSON", "mend or remove it") from None
    found = {new: stored[old] for old, new in HABITS.items() if stored.get(old) is not None}
    if not stored.get("do_sample"):
        found = {"temperature": 0, "repeat_penalty": found.get("repeat_penalty", 1)}
    return {"repeat_penalty": 1, **found}


def _engine_notes(config: ModelConfig, pre_tokenizer: str) -> list[str]:
    """Ollama's own engine cuts a qwen3's text as Qwen does, whatever the file says (model/models/qwen3/model.go)."""
    if config.model_type == "qwen3" and pre_tokenizer != "qwen2":
        return [f"Ollama's own qwen3 engine cuts text as qwen2 does, not as {pre_tokenizer}: rare texts get other ids"]
    return []


def _tag(name: str) -> str:
    """A name that `ollama create` takes."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"


def _readme(tag: str, report: dict[str, Any]) -> str:
    check = report["check"]
    return f"""# {tag} for Ollama

In this folder:

    ollama create {tag} -f {MODELFILE}
    ollama run {tag}

`{GGUF}` ({report["quant"]}) also runs in llama.cpp by itself: `llama-server -m {GGUF} --jinja`.
Against the original, on {check["tokens"]} tokens: KL {check["kl"]:.2g} nats a token, the same first choice for
{100 * check["top1_agreement"]:.1f} % of them.
"""
