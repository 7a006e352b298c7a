"""The chat template as other engines should have it.

Two things differ outside. (1) {% generation %} marks are for training; not every engine knows the tag. (2) llama.cpp
always defines `enable_thinking`, as true when the client says nothing, and a client's own `true` looks the same. A
template that opens a thought for `true` would so force one on every answer. THINKING, put in front of such a template,
reads `true` as "nothing said": the model decides, as it does here. A client still chooses: `enable_thinking` false
closes the thought, and `thinking` (a variable that nobody sets by default) true or false forces it open or closed.
"""

from __future__ import annotations

from typing import Any

from groundup.tokenizer import Tokenizer, plain_template
from groundup.tokenizer.bpe import TEMPLATE
from groundup.tokenizer.template import render_text

THINKING = (
    "{%- set enable_thinking = thinking if thinking is defined else "
    "(false if enable_thinking is defined and enable_thinking is false else none) %}"
)
PROBE = [{"role": "user", "content": "1 + 1?"}]


def outside_template(tokenizer: Tokenizer) -> str:
    """The template for engines outside: no generation marks, and THINKING in front where `true` needs it."""
    template = plain_template(tokenizer.chat_template)
    return THINKING + template if template and forces_thought(tokenizer) else template


def inside_template(template: str) -> str:
    """The template of a GGUF as we keep it: THINKING taken off, and our own given its generation marks back."""
    template = template.removeprefix(THINKING)
    ours = TEMPLATE.read_text(encoding="utf-8")
    return ours if template == plain_template(ours) else template


def is_ours(tokenizer: Tokenizer) -> bool:
    """Whether the chat template is the one that groundup trains with."""
    return plain_template(tokenizer.chat_template) == plain_template(TEMPLATE.read_text(encoding="utf-8"))


def forces_thought(tokenizer: Tokenizer) -> bool:
    """Whether the template writes something else for enable_thinking true than for nothing at all."""
    return prompt(tokenizer) != prompt(tokenizer, enable_thinking=True)


def prompt(tokenizer: Tokenizer, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str | None:
    """A chat rendered up to where the assistant speaks; None where the template refuses it."""
    given = {**tokenizer.special, "tools": None, "documents": None, "add_generation_prompt": True, **variables}
    try:
        return render_text(tokenizer.chat_template, {**given, "messages": messages or PROBE})
    except Exception:  # a template may refuse a chat for reasons of its own, in any way that Python code can
        return None
