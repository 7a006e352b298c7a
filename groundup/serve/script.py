"""How does a script ask it? Prompts from arguments, a file or a pipe; answers as text or as one JSON object."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.errors import UserError
from groundup.infer.params import SamplingParams, params_from_dir
from groundup.infer.thinking import split_thinking

if TYPE_CHECKING:
    from groundup.data.read import Reader
    from groundup.data.rows import Row
    from groundup.infer.engine import EngineSettings
    from groundup.infer.strategies import Asked
    from groundup.model.transformer import Transformer
    from groundup.tokenizer import Tokenizer


@dataclass(frozen=True)
class Longer:
    """Many samples a prompt, and a way to choose one of them: infer/strategies.py."""

    strategy: str
    budget: int = 16
    verifier: str | Path | None = None
    step: str = "\n"

    def sampled(self, params: SamplingParams, temperature: float | None) -> SamplingParams:
        """params that draw different samples. UserError: they cannot, or the strategy lacks something."""
        from groundup.infer.strategies import TEMPERATURE, check

        if temperature is None and params.greedy:
            params = replace(params, temperature=TEMPERATURE)
        check(self.strategy, self.budget, params, verified=self.verifier is not None)
        return params


def run_generate(
    path: str | Path,
    prompts: Sequence[str] = (),
    *,
    file: str | Path | None = None,
    raw: bool = False,
    as_json: bool = False,
    system: str | None = None,
    think: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    longer: Longer | None = None,
    quantize: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Answer all prompts in one batch, print, and return what `as_json` prints.

    prompts: questions; none: `file` (rows in any known format, .txt: a prompt a line), else stdin, a prompt a line.
    raw: continue the text instead of answering it in a chat. longer: many samples a prompt, of which one is chosen.
    The result: {"completions": [{"prompt" or "messages", "text", "reasoning"?, "finish_reason", "prompt_tokens",
    "tokens"}], "seconds", "tokens_per_second"}; of many samples also "answer", "agreement" (share of samples) and
    "score"? of the chosen one, and "samples". Raises UserError on no prompt, a bad row, or a prompt longer than the
    context.
    """
    requests = [{"prompt": p} for p in prompts] or list(_read(file))
    if not requests:
        raise UserError("prompts", "there are none", "give them as arguments, with --file, or on stdin")
    params = params_from_dir(
        path,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens,
        seed=seed,
        stop=tuple(stop),
    )
    from groundup.infer.engine import EngineSettings

    if longer:
        params = longer.sampled(params, temperature)
    model, tokenizer = load_pair(path, device)
    settings = EngineSettings(quantize=quantize)
    if longer:
        asked = [_ask(r, tokenizer, raw, system, think) for r in requests]
        start = time.perf_counter()
        found = _think_longer(model, tokenizer, settings, asked, params, longer, device)
    else:
        ids = [_encode(r, tokenizer, raw, system, think) for r in requests]
        start = time.perf_counter()
        found = _answer(model, tokenizer, settings, ids, params, raw, think)
    seconds = time.perf_counter() - start
    rows = [dict(request) | row for request, row in zip(requests, found, strict=True)]
    rate = sum(row["tokens"] for row in rows) / seconds
    result = {"completions": rows, "seconds": round(seconds, 3), "tokens_per_second": round(rate, 1)}
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        for row in rows:
            print(row["text"])
    return result


