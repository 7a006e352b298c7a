"""Answers that must keep to a grammar: whatever the weights say, the text parses and fits its schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend

from groundup.errors import UserError
from groundup.infer.grammar import Grammar, GrammarCompiler
from groundup.infer.params import SamplingParams
from groundup.infer.sampler import SamplingState, sample
from groundup.tokenizer import Tokenizer

pytest.importorskip("llguidance")
PADDING = 13  # the model's vocabulary is wider than the tokenizer's


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


@pytest.fixture(scope="module")
def foreign(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer to which the marks of thinking and tool calls are plain text."""
    return without_marks(tokenizer)


def without_marks(tokenizer: Tokenizer) -> Tokenizer:
    text = tokenizer.backend.to_str()
    for mark in ("think", "/think", "tool_call", "/tool_call"):
        text = text.replace(f'"<{mark}>"', f'"<|no_{mark.replace("/", "end_")}|>"')
    return Tokenizer(Backend.from_str(text), tokenizer.config, tokenizer.chat_template)


def random_answer(tokenizer: Tokenizer, grammar: Grammar, seed: int, most: int = 3000) -> str:
    """What a model of random weights says under the grammar, the stop token left out.

    Closing characters are made likelier, so that strings and lists come to an end.
    """
    vocab = tokenizer.vocab_size + PADDING
    closing = {token: 4.0 for mark in '"}]' for token in tokenizer.encode(mark)} | dict.fromkeys(
        tokenizer.stop_ids, 4.0
    )
    params = SamplingParams(temperature=1.0, seed=seed, grammar=grammar, logit_bias=closing)
    state = SamplingState(params, [], vocab, GrammarCompiler(tokenizer))
    generator, ids = torch.Generator().manual_seed(seed), []
    while not state.grammar_done:
        (token,), _ = sample(torch.randn(1, vocab, generator=generator) * 2, [state])
        assert token < tokenizer.vocab_size
        state.accept(token)
        ids.append(token)
        assert len(ids) < most, tokenizer.decode(ids)
    return tokenizer.decode([token for token in ids if token not in tokenizer.stop_ids])


def valid(value: Any, schema: dict[str, Any]) -> None:
    try:
        import jsonschema
    except ImportError:  # then the checks by hand beside each schema stand alone
        return
    jsonschema.validate(value, schema)


