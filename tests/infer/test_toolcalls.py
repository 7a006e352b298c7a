"""Tool calls: found in streamed text however it is cut, and forced by a grammar."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend

from groundup.errors import UserError
from groundup.infer.grammar import Grammar, GrammarCompiler
from groundup.infer.params import SamplingParams
from groundup.infer.sampler import SamplingState, sample
from groundup.infer.toolcalls import (
    CallArguments,
    CallEnd,
    CallStart,
    Event,
    TextPiece,
    ToolCall,
    ToolCallSplitter,
    parse_tool_calls,
    tool_grammar,
)
from groundup.tokenizer import Tokenizer

WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京", "days": [1, 2]}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
TRICKY = '{"text": "a } \\" { </tool_call> \\\\", "x": {"y": [{}]}}'


def split(*pieces: str) -> list[Event]:
    """All events, neighbouring pieces joined."""
    splitter, out = ToolCallSplitter(), []
    events = [event for piece in pieces for event in splitter.feed(piece)] + splitter.flush()
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, TextPiece) and isinstance(last, TextPiece):
            out[-1] = TextPiece(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            out[-1] = CallArguments(event.index, last.text + event.text)
        else:
            out.append(event)
    return out


CASES: dict[str, tuple[str, str, list[ToolCall]]] = {
    "text": ("No tool < here >, <tool_cal or {}.\n", "No tool < here >, <tool_cal or {}.\n", []),
    "one": (WEATHER, "", [ToolCall("get_weather", '{"city": "北京", "days": [1, 2]}')]),
    "text before": ("Let me see.\n\n" + TIME, "Let me see.", [ToolCall("time", "{}")]),
    "two": (f"{TIME}\n{WEATHER}\n", "",
            [ToolCall("time", "{}"), ToolCall("get_weather", '{"city": "北京", "days": [1, 2]}')]),
    "text between and after": (f"A\n{TIME}\nB\n{TIME}\nC", "ABC", [ToolCall("time", "{}")] * 2),
    "marks and brackets in strings": (
        f'<tool_call>{{"name":"f","arguments":{TRICKY}}}</tool_call>', "", [ToolCall("f", TRICKY)]),
    "no closing mark": ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [ToolCall("f", '{"a": 1}')]),
    "no closing mark, then text": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}}\n\nDone.', "Done.", [ToolCall("f", '{"a": 1}')]),
    "no closing mark, then a call": (
        f'<tool_call>{{"name": "f", "arguments": {{}}}}\n{TIME}', "", [ToolCall("f", "{}"), ToolCall("time", "{}")]),
    "closing mark cut short": ('<tool_call>{"name": "f", "arguments": {}}\n</tool', "", [ToolCall("f", "{}")]),
    "keys in another order": (
        '<tool_call>{"arguments": {"a": "é"}, "name": "f"}</tool_call>', "", [ToolCall("f", '{"a": "é"}')]),
    "more keys": ('<tool_call>{"name": "f", "arguments": {"a": 1}, "id": "7}"}\n</tool_call>!', "!",
                  [ToolCall("f", '{"a": 1}')]),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', "", [ToolCall("f", "{}")]),
    "arguments in a string": (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [ToolCall("f", '{"a": 1}')]),
    "escapes in the name": (
        '<tool_call>{"name": "f\\u4e2d", "arguments": {}}</tool_call>', "", [ToolCall("f中", "{}")]),
}  # fmt: skip

BROKEN = {
    "the mark in a sentence": "Write <tool_call> to call.",
    "no JSON": "Well:\n<tool_call>\nget_weather(北京)\n</tool_call>\nSo.",
    "no name": '<tool_call>\n{"arguments": {}}\n</tool_call>',
    "name of a wrong type": '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>',
    "arguments of a wrong type": '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
    "cut in the head": 'Yes.\n<tool_call>\n{"name": "f", "arg',
    "cut in the arguments": '<tool_call>\n{"name": "f", "arguments": {"a": [1, ',
    "comma": 'A <tool_call>\n{"name": "f", "arguments": {"a": 1,, "b"}}\n</tool_call> B',
    "open quote": '<tool_call>\n{"name": "f", "arguments": {"a": "b}}\n</tool_call>',
    "open bracket": '<tool_call>\n{"name": "f", "arguments": {"a": [1}\n</tool_call>',
    "empty": "<tool_call></tool_call>",
    "mark alone": "<tool_call>",
}


@pytest.mark.parametrize("name", CASES)
def test_whole_answers(name: str) -> None:
    text, content, calls = CASES[name]
    assert parse_tool_calls(text) == (content, calls)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_call_stays_text(name: str) -> None:
    assert parse_tool_calls(BROKEN[name]) == (BROKEN[name], [])


@pytest.mark.parametrize("text", [case[0] for case in CASES.values()] + list(BROKEN.values()))
def test_the_events_do_not_depend_on_the_cuts(text: str) -> None:
    whole = split(text)
    assert split(*text) == whole
    for at in range(len(text)):
        assert split(text[:at], text[at:]) == whole


def test_random_mixtures_in_random_cuts() -> None:
    generator = random.Random(0)
    parts = [text for text, _, _ in CASES.values()] + list(BROKEN.values()) + ["\n", "text ", "<", "}"]
    for _ in range(200):
        text = "".join(generator.choices(parts, k=4))
        cuts = sorted(generator.choices(range(len(text) + 1), k=6))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        events = split(*pieces)
        assert events == split(text)
        assert_in_order(events)


def assert_in_order(events: list[Event]) -> None:
    """Start, arguments, end of one call after the other, numbered from 0; text outside of them."""
    index, inside = -1, False
    for event in events:
        if isinstance(event, CallStart):
            assert not inside
            index, inside = index + 1, True
        else:
            assert inside is not isinstance(event, TextPiece)
            inside = inside and not isinstance(event, CallEnd)
        assert isinstance(event, TextPiece) or event.index == index
    assert not inside


def test_a_call_is_announced_early_and_its_arguments_come_as_they_are_written() -> None:
    splitter = ToolCallSplitter()
    assert splitter.feed('<tool_call>\n{"name": "f", "argu') == []
    assert splitter.feed('ments": {"a') == [CallStart(0, "f"), CallArguments(0, '{"a')]
    assert splitter.feed('": 1') == [CallArguments(0, '": 1')]
    assert splitter.feed("}}\n</tool") == [CallArguments(0, "}")]
    assert splitter.feed("_call>") == [CallEnd(0)]
    assert splitter.feed("\n<tool_call>") == []
    assert splitter.flush() == [TextPiece("<tool_call>")]


def test_text_is_not_held_back() -> None:
    splitter = ToolCallSplitter()
    assert splitter.feed("a < b") == [TextPiece("a < b")]
    assert splitter.feed("\n") == []  # perhaps the one before a mark
    assert splitter.feed("c <tool") == [TextPiece("\nc ")]
    assert splitter.feed("s> d") == [TextPiece("<tools> d")]
    assert splitter.feed("<tool_call> is") == [TextPiece("<tool_call>"), TextPiece(" is")]


def test_arguments_that_break_late_are_told_with_the_end() -> None:
    block = BROKEN["comma"][2:-2]
    assert split(BROKEN["comma"]) == [
        TextPiece("A "),
        CallStart(0, "f"),
        CallArguments(0, '{"a": 1,, "b"}'),
        CallEnd(0, malformed=block),
        TextPiece(" B"),
    ]


def test_what_the_chat_template_writes_is_found(tokenizer: Tokenizer) -> None:
    calls = [{"name": "get_weather", "arguments": {"city": '北京 </tool_call> "q"\n'}}, {"name": "t", "arguments": {}}]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Moment.", "tool_calls": calls}]
    rendered = tokenizer.render(messages)
    said = tokenizer.decode([token for token, mine in zip(rendered.ids, rendered.mask, strict=True) if mine])
    content, found = parse_tool_calls(said.removesuffix("<|im_end|>"))
    assert content == "Moment."
    assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in found] == calls


def tool(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "<tool_call>", "parameters": parameters}}


def required(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TOOLS = [
    tool(
        "get_weather", required(city={"enum": ["北京", "Rome"]}, days={"type": "integer", "minimum": 1, "maximum": 9})
    ),
    tool("now", None),
    tool('odd "名"', {**required(a={"$ref": "#/$defs/leaf"}), "$defs": {"leaf": {"enum": ["x", "y"]}}}),
]


def fits(call: ToolCall) -> bool:
    arguments = json.loads(call.arguments)
    if call.name == "get_weather":
        return arguments["city"] in ("北京", "Rome") and 1 <= arguments["days"] <= 9 and len(arguments) == 2
    return arguments == {} if call.name == "now" else call.name == 'odd "名"' and arguments["a"] in ("x", "y")


def random_answer(tokenizer: Tokenizer, grammar: Grammar | None, seed: int) -> str:
    vocab = tokenizer.vocab_size + 5
    ends = dict.fromkeys(tokenizer.stop_ids, 1.0)
    params = SamplingParams(temperature=1.0, seed=seed, grammar=grammar, logit_bias=ends)
    state = SamplingState(params, [], vocab, GrammarCompiler(tokenizer))
    generator, ids = torch.Generator().manual_seed(seed), []
    while not state.grammar_done:
        (token,), _ = sample(torch.randn(1, vocab, generator=generator), [state])
        state.accept(token)
        ids.append(token)
        assert len(ids) < 1000, tokenizer.decode(ids)
    return tokenizer.decode([token for token in ids if token not in tokenizer.stop_ids])


@pytest.fixture(scope="module")
def foreign(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer to which the marks are plain text."""
    text = tokenizer.backend.to_str().replace('"<tool_call>"', '"<|a|>"').replace('"</tool_call>"', '"<|b|>"')
    return Tokenizer(Backend.from_str(text), tokenizer.config, tokenizer.chat_template)


