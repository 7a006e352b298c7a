"""The chat template in Go's template language, which is what Ollama renders.

Ours is written out once below. Of another template the plain part (what stands around a system, user and assistant
message) is found by rendering it, and taken only if it foretells whole chats.

Two readings of Ollama decide the shape. Ollama looks for the tags of a thought in the list around `.Thinking` that
starts and ends with text, and for the tag of a call in the first text inside `if .ToolCalls`. And it sets Think to true
for a model that can think when the client says nothing, so here, as for llama.cpp (template.py), true means that the
model decides, and only false closes the thought.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from groundup.errors import UserError
from groundup.export.template import forces_thought, is_ours, prompt
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.template import render_text

OURS = """\
{{- $off := and .IsThinkSet (not .Think) -}}
{{- $system := "" }}{{ $has := false }}{{ $previous := "" -}}
{{- range $i, $message := .Messages }}
{{- if and (eq $i 0) (eq $message.Role "system") }}{{ $system = $message.Content }}{{ $has = true }}{{ end }}
{{- end }}
{{- if .Tools -}}
<|im_start|>system
{{ if $system }}{{ $system }}

{{ end }}# Tools
<tools>
{{- range .Tools }}
{"type": "function", "function": {{ .Function }}}
{{- end }}
</tools>
To call one, write:
<tool_call>
{"name": NAME, "arguments": OBJECT}
</tool_call><|im_end|>
{{ else if $has -}}
<|im_start|>system
{{ $system }}<|im_end|>
{{ end }}
{{- range $i, $message := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if or (eq .Role "user") (and (eq .Role "system") (gt $i 0)) -}}
<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" -}}
<|im_start|>assistant
{{ if .Thinking -}}
<think>
{{ .Thinking }}
</think>

{{ else if $off -}}
<think>

</think>

{{ end }}
{{- .Content }}
{{- if and .Content (len .ToolCalls) }}
{{ end }}
{{- if .ToolCalls }}{{ range $j, $_ := .ToolCalls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ if gt (len (slice $message.ToolCalls $j)) 1 }}
{{ end }}{{ end }}{{ end }}
{{- if not $last }}<|im_end|>
{{ end }}
{{- else if eq .Role "tool" }}
{{- if ne $previous "tool" }}<|im_start|>user{{ end }}
<tool_response>
{{ .Content }}
</tool_response>
{{- $next := "" }}{{ if not $last }}{{ $next = (index (slice $.Messages $i) 1).Role }}{{ end }}
{{- if ne $next "tool" }}<|im_end|>
{{ end }}
{{- end }}
{{- $previous = .Role }}
{{- end }}
{{- if ne $previous "assistant" }}<|im_start|>assistant
{{ if $off -}}
<think>

</think>

{{ end }}{{ end }}"""


def go_template(tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """(template, notes). UserError for a chat template of which even the plain part cannot be told."""
    if is_ours(tokenizer):
        return OURS, ["Ollama writes the JSON of tools and of calls in a chat's past without spaces; training had them"]
    template = _plain(tokenizer)
    notes = []
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    if prompt(tokenizer) != prompt(tokenizer, tools=[tool]):
        notes.append("the template's tools are not carried over to Ollama")
    if forces_thought(tokenizer) or prompt(tokenizer) != prompt(tokenizer, enable_thinking=False):
        notes.append("the template's thinking switch is not carried over to Ollama")
    return template, notes


Chat = list[tuple[str, str]]


def _plain(tokenizer: Tokenizer) -> str:
    """What stands around each message, as a Go template."""
    fix = "write a Modelfile by hand around a GGUF: --to gguf"
    if not tokenizer.chat_template:
        raise UserError(tokenizer.where, "has no chat template, which Ollama needs", fix)
    parts = _around(tokenizer)
    if parts is None or any("{{" in piece or '"""' in piece for piece in parts.values()):
        raise UserError(tokenizer.where, "its chat template is not one that Ollama's language can say", fix)
    turns = [
        f'{{{{ {word} eq .Role "{role}" }}}}{parts[f"before {role}"]}{{{{ .Content }}}}{parts[f"after {role}"]}'
        for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant"))
    ]
    first = '{{ $first := "" }}{{ range $i, $_ := .Messages }}{{ if eq $i 0 }}{{ $first = .Role }}{{ end }}{{ end }}'
    default = f'{{{{ if ne $first "system" }}}}{parts["default"]}{{{{ end }}}}' if parts["default"] else ""
    return f"{first}{default}{{{{ range .Messages }}}}{''.join(turns)}{{{{ end }}}}{{{{ end }}}}{parts['open']}"


def _around(tokenizer: Tokenizer) -> dict[str, str] | None:
    """Text before and after the content of each role, before a chat without system message, and where the assistant
    starts; None where they do not foretell what the template writes."""

    def run(chat: Chat, prompt: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in chat]
        given = {**tokenizer.special, "tools": None, "documents": None, "add_generation_prompt": prompt}
        text = render_text(tokenizer.chat_template, {**given, "messages": messages})
        begin = tokenizer.special.get("bos_token", "")
        return text.removeprefix(begin) if begin and _adds_begin(tokenizer, begin) else text

    try:
        parts = _measure(run)
        for system, turns in product((False, True), (1, 2, 3)):
            chat: Chat = [("system", "Be brief.")] if system else []
            for turn in range(turns):
                chat += [("user", f"Question {turn}?"), ("assistant", f"Answer {turn}.")]
            chat.pop()
            told = "" if system else parts["default"]
            told += "".join(parts[f"before {role}"] + content + parts[f"after {role}"] for role, content in chat)
            if told + parts["open"] != run(chat, prompt=True):
                return None
    except Exception:  # the template refuses one of these chats, in any way that Python code can
        return None
    return parts


def _measure(run: Callable[..., str]) -> dict[str, str]:
    """The parts, from chats that differ in one message. ValueError where a chat is no longer version of another."""
    s, u, a, v = ("system", "\ue001"), ("user", "\ue002"), ("assistant", "\ue003"), ("user", "\ue004")
    parts: dict[str, str] = {}

    def note(role: str, text: str, mark: str) -> None:
        parts[f"before {role}"], found, parts[f"after {role}"] = text.partition(mark)
        if not found:
            raise ValueError(role)

    def rest(whole: str, start: str, end: str = "") -> str:
        if not (whole.startswith(start) and whole.endswith(end)):
            raise ValueError(whole)
        return whole[len(start) : len(whole) - len(end)]

    note("system", run([s]), s[1])
    note("user", rest(run([s, u]), run([s])), u[1])
    last = parts["before user"] + v[1] + parts["after user"]
    note("assistant", rest(run([s, u, a, v]), run([s, u]), last), a[1])
    parts["open"] = rest(run([s, u], True), run([s, u]))
    parts["default"] = rest(run([u]), "", parts["before user"] + u[1] + parts["after user"])
    return parts


def _adds_begin(tokenizer: Tokenizer, begin: str) -> bool:
    """Whether the tokenizer itself puts bos before every text: then so does the engine, and the template must not."""
    return tokenizer.backend.encode("a", add_special_tokens=True).tokens[0] == begin
