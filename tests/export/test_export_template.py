"""The template outside: llama.cpp's `enable_thinking` true by default must not force a thought, and a client still
chooses. Rendered by plain jinja2, as any engine would, without an extension of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from groundup.export.template import THINKING, forces_thought, inside_template, is_ours, outside_template
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.bpe import TEMPLATE

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "三"]}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "加", "parameters": {"type": "object"}}}
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be Ada."}, {"role": "user", "content": "1+1?"}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
        {"role": "user", "content": "And 2+2?"},
    ],
    [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
    ],
]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def run(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """Any Jinja engine: it knows tojson, and nothing of ours."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **variables)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_a_client_that_says_nothing_gets_what_we_render(tokenizer: Tokenizer, chat: list, tools: Any) -> None:
    def ours(**options: Any) -> str:
        return tokenizer.render(chat, tools=tools, add_generation_prompt=True, **options).text

    template = outside_template(tokenizer)
    assert template.startswith(THINKING) and "generation %}" not in template
    given = {"tools": tools} if tools else {}
    for silent in ({}, {"enable_thinking": True}):  # llama.cpp's default looks like a client's own true
        assert run(template, chat, **given, **silent) == ours()
    for closed in ({"enable_thinking": False}, {"enable_thinking": True, "thinking": False}, {"thinking": False}):
        assert run(template, chat, **given, **closed) == ours(enable_thinking=False)
    for opened in ({"enable_thinking": True, "thinking": True}, {"thinking": True}):
        assert run(template, chat, **given, **opened) == ours(enable_thinking=True)
    assert ours() != ours(enable_thinking=True) != ours(enable_thinking=False)


def test_ours_comes_back_with_its_generation_marks(tokenizer: Tokenizer) -> None:
    assert inside_template(outside_template(tokenizer)) == TEMPLATE.read_text(encoding="utf-8")
    assert is_ours(tokenizer) and forces_thought(tokenizer)


def test_another_template_goes_out_and_in_as_it_is(tokenizer: Tokenizer) -> None:
    other = Tokenizer(tokenizer.backend, tokenizer.config, CHATML)
    assert outside_template(other) == CHATML == inside_template(CHATML)
    assert not is_ours(other)


def test_a_folder_without_a_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert outside_template(Tokenizer(tokenizer.backend, tokenizer.config, "")) == ""