def test_required_calls_of_random_weights(tokenizer: Tokenizer, foreign: Tokenizer) -> None:
    assert tokenizer.backend.token_to_id("<tool_call>") is not None
    assert foreign.backend.token_to_id("<tool_call>") is None
    for own in (tokenizer, foreign):
        answers = [random_answer(own, tool_grammar(TOOLS, "required"), seed) for seed in range(12)]
        parsed = [parse_tool_calls(answer) for answer in answers]
        assert all(content == "" and calls and all(map(fits, calls)) for content, calls in parsed), answers
        assert all(
            len(answer.split("\n")) == 3 * len(calls) for answer, (_, calls) in zip(answers, parsed, strict=True)
        )
        assert {call.name for _, calls in parsed for call in calls} == {"get_weather", "now", 'odd "名"'}
        assert max(len(calls) for _, calls in parsed) > 1
        assert all(
            "\n".join(calls_as_written(calls)) == answer for answer, (_, calls) in zip(answers, parsed, strict=True)
        )


def calls_as_written(calls: list[ToolCall]) -> list[str]:
    names = [json.dumps(call.name, ensure_ascii=False) for call in calls]
    bodies = [f'{{"name": {name}, "arguments": {call.arguments}}}' for name, call in zip(names, calls, strict=True)]
    return [f"<tool_call>\n{body}\n</tool_call>" for body in bodies]


