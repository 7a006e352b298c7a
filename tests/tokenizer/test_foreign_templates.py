"""Templates as downloaded folders have them: trained where they keep what was said, refused with a diff where not.

The templates are written anew here, in the shape of the families that they are named after.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from groundup.data.encode import encode_rows
from groundup.data.inspect import inspect_file
from groundup.data.rows import Chat
from groundup.errors import UserError
from groundup.tokenizer import Rendered, Tokenizer, load_tokenizer
from groundup.tokenizer.check import check_template

TOKENS = [
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>", "</s>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|end|>",
    "<|user|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>", "<think>", "</think>",
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "[TOOLS]", "[/TOOLS]",
]  # fmt: skip

QWEN3 = """
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for m in messages[::-1] %}
  {%- if m.role == 'user' and not ns.found %}
    {%- set ns.found = true %}{%- set ns.last = messages|length - 1 - loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set why = m.reasoning_content if m.reasoning_content is string else '' %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last and (loop.last or why) %}
      {{- '<think>\\n' + why.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m.content.lstrip('\\n') }}
    {%- for c in m.tool_calls or [] %}{{- '\\n<tool_call>' + (c.function | tojson) + '</tool_call>' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif m.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>' + m.content + '</tool_response><|im_end|>\\n' }}
  {%- else %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
# As the thinking-only models have it: every prompt opens the reasoning, and earlier answers are shown without it.
_PROMPT = QWEN3.index("  {{- '<|im_start|>assistant\\n' }}\n  {%- if enable_thinking")
QWEN3_THINKING = QWEN3[:_PROMPT] + "{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
LLAMA3 = """
{{- bos_token }}
{%- set date = strftime_now('%d %b %Y %H:%M:%S.%f') %}
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content | trim %}{%- set rest = messages[1:] %}
{%- else %}
  {%- set system = '' %}{%- set rest = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date + '\\n\\n' }}
{%- for t in tools or [] %}{{- (t | tojson) + '\\n\\n' }}{%- endfor %}
{{- system + '<|eot_id|>' }}
{%- for m in rest %}
  {%- if m.tool_calls %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
    {{- '{"name": "' + m.tool_calls[0].function.name + '"}<|eot_id|>' }}
  {%- elif m.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
MISTRAL = """
{{- bos_token }}
{%- for m in messages %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
  {%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}
  {%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}"""
# As its later versions: the system message and the tools stand before the last question, wherever that is.
MISTRAL_TOOLS = """
{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set rest = messages[1:] if system else messages %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{%- for m in rest %}
  {%- if m.role == 'user' %}
    {%- if m == users[-1] and tools %}{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{%- endif %}
    {{- '[INST] ' + (system + '\\n\\n' if m == users[-1] and system else '') + m.content + '[/INST]' }}
  {%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}
{%- endfor %}"""
GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
  {{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
PHI3 = """
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
DEEPSEEK = """
{{- bos_token }}
{%- for m in messages %}
  {%- if m.role == 'system' %}{{- m.content }}
  {%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}
  {%- else %}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{%- endif %}"""
DEEPSEEK_R1 = DEEPSEEK.replace("<｜Assistant｜>' }}{%- endif %}", "<｜Assistant｜><think>\\n' }}{%- endif %}")
SMOLLM2 = """
{%- for m in messages %}
  {%- if loop.first and m.role != 'system' %}{{- '<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}{%- endif %}
  {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
GLM = """
{{- '[gMASK]<sop>' }}
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""
ZEPHYR = """{% for m in messages %}
{{- '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
{%- endfor %}"""
LLAMA2 = """
{%- for m in messages %}
  {%- if m.role == 'user' %}{{- bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}
  {%- elif m.role == 'assistant' %}{{- ' ' + m.content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""
# The only end is that of the whole chat: what follows an answer is the next question.
ENDS_ONCE = """
{%- for m in messages %}{{- m.role + ': ' + m.content + ' ' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- else %}{{- eos_token }}{%- endif %}"""

TWO = [
    {"role": "user", "content": "one <|im_end|>"},
    {"role": "assistant", "content": "first <b>"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]
SYSTEM = [{"role": "system", "content": "the rules"}, *TWO]
THOUGHTS = [{**m, "reasoning_content": f"why {m['content']}"} if m["role"] == "assistant" else m for m in TWO]
CALL = {"name": "add", "arguments": {"a": 1}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [
    {"role": "user", "content": "sum?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"result": "3"}'},
    {"role": "assistant", "content": "three"},
]
Make = Callable[..., Tokenizer]


@pytest.fixture(scope="module")
def make(tokenizer: Tokenizer) -> Make:
    """A tokenizer that knows all these families' tokens, with one of their templates."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])

    def build(template: str, eos: str, bos: str = "<s>", more: tuple[str, ...] = ()) -> Tokenizer:
        config = {**tokenizer.config, "eos_token": eos, "bos_token": bos, "pad_token": "<|endoftext|>"}
        return Tokenizer(backend, config, template, tuple(backend.token_to_id(token) for token in more))

    return build


def said(tokenizer: Tokenizer, rendered: Rendered) -> list[str]:
    """The runs of trained tokens, decoded."""
    runs: list[list[int]] = []
    for before, number, bit in zip([0, *rendered.mask[:-1]], rendered.ids, rendered.mask, strict=True):
        if bit:
            runs += [] if before else [[]]
            runs[-1].append(number)
    return [tokenizer.decode(run) for run in runs]


FAMILIES: list[Any] = [
    pytest.param(QWEN3, "<|im_end|>", TWO,
                 ["first <b><|im_end|>", "<think>\n\n</think>\n\nsecond<|im_end|>"], id="qwen3"),
    pytest.param(LLAMA3, "<|eot_id|>", SYSTEM, ["first <b><|eot_id|>", "second<|eot_id|>"], id="llama3"),
    pytest.param(MISTRAL, "</s>", TWO, [" first <b></s>", " second</s>"], id="mistral"),
    pytest.param(MISTRAL_TOOLS, "</s>", TWO, [" first <b></s>", " second</s>"], id="mistral-tools"),
    pytest.param(GEMMA, "<eos>", TWO, ["first <b><end_of_turn>", "second<end_of_turn>"], id="gemma"),
    pytest.param(PHI3, "<|endoftext|>", TWO, ["first <b><|end|>", "second<|end|>"], id="phi3"),
    pytest.param(DEEPSEEK, "<｜end▁of▁sentence｜>", SYSTEM,
                 ["first <b><｜end▁of▁sentence｜>", "second<｜end▁of▁sentence｜>"], id="deepseek"),
    pytest.param(SMOLLM2, "<|im_end|>", TWO, ["first <b><|im_end|>", "second<|im_end|>"], id="smollm2"),
    pytest.param(ZEPHYR, "</s>", SYSTEM, ["first <b></s>", "second</s>"], id="zephyr"),
    pytest.param(LLAMA2, "</s>", TWO, [" first <b> </s>", " second </s>"], id="llama2"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "eos", "messages", "answers"), FAMILIES)
def test_each_family_trains_its_answers_and_their_ends(
    make: Make, template: str, eos: str, messages: Any, answers: list[str]
) -> None:
    tokenizer = make(template, eos)
    rendered = tokenizer.render(messages)
    assert said(tokenizer, rendered) == answers and not rendered.context
    for i, message in enumerate(messages):  # what is trained follows what is asked for, id for id
        if message["role"] == "assistant" and "strftime_now" not in template:
            prompt = tokenizer.render(messages[:i], add_generation_prompt=True).ids
            assert rendered.ids[: len(prompt)] == prompt
            assert rendered.mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


@pytest.mark.parametrize(("template", "eos", "messages", "answers"), FAMILIES)
def test_ids_are_those_of_transformers(
    make: Make, template: str, eos: str, messages: Any, answers: list[str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    plain = [{**m, "content": m["content"].replace(" <|im_end|>", "")} for m in messages]  # a token, for transformers
    template = template.replace(" %H:%M:%S.%f", "")
    make(template, eos).save(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(plain, return_dict=True)["input_ids"]
    ours = load_tokenizer(tmp_path).render(plain)
    cut = "[/INST]" in template  # no token stands where the answer begins, so our cut there may part what it would join
    assert ours.ids == stock or (cut and load_tokenizer(tmp_path).decode(ours.ids) == ours.text)


def test_qwen3_takes_reasoning_out_of_earlier_answers_which_are_then_context_alone(make: Make) -> None:
    tokenizer = make(QWEN3, "<|im_end|>")
    rendered = tokenizer.render(THOUGHTS)
    assert said(tokenizer, rendered) == ["<think>\nwhy second\n</think>\n\nsecond<|im_end|>"]
    (fault,) = rendered.context
    assert "message 2" in fault.why and "-<think>\\n" in fault.detail and "+first <b><|im_end|>\\n" in fault.detail
    chain = [CALLS[0], {**CALLS[1], "reasoning_content": "add"}, CALLS[2], {**CALLS[3], "reasoning_content": "done"}]
    assert len(said(tokenizer, tokenizer.render(chain))) == 2  # one question: nothing is taken out


def test_a_prompt_that_opens_the_reasoning(make: Make) -> None:
    """Answers shown without it are what no prompt leads to: earlier ones are context, a last one is refused."""
    tokenizer = make(QWEN3_THINKING, "<|im_end|>")
    assert tokenizer.render(TWO[:1], add_generation_prompt=True).text.endswith("assistant\n<think>\n")
    rendered = tokenizer.render(TWO)
    assert said(tokenizer, rendered) == ["\n</think>\n\nsecond<|im_end|>"] and len(rendered.context) == 1
    with pytest.raises(UserError, match=r"before message 2 differently.*begin every answer with '<think>\\n'") as error:
        make(DEEPSEEK_R1, "<｜end▁of▁sentence｜>").render(TWO[:2])
    assert "-<s><｜User｜>one <|im_end|><｜Assistant｜><think>\\n" in error.value.detail


def test_an_end_of_the_whole_chat_is_none_of_its_first_answer(make: Make) -> None:
    tokenizer = make(ENDS_ONCE, "</s>")
    rendered = tokenizer.render(TWO)
    assert said(tokenizer, rendered) == ["second </s>"]
    assert "shows message 2 otherwise once another follows it" in rendered.context[0].why


def test_a_chat_that_the_assistant_begins(make: Make) -> None:
    """This template knows no prompt before any message, so a greeting is context."""
    tokenizer = make(LLAMA3, "<|eot_id|>")
    rendered = tokenizer.render([TWO[1], *TWO[2:]])
    assert said(tokenizer, rendered) == ["second<|eot_id|>"] and len(rendered.context) == 1


def test_mistral_moves_the_system_message_and_the_tools(make: Make) -> None:
    tokenizer = make(MISTRAL_TOOLS, "</s>")
    for messages, tools in ((SYSTEM, None), (TWO, TOOLS)):
        rendered = tokenizer.render(messages, tools)
        assert said(tokenizer, rendered) == [" second</s>"] and len(rendered.context) == 1
        assert "the prompt of message" in rendered.context[0].detail
    assert said(tokenizer, tokenizer.render(SYSTEM[:3])) == [" first <b></s>"]


@pytest.mark.parametrize(
    ("template", "eos", "messages", "tools", "why", "line"),
    [
        (GLM, "<|endoftext|>", TWO, None, "no end-of-turn token after message 2", "-first <b><|endoftext|>"),
        (SMOLLM2, "<|im_end|>", THOUGHTS[:2], None, "leaves out the reasoning_content of message 2", "-why first <b>"),
        (SMOLLM2, "<|im_end|>", CALLS, None, "leaves out the tool_calls of message 2", "-add"),
        (SMOLLM2, "<|im_end|>", TWO, TOOLS, "leaves out the tool add", ""),
        (LLAMA2, "</s>", SYSTEM, None, "leaves out the content of message 1", "-the rules"),
        (LLAMA3, "<|eot_id|>", [CALLS[0], {**CALLS[1], "content": "wait"}], TOOLS, "content of message 2", "-wait"),
        (GEMMA, "<eos>", SYSTEM, None, "System role not supported", ""),
    ],
    ids=["glm", "no-reasoning", "no-calls", "no-tools", "no-system", "no-words", "refuses"],
)  # fmt: skip
def test_what_would_be_trained_wrongly_is_refused_with_a_diff(
    make: Make, template: str, eos: str, messages: Any, tools: Any, why: str, line: str
) -> None:
    tokenizer = make(template, eos)
    with pytest.raises(UserError, match=why) as error:
        tokenizer.render(messages, tools)
    assert line in error.value.detail and "\U000f0000" not in error.value.detail and "\n" not in str(error.value)
    prompt = messages[: 1 + (messages[0]["role"] == "system")]
    if template != GEMMA:  # it can be talked to all the same
        assert tokenizer.render([*messages, prompt[-1]], tools, add_generation_prompt=True).ids


def test_tool_results_may_be_escaped(make: Make) -> None:
    tokenizer = make(LLAMA3, "<|eot_id|>")
    assert said(tokenizer, tokenizer.render(CALLS, TOOLS)) == ['{"name": "add"}<|eot_id|>', "three<|eot_id|>"]


def test_the_clock_stands_still_while_a_chat_is_rendered(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make(LLAMA3, "<|eot_id|>")  # its date has microseconds here
    for _ in range(20):
        assert not tokenizer.render(TWO).context
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert tokenizer.render(TWO).text == tokenizer.render(TWO).text
    assert "02 Jan 1970" in tokenizer.render(TWO).text


MARKED = SMOLLM2.replace(
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
    "{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}"
    "{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}",
)


def test_marks_must_hold_the_end_and_the_words(make: Make) -> None:
    tokenizer = make(MARKED, "<|im_end|>")
    assert tokenizer.keeps_past
    assert said(tokenizer, tokenizer.render(TWO)) == ["first <b><|im_end|>", "second<|im_end|>"]
    early = MARKED.replace(" + '<|im_end|>' }}{% endgeneration %}{{- '", " }}{% endgeneration %}{{- '<|im_end|>")
    with pytest.raises(UserError, match="trains no end-of-turn token after answer 1") as error:
        make(early, "<|im_end|>").render(TWO)
    assert "-first <b><|im_end|>" in error.value.detail and "+first <b>" in error.value.detail
    with pytest.raises(UserError, match="leaves out the reasoning_content of message 2"):
        tokenizer.render(THOUGHTS)


def test_marks_on_a_template_that_rewrites_its_past(make: Make) -> None:
    marked = QWEN3.replace("{%- if loop.index0 >", "{% generation %}{%- if loop.index0 >")
    marked = marked.replace(
        "<|im_end|>\\n' }}\n  {%- elif m.role", "<|im_end|>\\n' }}{% endgeneration %}\n  {%- elif m.role"
    )
    tokenizer = make(marked, "<|im_end|>")
    assert not tokenizer.keeps_past and marked.count("generation %}") == 2
    rendered = tokenizer.render(THOUGHTS)
    assert said(tokenizer, rendered) == ["<think>\nwhy second\n</think>\n\nsecond<|im_end|>\n"]
    assert len(rendered.context) == 1 and len(said(tokenizer, tokenizer.render(TWO))) == 2


def test_what_a_template_can_teach(make: Make) -> None:
    report = check_template(make(QWEN3, "<|im_end|>"))
    assert report.chats["several questions"] == report.chats["tool calls"][:7] == "trained"
    assert report.chats["reasoning, several questions"] == "only the last answer is trained"
    assert "-<think>" in report.diffs["reasoning, several questions"]
    how = "answers are found by rendering parts of the chat, each ends in <|im_end|>"
    assert report.lines()[0] == f"chat template: {how}"
    gemma = check_template(make(GEMMA, "<eos>"))
    assert gemma.ends == ["<end_of_turn>", "<eos>"] and "System role" in gemma.chats["a system message"]
    assert gemma.chats["reasoning"].startswith("not trained: the template leaves out the reasoning_content")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in (TWO[:2], THOUGHTS, TWO)), encoding="utf-8")
    return file


def test_inspect_shows_the_problem_before_training(make: Make, rows: Path, tmp_path: Path, groundup: Any) -> None:
    report = inspect_file(rows, make(QWEN3, "<|im_end|>"))
    assert (report.rows, report.bad_rows, report.context_answers) == (3, 0, 1)
    assert report.notes[0].startswith(f"{rows}:2: an answer is context alone") and "\n-<think>" in report.notes[0]
    make(GLM, "<|endoftext|>").save(tmp_path / "glm")
    shown = groundup("data", "inspect", rows, "--tokenizer", tmp_path / "glm")
    assert shown.code == 0 and "3 bad" in shown.out.replace("\n", " ")
    for line in ("-first <b><|endoftext|>", "+first <b>", "answers are found by rendering", "  a question: not"):
        assert line in shown.out


def test_training_counts_what_is_context_and_stops_at_what_is_wrong(
    make: Make, rows: Path, tmp_path: Path, groundup: Any, caplog: pytest.LogCaptureFixture
) -> None:
    part = encode_rows([(1, Chat(THOUGHTS)), (2, Chat(TWO))], make(QWEN3, "<|im_end|>"), "chat")
    assert (part.context, part.bad.count, len(part.lengths)) == (1, 0, 2)
    make(GLM, "<|endoftext|>").save(tmp_path / "glm")
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(f"stage: sft\nmodel: tiny\ntokenizer: {tmp_path / 'glm'}\ndata: {rows}\noutput: {tmp_path}/run\n")
    failed = groundup("train", recipe, "train.steps=1", "train.seq_len=64", f"cache={tmp_path / 'cache'}")
    assert failed.code == 2
    first, *diff = [line for line in failed.err.splitlines() if line.startswith(("error: ", "-", "+"))]
    assert first.startswith(f"error: {rows}:1: the template writes no end-of-turn token after message 2")
    assert "-first <b><|endoftext|>" in diff and "+first <b>" in diff
