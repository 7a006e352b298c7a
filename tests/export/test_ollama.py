"""An Ollama folder: a Modelfile that lists every stop, and a Go template that says what our Jinja template says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from groundup.errors import UserError
from groundup.export.go_template import OURS, go_template
from groundup.export.ollama import check_modelfile
from groundup.export.run import export
from groundup.tokenizer import Tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FORGETS = "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
CALLS = [{"Function": {"Name": "add", "Arguments": {"a": 1}}}, {"Function": {"Name": "neg", "Arguments": {}}}]
TOOLS = [{"Type": "function", "Function": {"description": "add", "name": "add", "parameters": {"type": "object"}}}]
SYSTEM = {"Role": "system", "Content": "Be Ada."}
CHATS = [
    [{"Role": "user", "Content": "Hi"}],
    [{"Role": "system", "Content": ""}, {"Role": "user", "Content": "Hi {{ there }}"}],
    [
        SYSTEM,
        {"Role": "user", "Content": "  1+1?\n"},
        {"Role": "assistant", "Content": "2"},
        {"Role": "user", "Content": "And?"},
    ],
    [
        {"Role": "user", "Content": "1+1?"},
        {"Role": "assistant", "Content": "2", "Thinking": "one\nand one"},
        {"Role": "system", "Content": "Be short."},
        {"Role": "user", "Content": "And?"},
    ],
    [
        SYSTEM,
        {"Role": "user", "Content": "add"},
        {"Role": "assistant", "Content": "", "ToolCalls": CALLS},
        {"Role": "tool", "Content": "3"},
        {"Role": "tool", "Content": "4"},
        {"Role": "assistant", "Content": "Both:", "Thinking": "hm", "ToolCalls": CALLS[:1]},
        {"Role": "tool", "Content": "5"},
    ],
]


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Go's own text/template: render(template, cases) -> texts. GROUNDUP_GO may name the go program."""
    go = os.environ.get("GROUNDUP_GO") or shutil.which("go")
    if not go:
        pytest.skip("no Go here to render Ollama's templates")
    program = tmp_path_factory.mktemp("go") / "render"
    source = Path(__file__).with_name("render_go.go")
    environment = {**os.environ, "GOCACHE": str(program.parent / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
    subprocess.run([go, "build", "-o", str(program), str(source)], check=True, env=environment, timeout=120)

    def run(template: str, cases: list[dict[str, Any]]) -> list[str]:
        given = json.dumps({"Template": template, "Cases": cases})
        done = subprocess.run([str(program)], input=given, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return run


def jinja_chat(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ollama's spelling of a chat in OpenAI's."""
    messages = []
    for message in chat:
        called = [call["Function"] for call in message.get("ToolCalls", [])]
        calls = [{"name": call["Name"], "arguments": call["Arguments"]} for call in called]
        told = {"role": message["Role"], "content": message["Content"], "tool_calls": calls or None}
        messages.append({**told, "reasoning_content": message.get("Thinking")})
    return messages


def without_spaces_in_json(text: str) -> str:
    """Ollama writes compact JSON; the words of tools and arguments are what is compared."""
    lines = text.split("\n")
    return "\n".join(re.sub(r'([,:]) (?=["\d{])', r"\1", line) if line.startswith('{"') else line for line in lines)


def test_our_template_in_go_says_what_jinja_says(tokenizer: Tokenizer, render: Any) -> None:
    template, notes = go_template(tokenizer)
    assert template == OURS and len(notes) == 1
    options = [({}, {}), ({"IsThinkSet": True, "Think": True}, {}), ({"IsThinkSet": True}, {"enable_thinking": False})]
    cases, wanted = [], []
    for chat, tools, (go, ours) in product(CHATS, (None, TOOLS), options):
        cases.append({"Messages": chat, "Tools": tools, **go})
        given = [{"type": "function", "function": tool["Function"]} for tool in tools or []]
        wanted.append(tokenizer.render(jinja_chat(chat), tools=given or None, add_generation_prompt=True, **ours).text)
    for case, found, expected in zip(cases, render(template, cases), wanted, strict=True):
        assert without_spaces_in_json(found) == without_spaces_in_json(expected), case


def test_an_answer_begun_is_continued(render: Any) -> None:
    chat = [{"Role": "user", "Content": "Hi"}, {"Role": "assistant", "Content": "Hel"}]
    assert render(OURS, [{"Messages": chat}])[0].endswith("<|im_start|>assistant\nHel")


def test_a_plain_template_is_found_by_rendering(tokenizer: Tokenizer, render: Any) -> None:
    other = Tokenizer(tokenizer.backend, tokenizer.config, SMOLLM2)
    template, notes = go_template(other)
    assert notes == []
    cases = [{"Messages": chat} for chat in CHATS[:3]]
    for chat, found in zip(CHATS, render(template, cases), strict=False):
        messages = [{"role": m["Role"], "content": m["Content"]} for m in chat]
        assert found == other.render(messages, add_generation_prompt=True).text


def test_what_a_plain_template_loses_is_said(tokenizer: Tokenizer) -> None:
    with_tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + SMOLLM2
    _, notes = go_template(Tokenizer(tokenizer.backend, tokenizer.config, with_tools))
    assert notes == ["the template's tools are not carried over to Ollama"]


@pytest.mark.parametrize("template, said", [("", "no chat template"), (FORGETS, "Ollama's language can say")])
def test_a_template_that_go_cannot_say(tokenizer: Tokenizer, template: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        go_template(Tokenizer(tokenizer.backend, tokenizer.config, template))


def test_ollama_finds_the_tags_where_it_looks_for_them() -> None:
    """Its heuristics (thinking/template.go, tools/template.go): first and last text around .Thinking; the first text
    inside the first `if` over .ToolCalls."""
    inside = OURS.split("{{ if .Thinking -}}")[1].split("{{ else if $off -}}")[0]
    assert inside.strip().split("{{ .Thinking }}") == ["<think>\n", "\n</think>"]
    assert OURS.count(".Thinking") == 2
    called = OURS.split("if .ToolCalls }}")
    assert len(called) == 2 and called[1].startswith("{{ range $j, $_ := .ToolCalls }}<tool_call>\n{")


def test_the_folder(model_dir: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = export(model_dir, "ollama", "q8_0", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "README.md", "model.gguf"]
    text = (tmp_path / "out" / "Modelfile").read_text()
    lines = text.split("\n")
    assert lines[0] == "FROM ./model.gguf" and text.count('"""') == 2
    assert "SYSTEM" not in [line.split(" ")[0] for line in lines]
    assert 'PARAMETER stop "<|im_end|>"' in lines and "PARAMETER num_ctx 512" in lines
    assert "PARAMETER temperature 0" in lines, "greedy, as the model answers here"
    assert report["stops"] == ["<|im_end|>"] and report["check"]["kl"] < 0.05
    assert any("qwen3 engine" in note for note in report["notes"])
    assert "ollama create tiny-model -f Modelfile" in (tmp_path / "out" / "README.md").read_text()


def test_every_stop_and_the_folders_own_sampling(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    habits = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05, "eos_token_id": [2, 0]}
    (folder / "generation_config.json").write_text(json.dumps(habits))
    report = export(folder, "ollama", "f32", tmp_path / "out")
    lines = (tmp_path / "out" / "Modelfile").read_text().split("\n")
    assert report["stops"] == ["<|endoftext|>", "<|im_end|>"]
    for line in ('stop "<|endoftext|>"', 'stop "<|im_end|>"', "temperature 0.6", "top_p 0.95", "repeat_penalty 1.05"):
        assert f"PARAMETER {line}" in lines


@pytest.mark.parametrize("broken", ["{{ if .Messages }}", "{{ .Messages", "{{ end }}{{ if .Messages }}", "no messages"])
def test_the_check_of_a_modelfile_can_fail(tokenizer: Tokenizer, broken: str) -> None:
    stop = 'PARAMETER stop "<|im_end|>"\n'
    check_modelfile(f'TEMPLATE """{OURS}"""\n{stop}', tokenizer)
    with pytest.raises(UserError, match="does not close"):
        check_modelfile(f'TEMPLATE """{broken}"""\n{stop}', tokenizer)
    with pytest.raises(UserError, match="every stop"):
        check_modelfile(f'TEMPLATE """{OURS}"""\n', tokenizer)