def test_named_and_single_calls(tokenizer: Tokenizer) -> None:
    named = {"type": "function", "function": {"name": "now"}}
    for choice in (named, {"type": "function", "name": "now"}):
        assert random_answer(tokenizer, tool_grammar(TOOLS, choice), 0) == TIME.replace("time", "now")
    for seed in range(5):
        calls = parse_tool_calls(random_answer(tokenizer, tool_grammar(TOOLS, "required", parallel=False), seed))[1]
        assert len(calls) == 1


def test_the_grammar_allows_what_the_template_writes(tokenizer: Tokenizer) -> None:
    calls = [{"name": "get_weather", "arguments": {"city": "北京", "days": 3}}, {"name": "now", "arguments": {}}]
    rendered = tokenizer.render([{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls}])
    matcher = GrammarCompiler(tokenizer).start(tool_grammar(TOOLS, "required"))  # type: ignore[arg-type]
    said = [token for token, mine in zip(rendered.ids, rendered.mask, strict=True) if mine]
    for token in said:
        assert matcher.allowed()[token], tokenizer.decode([token])
        matcher.accept(token)
    assert matcher.done


def test_a_thought_may_come_before_a_forced_call(tokenizer: Tokenizer) -> None:
    grammar = tool_grammar(TOOLS, "required", thinking=True)
    matcher = GrammarCompiler(tokenizer).start(grammar)  # type: ignore[arg-type]
    for token in tokenizer.backend.encode("Hm.\n</think>\n\n<tool_call>\n").ids + tokenizer.encode('{"name": "now"'):
        assert matcher.allowed()[token]
        matcher.accept(token)


def test_a_free_choice_has_no_grammar() -> None:
    assert [tool_grammar(TOOLS, choice) for choice in ("auto", "none", None)] == [None] * 3


@pytest.mark.parametrize(
    ("tools", "choice", "where"),
    [
        (TOOLS, "sometimes", "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "missing"}}, "tool_choice"),
        (TOOLS, {"function": "now"}, "tool_choice"),
        ([], "required", "tool_choice"),
        ([{"type": "function", "function": {}}], "required", r"tools\[0\]"),
        ([{"type": "function", "function": "now"}], "required", r"tools\[0\]"),
        ([TOOLS[0], tool("f", {"type": "array"})], "required", r"tools\[1\].function.parameters"),
        ([tool("f", [1])], "required", r"tools\[0\].function.parameters"),  # type: ignore[arg-type]
        ([tool("f", required(a={"type": "nonsense"}))], "required", "tools"),
        ([tool("f", required(a={"$ref": "#/$defs/missing"}))], "required", "tools"),
    ],
)
def test_bad_tools_and_choices(tokenizer: Tokenizer, tools: list[dict[str, Any]], choice: Any, where: str) -> None:
    with pytest.raises(UserError, match=f"^{where}: "):
        GrammarCompiler(tokenizer).start(tool_grammar(tools, choice))  # type: ignore[arg-type]