def _answer(
    model: Transformer, tokenizer: Tokenizer, settings: EngineSettings, prompts: list[list[int]],
    params: SamplingParams, raw: bool, think: bool | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One answer to each prompt."""
    from groundup.infer.generate import generate

    rows = []
    for c in generate(model, tokenizer, prompts, params, settings):
        reasoning, text = ("", c.text) if raw else split_thinking(c.text, think is True)
        row: dict[str, Any] = {"text": text} | ({"reasoning": reasoning} if reasoning else {})
        row |= {"finish_reason": c.finish_reason, "prompt_tokens": len(c.prompt_ids), "tokens": len(c.ids)}
        rows.append(row)
    return rows


def _think_longer(
    model: Transformer, tokenizer: Tokenizer, settings: EngineSettings, asked: list[Asked], params: SamplingParams,
    longer: Longer, device: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """The chosen one of many answers to each prompt."""
    from groundup.infer.engine import Engine
    from groundup.infer.strategies import answer, open_verifier

    score = open_verifier(longer.verifier, device) if longer.verifier else None
    engine = Engine(model, tokenizer, settings)
    rows = []
    for question, choice in zip(
        asked, answer(engine, asked, params, longer.strategy, longer.budget, score, step=longer.step), strict=True
    ):
        best = choice.sample
        reasoning, text = split_thinking(best.text) if question.messages else ("", best.text)
        row: dict[str, Any] = {"text": text} | ({"reasoning": reasoning} if reasoning else {})
        row |= {"answer": best.answer, "agreement": choice.agreement, "samples": len(choice.samples)}
        row |= {"score": best.score} if best.score is not None and isfinite(best.score) else {}
        row |= {"finish_reason": "stop" if best.ended else "length", "prompt_tokens": len(question.ids)}
        rows.append(row | {"tokens": choice.tokens})
    return rows


def _ask(request: dict[str, Any], tokenizer: Tokenizer, raw: bool, system: str | None, think: bool | None) -> Asked:
    from groundup.infer.strategies import Asked, ask

    if raw:
        return Asked(_encode(request, tokenizer, raw, system, think))
    return ask(tokenizer, _messages(request, system), request.get("tools"), think)


def load_pair(path: str | Path, device: str = "auto") -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a folder, on a device, ready to answer."""
    from groundup.adapt.open import open_model, open_tokenizer
    from groundup.device import pick_device, set_threads

    set_threads()
    tokenizer = open_tokenizer(path)
    return open_model(path, device=pick_device(device)), tokenizer


def _encode(
    request: dict[str, Any], tokenizer: Tokenizer, raw: bool, system: str | None, think: bool | None
) -> list[int]:
    if raw:
        if "prompt" not in request:
            raise UserError("--raw", "continues text, and a row holds a conversation", "leave --raw out")
        return [tokenizer.bos_id, *tokenizer.encode(request["prompt"])]
    messages, tools = _messages(request, system), request.get("tools")
    return tokenizer.render(messages, tools, add_generation_prompt=True, enable_thinking=think).ids


def _messages(request: dict[str, Any], system: str | None) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = request.get("messages") or [{"role": "user", "content": request["prompt"]}]
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _read(file: str | Path | None) -> Iterator[dict[str, Any]]:
    """Requests of a file, or of stdin when it is piped: {"prompt"}, or {"messages", "tools"?}."""
    if file is None:
        if not sys.stdin.isatty():
            yield from ({"prompt": line.rstrip("\r\n")} for line in sys.stdin if line.strip())
        return
    from groundup.data.read import Reader

    reader = Reader(f"{file}:line" if Path(file).suffix == ".txt" else file)
    for row in reader:
        yield _question(row, reader)


def _question(row: Row, reader: Reader) -> dict[str, Any]:
    """What a row asks: its text, or its messages up to the last answer."""
    from groundup.data.rows import Chat, Preference, Prompt, Text, as_prompt

    if isinstance(row, Text):
        return {"prompt": row.text}
    if isinstance(row, Preference):
        messages, tools = row.prompt, row.tools
    elif isinstance(row, (Chat, Prompt)):
        asked = as_prompt(row) if isinstance(row, Chat) else row
        messages, tools = asked.messages, asked.tools
    else:
        raise UserError(reader.where, f"{type(row).__name__} rows are no prompts", "give chats, prompts or text")
    if not messages:
        raise UserError(reader.where, "asks nothing", "a row needs a user message")
    if len(messages) == 1 and messages[0]["role"] == "user" and not tools:
        return {"prompt": messages[0]["content"]}
    return {"messages": messages} | ({"tools": tools} if tools else {})
