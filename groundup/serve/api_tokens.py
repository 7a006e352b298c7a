"""Beside the answers: /v1/embeddings, /tokenize and /detokenize."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from groundup.serve.api_context import context
from groundup.serve.api_errors import bad, json_response
from groundup.serve.api_logprobs import token_bytes
from groundup.serve.api_prompt import chat_prompt, check_context, check_ids, text_prompts
from groundup.serve.api_replies import ERRORS, Embeddings, Text, Tokens
from groundup.serve.api_schema import DetokenizeRequest, EmbeddingRequest, TokenizeRequest

router = APIRouter()
EMBED_TOKENS = 1024  # of one call to the engine: between two calls the answers under way go on
EMBED_PROMPTS = 2048  # of one request, as OpenAI has it


@router.post("/v1/embeddings", responses={200: {"model": Embeddings}, **ERRORS})
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """A vector of unit length for each input: the mean of the model's last hidden states."""
    api = context(request)
    served, adapter = api.models.find(body.model)
    if adapter is not None:
        raise bad("model", f"The model `{adapter}` is an adapter; embeddings come from `{served.name}`")
    width = served.worker.engine.model.config.hidden_size
    if body.dimensions is not None and body.dimensions != width:
        raise bad("dimensions", f"dimensions is {body.dimensions}; this model has {width}")
    served.worker.check_room()
    prompts = await run_in_threadpool(text_prompts, served, body.input, "input")
    if len(prompts) > EMBED_PROMPTS:
        raise bad("input", f"input has {len(prompts)} entries; at most {EMBED_PROMPTS} are taken")
    check_context(served, prompts, "input")
    vectors: list[torch.Tensor] = []
    for batch in _batches([prompt.ids for prompt in prompts]):
        vectors += await served.worker.call(partial(_embed, batch))
    tokens = sum(len(prompt.ids) for prompt in prompts)
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, body.encoding_format == "base64")}
        for i, vector in enumerate(vectors)
    ]
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "data": data, "model": served.name, "usage": used})


@router.post("/tokenize", responses={200: {"model": Tokens}, **ERRORS})
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The ids of a prompt, or of a chat as the model would see it."""
    served, _ = context(request).models.find(body.model)
    if body.messages is not None:
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        thinking = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None
        prompt_asked = body.add_generation_prompt is not False
        prompt = await run_in_threadpool(chat_prompt, served, body.messages, tools, thinking, prompt_asked)
    else:
        start = body.add_special_tokens is not False
        (prompt,) = await run_in_threadpool(text_prompts, served, body.prompt or "", "prompt", start)
    answer: dict[str, Any] = {"tokens": prompt.ids, "count": len(prompt.ids), "max_model_len": served.context}
    if body.return_token_strs:
        answer["token_strs"] = [token_bytes(served.tokenizer, i).decode("utf-8", "replace") for i in prompt.ids]
    return json_response(answer)


@router.post("/detokenize", responses={200: {"model": Text}, **ERRORS})
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of token ids."""
    served, _ = context(request).models.find(body.model)
    check_ids(served, body.tokens, "tokens")
    return json_response({"prompt": await run_in_threadpool(served.tokenizer.decode, body.tokens)})


def _embed(batch: Sequence[Sequence[int]], engine: Any) -> list[torch.Tensor]:
    return list(engine.embed(batch))


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Neighbours together as far as EMBED_TOKENS allows; a longer one alone."""
    batch: list[Sequence[int]] = []
    for prompt in prompts:
        if batch and sum(map(len, batch)) + len(prompt) > EMBED_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _written(vector: torch.Tensor, as_base64: bool) -> list[float] | str:
    numbers = vector.float().cpu().numpy()
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode() if as_base64 else numbers.tolist()