OBJECT = {"type": "object", "additionalProperties": False}
CITY = {"enum": ["北京", "上海", 'a "quoted" city']}
SCHEMAS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "strings": (
        {**OBJECT, "properties": {"姓名": {"type": "string", "maxLength": 12}}, "required": ["姓名"]},
        lambda v: list(v) == ["姓名"] and len(v["姓名"]) <= 12,
    ),
    "enum": (
        {**OBJECT, "properties": {"city": CITY, "kind": {"const": "天气"}}, "required": ["city", "kind"]},
        lambda v: v["city"] in CITY["enum"] and v["kind"] == "天气",
    ),
    "nested arrays": (
        {"type": "array", "minItems": 2, "maxItems": 3, "items": {
            "type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "boolean"}}},
        lambda v: 2 <= len(v) <= 3 and all(1 <= len(row) <= 2 and {type(x) for x in row} == {bool} for row in v),
    ),
    "numbers": (
        {**OBJECT, "properties": {"n": {"type": "integer", "minimum": -5, "maximum": 120}, "x": {
            "type": "number", "exclusiveMinimum": 0, "maximum": 1}}, "required": ["n", "x"]},
        lambda v: isinstance(v["n"], int) and -5 <= v["n"] <= 120 and 0 < v["x"] <= 1,
    ),
    "anyOf": (
        {"anyOf": [{"type": "null"}, {**OBJECT, "properties": {"a": {"type": "boolean"}}, "required": ["a"]}, {
            "type": "integer", "minimum": 0, "maximum": 9}]},
        lambda v: v is None or v in range(10) or list(v) == ["a"],
    ),
    "optional": (
        {**OBJECT, "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"enum": [1, 2]}},
         "required": ["b"]},
        lambda v: "b" in v and set(v) <= {"a", "b", "c"},
    ),
    "references": (
        {**OBJECT, "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
         "required": ["left", "right"], "$defs": {"leaf": {"enum": ["x", "y"]}}},
        lambda v: {v["left"], v["right"]} <= {"x", "y"},
    ),
    "patterns": (
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        lambda v: re.fullmatch("[A-Z]{2}-[0-9]{3}", v) is not None,
    ),
    "dates": (
        {"type": "string", "format": "date"},
        lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v) is not None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_weights_keep_to_a_schema(name: str, tokenizer: Tokenizer) -> None:
    schema, fits = SCHEMAS[name]
    grammar, answers = Grammar("json_schema", json.dumps(schema)), set()
    for seed in range(4):
        text = random_answer(tokenizer, grammar, seed)
        value = json.loads(text)
        assert fits(value), text
        valid(value, schema)
        answers.add(text)
    assert len(answers) > 1  # it was not all forced


def test_random_weights_give_any_json_object(tokenizer: Tokenizer) -> None:
    assert all(
        isinstance(json.loads(random_answer(tokenizer, Grammar("json_object"), seed)), dict) for seed in range(6)
    )


def test_regex_and_lark(tokenizer: Tokenizer) -> None:
    for seed in range(5):
        assert re.fullmatch("(是|不)[0-9]{2,4}", random_answer(tokenizer, Grammar("regex", "(是|不)[0-9]{2,4}"), seed))
        lark = Grammar("lark", 'start: word ("+" word){1,3}\nword: "ab" | "c"')
        assert re.fullmatch(r"(ab|c)(\+(ab|c)){1,3}", random_answer(tokenizer, lark, seed))


def walk(compiler: GrammarCompiler, grammar: Grammar, ids: list[int]) -> torch.Tensor:
    """Accept ids, each of which must be allowed; what is allowed after them."""
    matcher = compiler.start(grammar)
    for token in ids:
        assert matcher.allowed()[token], token
        matcher.accept(token)
    return matcher.allowed()


def test_stop_tokens_are_allowed_at_the_end_only(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = Grammar("json_schema", '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}')
    ids = tokenizer.encode('{"n": 12}')
    for length in range(len(ids)):
        allowed = walk(compiler, grammar, ids[:length])
        assert not allowed[tokenizer.stop_ids].any()
        assert allowed.any()
    assert walk(compiler, grammar, ids).nonzero().squeeze(-1).tolist() == sorted(tokenizer.stop_ids)
    number = Grammar("json_schema", '{"type": "integer"}')
    allowed = walk(compiler, number, tokenizer.encode("12"))  # may end, and may go on
    assert allowed[tokenizer.stop_ids].all()
    assert allowed[tokenizer.encode("3")].all()


def test_every_stop_token_ends_the_grammar(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(Tokenizer(tokenizer.backend, tokenizer.config, tokenizer.chat_template, (0,)))
    for stop in (0, tokenizer.eos_id):
        matcher = compiler.start(Grammar("regex", "[0-9]+"))
        matcher.accept(tokenizer.encode("1")[0])
        assert not matcher.done
        assert matcher.allowed()[stop]
        matcher.accept(stop)
        assert matcher.done
    matcher = compiler.start(Grammar("regex", "[0-9]"))
    matcher.accept(tokenizer.encode("1")[0])
    assert matcher.done  # nothing can follow: no stop token needed


def test_control_tokens_are_no_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """Inside a string all characters are allowed, but no control token, though its spelling would be."""
    allowed = walk(compiler, Grammar("json_object"), tokenizer.encode('{"a'))
    assert not allowed[list(tokenizer.plain.control.values())].any()
    walk(compiler, Grammar("json_object"), tokenizer.encode('{"a": "<|im_end|> 小猫 \\" \U0001f600 </think>"}'))


def test_no_half_characters(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """A lone surrogate can be written as JSON, but not be sent on as UTF-8."""
    walk(compiler, Grammar("json_object"), tokenizer.encode(r'{"a": "\n \u0001"}'))
    with pytest.raises(AssertionError):
        walk(compiler, Grammar("json_object"), tokenizer.encode(r'{"a": "\ud800"}'))


def test_white_space_cannot_run_away(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """JSON in the usual layouts may be written; white space without end may not."""
    value = {"a": [1, {"b": None}], "c": "x"}
    for indent, separators in ((None, None), (None, (",", ":")), (2, None), (4, None), ("\t", None)):
        text = json.dumps(value, indent=indent, separators=separators)
        walk(compiler, Grammar("json_object"), tokenizer.encode(text))
    for space in ("  ", "\n\n", " \n", "\n" + " " * 33):
        with pytest.raises(AssertionError):
            walk(compiler, Grammar("json_object"), tokenizer.encode("{" + space + '"a": 1}'))


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", ""),
        Grammar("json_schema", "[1]"),
        Grammar("json_schema", '{"type": "nonsense"}'),
        Grammar("json_schema", '{"type": 5}'),
        Grammar("json_schema", '{"$ref": "https://example.com/schema"}'),
        Grammar("json_schema", '{"$ref": "#/$defs/missing"}'),
        Grammar("json_schema", '{"not": {"type": "string"}}'),
        Grammar("json_schema", '{"type": "string", "pattern": "("}'),
        Grammar("json_schema", '{"type": "string", "pattern": "(?=a)b"}'),
        Grammar("json_schema", '{"type": "string", "format": "no-such-format"}'),
        Grammar("json_schema", '{"enum": []}'),
        Grammar("json_schema", '{"a":' * 5000 + "1" + "}" * 5000),
        Grammar("regex", "("),
        Grammar("lark", "start: missing"),
        Grammar("lark", "start: <|no_such_token|> <|another|>"),
        Grammar("lark", ""),
    ],
)
def test_a_bad_grammar_is_the_users_error(compiler: GrammarCompiler, grammar: Grammar, capfd) -> None:
    with pytest.raises(UserError, match=f"^response_format: this {grammar.kind} cannot be used: .") as caught:
        compiler.start(grammar)
    assert len(str(caught.value)) < 500
    assert capfd.readouterr() == ("", "")


def test_a_bad_grammar_leaves_the_compiler_whole(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^tools: "):
        compiler.start(Grammar("json_schema", '{"type": "nonsense"}', where="tools"))
    walk(compiler, Grammar("json_object"), tokenizer.encode("{}"))


def test_matchers_of_one_grammar_are_apart(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar, (a, b) = Grammar("regex", "ab"), tokenizer.encode("a") + tokenizer.encode("b")
    one, other = compiler.start(grammar), compiler.start(grammar)
    one.accept(a)
    assert one.allowed()[b] and not one.allowed()[a]
    assert other.allowed()[a] and not other.allowed()[b]


def test_a_token_that_is_not_allowed_is_an_error(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.start(Grammar("regex", "ab"))
    with pytest.raises(UserError, match=r"^response_format: "):
        matcher.accept(tokenizer.encode("b")[0])


def test_a_grammar_that_outgrows_its_limits_fails_when_the_token_is_accepted(tokenizer: Tokenizer) -> None:
    """Choosing a token for a batch never raises: what fails is the one sequence."""
    large = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(2000)}}
    schema = {"type": "object", "properties": {"a": large}, "required": ["a"]}
    params = SamplingParams(grammar=Grammar("json_schema", json.dumps(schema)))
    state = SamplingState(params, [], tokenizer.vocab_size, GrammarCompiler(tokenizer))
    with pytest.raises(UserError, match=r"^response_format: .*use a simpler grammar$"):
        for token in [*tokenizer.encode('{"a": {'), None]:
            (chosen,), _ = sample(torch.zeros(1, tokenizer.vocab_size), [state])
            state.accept(chosen if token is None else token)


def test_a_thought_comes_first(tokenizer: Tokenizer, foreign: Tokenizer) -> None:
    """The prompt ended in <think>: free text to </think>, in one token or spelled out, and then the grammar."""
    assert len(tokenizer.backend.encode("</think>").ids) == 1 < len(foreign.backend.encode("</think>").ids)
    said = 'Hm, {"a" 小猫?\n'
    inner = [Grammar("json_object"), Grammar("lark", 'start: "{" "}"'), Grammar("regex", r"\{\}")]
    for own in (tokenizer, foreign):
        compiler, end = GrammarCompiler(own), own.backend.encode("</think>").ids
        for grammar in inner:
            grammar = Grammar(grammar.kind, grammar.text, thinking=True)
            allowed = walk(compiler, grammar, own.encode(said))
            assert not allowed[own.stop_ids].any()
            allowed = walk(compiler, grammar, own.encode(said) + end + own.encode("\n\n"))
            assert allowed.nonzero().squeeze(-1).tolist()[0] >= 0 and allowed[own.encode("{")].all()
            assert not allowed[own.encode("H")].any()
            done = walk(
                compiler, grammar, own.encode(said) + end + own.encode("\n\n") + own.encode("{") + own.encode("}")
            )
            assert done[own.stop_ids].all()


def test_a_vocabulary_with_holes(tokenizer: Tokenizer) -> None:
    """Some ids name no token: SmolLM and others skip them."""
    spec = json.loads(tokenizer.backend.to_str())
    last = max(spec["model"]["vocab"].values())
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": last + 9, "content": "<|far|>"})
    vocab = {**spec["model"]["vocab"], "<|far|>": last + 9}
    spec["model"]["vocab"] = vocab
    own = Tokenizer(Backend.from_str(json.dumps(spec)), tokenizer.config, tokenizer.chat_template)
    assert own.vocab_size == last + 10
    allowed = walk(GrammarCompiler(own), Grammar("json_object"), own.encode('{"a": "'))
    assert len(allowed) == own.vocab_size
    assert not allowed[last + 1 :].any()


def test_a_tokenizer_that_cannot_do_it_is_named(tokenizer: Tokenizer) -> None:
    spec = json.loads(tokenizer.backend.to_str()) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    own = Tokenizer(Backend.from_str(json.dumps(spec)), tokenizer.config, tokenizer.chat_template)
    with pytest.raises(UserError, match="this model's tokenizer cannot be held to a grammar"):
        GrammarCompiler(own).start(Grammar("json_object"))
