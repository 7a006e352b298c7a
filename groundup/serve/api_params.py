"""What does a request ask of the engine? The one place where fields of the API become SamplingParams."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from groundup.infer.params import Grammar, SamplingParams
from groundup.infer.toolcalls import CLOSE, tool_grammar
from groundup.serve.api_errors import bad
from groundup.serve.api_models import Served, ServerSettings
from groundup.serve.api_prompt import Prompt, check_ids
from groundup.serve.api_schema import ChatRequest, ChosenTool, CompletionRequest, Sampling

COMPLETION_TOKENS = 16  # what OpenAI gives a text completion that names no max_tokens


def chat_params(body: ChatRequest, served: Served, settings: ServerSettings, prompt: Prompt) -> SamplingParams:
    """Raises ApiError on fields that contradict each other or the model."""
    _check_chat(body)
    grammar, stop = _grammar(body, prompt.thinking), _stop(body)
    if grammar is None and offered_tools(body) and body.parallel_tool_calls is False:
        stop = (*stop, CLOSE)  # the first call is then the last
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    most = _max_tokens(name, asked, served, settings, len(prompt.ids))
    return _params(
        body, served, settings, n=body.n or 1, max_tokens=most, stop=stop, logprobs=logprobs, grammar=grammar
    )


def completion_params(
    body: CompletionRequest, served: Served, settings: ServerSettings, prompt_tokens: int
) -> SamplingParams:
    """prompt_tokens: of the shortest prompt. Raises ApiError on fields that contradict each other or the model."""
    _check_completion(body)
    n, best_of = body.n or 1, body.best_of or body.n or 1
    # the best are found by their logprobs
    logprobs = 0 if body.logprobs is None and best_of > n else body.logprobs
    asked = COMPLETION_TOKENS if body.max_tokens is None else max(body.max_tokens, 1)  # 0: echo alone, see Text
    return _params(
        body,
        served,
        settings,
        n=best_of,
        max_tokens=_max_tokens("max_tokens", asked, served, settings, prompt_tokens),
        stop=_stop(body),
        logprobs=logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )


def offered_tools(body: ChatRequest) -> bool:
    """Whether the model may call a tool."""
    return bool(body.tools) and body.tool_choice != "none"


def enable_thinking(body: ChatRequest) -> bool | None:
    return body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None


def _params(
    body: Sampling, served: Served, settings: ServerSettings, *, n: int, max_tokens: int, **more: Any
) -> SamplingParams:
    """The fields that both endpoints have, over the folder's own habits."""
    most = min(settings.max_n, served.worker.engine.settings.max_sequences)
    if n > most:
        raise bad("n" if n == body.n else "best_of", f"{n} answers are asked for; this server gives at most {most}")
    if body.stream_options and not body.stream:
        raise bad("stream_options", "stream_options is for streams: set stream to true")
    given = {
        name: getattr(body, name)
        for name in (
            "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
            "ignore_eos",
        )
    }  # fmt: skip
    given["top_k"] = None if body.top_k is None else max(body.top_k, 0)
    given["logit_bias"] = _logit_bias(body.logit_bias or {}, served) or None
    check_ids(served, body.stop_token_ids or [], "stop_token_ids")
    given["stop_token_ids"] = body.stop_token_ids or None
    given |= {"n": n, "max_tokens": max_tokens, **more}
    return dataclasses.replace(served.defaults, **{name: value for name, value in given.items() if value is not None})


def _max_tokens(name: str, asked: int | None, served: Served, settings: ServerSettings, prompt_tokens: int) -> int:
    """What is asked for, or what fits; the context ends an answer in any case."""
    limit = settings.max_tokens_limit
    if asked is not None and limit is not None and asked > limit:
        raise bad(name, f"{name} is {asked}; this server gives at most {limit}")
    room = max(1, served.context - prompt_tokens)  # check_context has refused a prompt without room
    return min(value for value in (asked, limit, room) if value is not None)


def _stop(body: Sampling) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _logit_bias(biases: dict[str, float], served: Served) -> dict[int, float]:
    """JSON has keys of text only."""
    found = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise bad("logit_bias", f"logit_bias: {key[:40]!r} is no token id")
        check_ids(served, [int(key)], "logit_bias")
        found[int(key)] = float(bias)
    return found


def _grammar(body: ChatRequest, thinking: bool) -> Grammar | None:
    """What the answer must look like: a call, when one is required, or else the response format.

    thinking: whether the prompt has opened a thought.
    """
    form, choice = body.response_format, body.tool_choice
    if choice == "required" or isinstance(choice, ChosenTool):
        if form is not None and form.type != "text":
            raise bad("response_format", f"response_format {form.type} cannot hold for an answer that must be a call")
        wanted = choice if isinstance(choice, str) else choice.model_dump()
        return tool_grammar(tool_dicts(body), wanted, body.parallel_tool_calls is not False, thinking)
    if form is None or form.type == "text":
        return None
    if form.json_schema is None or form.type == "json_object":
        return Grammar("json_object", thinking=thinking)
    return Grammar("json_schema", json.dumps(form.json_schema.schema_, ensure_ascii=False), thinking)


def tool_dicts(body: ChatRequest) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True) for tool in body.tools or []]


def _check_chat(body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs", "top_logprobs is for logprobs: set logprobs to true")
    if body.functions:
        raise bad("functions", "functions is no longer known: use tools")
    choice = body.tool_choice
    if (choice == "required" or isinstance(choice, ChosenTool)) and not body.tools:
        raise bad("tool_choice", "tool_choice is for tools: give tools")
    if isinstance(choice, ChosenTool):
        names = [tool.function.name for tool in body.tools or []]
        if choice.function.name not in names:
            called = choice.function.name[:100]
            raise bad("tool_choice", f"tool_choice names {called!r}, which is not one of tools: {', '.join(names)}")


def _check_completion(body: CompletionRequest) -> None:
    n = body.n or 1
    if body.suffix:
        raise bad("suffix", "suffix is not supported: these models do not fill in")
    if body.best_of is not None and body.best_of < n:
        raise bad("best_of", f"best_of is {body.best_of}; it must be n ({n}) or more")
    if body.stream and (body.best_of or n) > n:
        raise bad("best_of", "best_of larger than n is not possible in a stream: the best is known at the end")
