"""Which tokens may come next so that the answer keeps to a grammar? A thin shell around llguidance.

llguidance (https://github.com/guidance-ai/llguidance) walks an Earley parser and a trie of the vocabulary side by side
and says, in some 50 us, which tokens lead on to a sentence of the grammar. Ours is only: our tokenizer for it, one
matcher a sequence, the model's several stop tokens, and errors that a person can read.
"""

from __future__ import annotations

import json
import re
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from groundup.errors import UserError
from groundup.infer.params import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

    from groundup.tokenizer import Tokenizer

__all__ = ["Grammar", "GrammarCompiler", "Matcher"]

# White space between JSON's tokens: none, a space, or a line break with indentation. With any amount allowed, as in
# JSON itself, a weak model may never come to an end. A schema's own "x-guidance" comes before these.
JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"( |\n[ \t]{0,32})"}
THINKING = 'start: thought "\\n\\n" @answer\nthought: /(?s:.*)/ </think>'
COMPILED = 64  # grammars kept compiled: a server sees the same few again and again


class GrammarCompiler:
    """Turns grammars into matchers for one tokenizer; one an engine. Nothing is loaded before the first grammar."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._compile = lru_cache(COMPILED)(self._compiled)

    def start(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of the grammar. Raises UserError for a grammar that is wrong or not supported."""
        return Matcher(self._compile(grammar).deep_copy(), self._tokenizer, grammar.where)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        tokenizer = self._tokenizer
        try:
            return LLTokenizer(tokenizer.backend.to_str(), n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eos_id)
        except ValueError as error:
            why = f"this model's tokenizer cannot be held to a grammar ({_first_line(error)})"
            raise UserError("response_format or tool_choice", why, "leave it out") from None

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        try:
            parts = [self._part(grammar)]
        except ValueError as error:
            raise _wrong(grammar, error) from None
        if grammar.thinking:
            parts = [{"lark_grammar": self._spelled(THINKING)}, {**parts[0], "name": "answer"}]
        # The limits stay the library's: a hostile schema costs a second at most.
        quiet = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._vocabulary, json.dumps({"grammars": parts}), log_level=0, limits=quiet)
        if matcher.is_error():
            raise _wrong(grammar, matcher.get_error())
        return matcher

    def _part(self, grammar: Grammar) -> dict[str, Any]:
        """The grammar as one entry of llguidance's own format; ValueError for what is not even JSON."""
        from llguidance import LLMatcher

        if grammar.kind == "lark":
            return {"lark_grammar": self._spelled(grammar.text)}
        if grammar.kind == "regex":
            return json.loads(LLMatcher.grammar_from_regex(grammar.text))["grammars"][0]
        schema = grammar.text if grammar.kind == "json_schema" else '{"type": "object"}'
        return json.loads(LLMatcher.grammar_from_json_schema(schema, defaults=JSON_OPTIONS))["grammars"][0]

    def _spelled(self, lark: str) -> str:
        """Rules `name: <mark>` and `name: /regex/ <mark>` for a tokenizer that has no such token: the mark as text."""
        added = {token.content for token in self._tokenizer.backend.get_added_tokens_decoder().values()}

        def spell(rule: re.Match[str]) -> str:
            name, regex, mark = rule.groups()
            if mark in added:
                return rule[0]
            return f"{name}[suffix={json.dumps(mark)}]: {regex}" if regex else f"{name}: {json.dumps(mark)}"

        return _MARK_RULE.sub(spell, lark)


class Matcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher, tokenizer: Tokenizer, where: str) -> None:
        self._matcher, self._where, self._stopped = matcher, where, False
        self._stop_ids, self._vocab_size = tokenizer.stop_ids, tokenizer.vocab_size

    @property
    def done(self) -> bool:
        """Nothing more may follow."""
        return self._stopped or self._matcher.is_stopped()

    def allowed(self) -> torch.Tensor:
        """Bool (V) on the CPU, V the tokenizer's vocab_size: the tokens that may come next.

        The stop tokens are among them where the answer may end, and only there.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed_V = torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_))
        if self._stopped or self._matcher.is_accepting():
            allowed_V[self._stop_ids] = True
        return allowed_V

    def accept(self, token: int) -> None:
        """Go on by one token. Raises UserError if it is not allowed, or the grammar has outgrown its limits."""
        if token in self._stop_ids:
            self._stopped = True
        else:
            self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise UserError(self._where, _first_line(self._matcher.get_error()), "use a simpler grammar")


_MARK_RULE = re.compile(r"^(\w+): (?:(/\S+/) )?(<[^<>\s]+>)$", re.MULTILINE)


def _wrong(grammar: Grammar, error: object) -> UserError:
    return UserError(grammar.where, f"this {grammar.kind} cannot be used: {_first_line(error)}", "correct it")


def _first_line(error: object) -> str:
    return str(error).strip().split("\n", 1)[0][:300]
