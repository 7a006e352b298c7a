"""How do messages, text and lists of ids become prompts of token ids?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from groundup.errors import UserError
from groundup.infer.thinking import OPEN
from groundup.serve.api_errors import bad, from_user_error
from groundup.serve.api_models import Served
from groundup.serve.api_schema import Message, Part


@dataclass(frozen=True)
class Prompt:
    """ids as the engine gets them. hidden: how many of them at the start the client did not write (the bos).

    thinking: whether the prompt leaves an open <think> behind.
    """

    ids: list[int]
    hidden: int = 0
    thinking: bool = False


def chat_prompt(
    served: Served,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    enable_thinking: bool | None,
    add_generation_prompt: bool = True,
) -> Prompt:
    """The chat template's work. Raises ApiError where a message cannot be used or the template refuses the chat."""
    said = [message_of(message, f"messages[{i}]") for i, message in enumerate(messages)]
    try:
        rendered = served.tokenizer.render(said, tools or None, add_generation_prompt, enable_thinking)
    except UserError as error:
        raise from_user_error(error, "messages", served.tokenizer.where) from error
    except RecursionError:
        raise bad("messages", "messages or tools are nested too deeply") from None
    thinking = add_generation_prompt and rendered.text.rstrip().endswith(OPEN)
    return Prompt(rendered.ids, thinking=thinking)


def message_of(message: Message, where: str) -> dict[str, Any]:
    """A message as the chat template knows it."""
    said: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(message.content, where),
        "reasoning_content": message.reasoning_content,
        "tool_call_id": message.tool_call_id,
        "name": message.name,
        "tool_calls": [call.model_dump(exclude_none=True) for call in message.tool_calls or []],
    }
    return {key: value for key, value in said.items() if value}


def _text(content: str | list[Part] | None, where: str) -> str:
    if not isinstance(content, list):
        return content or ""
    texts = []
    for i, part in enumerate(content):
        if part.type not in ("text", "refusal"):
            why = f"is of type {part.type[:40]!r}; this model reads text only"
            raise bad(f"{where}.content[{i}]", f"{where}.content[{i}] {why}")
        texts.append(part.text or "")
    return "".join(texts)


def text_prompts(served: Served, given: str | Sequence[Any], name: str = "prompt", start: bool = True) -> list[Prompt]:
    """One text, several, the ids of one, or of several, as prompts. A text starts a document: it gets a bos.

    Raises ApiError on an empty list and on ids that the vocabulary has not.
    """
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise bad(name, f"{name} is an empty list")
    bos = [served.tokenizer.bos_id] if start else []
    prompts = []
    for one in given:
        if isinstance(one, str):
            try:
                prompts.append(Prompt(bos + served.tokenizer.encode(one), hidden=len(bos)))
            except UserError as error:
                raise from_user_error(error, name, served.tokenizer.where) from error
        else:
            if not one:
                raise bad(name, f"{name} holds an empty list of ids")
            check_ids(served, one, name)
            prompts.append(Prompt(list(one)))
    return prompts


def check_ids(served: Served, ids: Sequence[int], name: str) -> None:
    size = served.tokenizer.vocab_size
    wrong = next((token for token in ids if token >= size), None)
    if wrong is not None:
        raise bad(name, f"{name}: {wrong} is no token; the vocabulary has {size}")


def check_context(served: Served, prompts: Sequence[Prompt], name: str, room: int = 1) -> None:
    """room: tokens that must be left for an answer."""
    for prompt in prompts:
        if len(prompt.ids) + room > served.context:
            why = f"{len(prompt.ids)} tokens do not fit in the model's context of {served.context}"
            text = f"{name}: {why}" + (" together with an answer" if room and len(prompt.ids) <= served.context else "")
            raise bad(name, text, "context_length_exceeded")
