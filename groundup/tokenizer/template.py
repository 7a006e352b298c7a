"""Chat templates are Jinja, run in a sandbox as transformers runs them, plus a mark around what the assistant says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from groundup.errors import UserError

_TAG = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


def plain_template(template: str) -> str:
    """The template without {% generation %} tags, for engines that do not know them; it renders the same text."""
    return _TAG.sub(r"{#\1 \2#}", template)  # a comment keeps the dashes, which trim white space on either side


def has_generation_marks(template: str) -> bool:
    return bool(_TAG.search(template))


def render_text(template: str, variables: dict[str, Any], begin: str = "", end: str = "") -> str:
    """Render a chat template; `begin` and `end` are written around each {% generation %} span.

    Raises jinja2.TemplateError (the template's own complaint), or whatever a template does wrong with its input.
    """
    return _compile(template).render(
        {"strftime_now": now().strftime, **variables}, generation_begin=begin, generation_end=end
    )


def now() -> datetime:
    """The date that Llama 3.2 and others write into their system turn: today's, or $SOURCE_DATE_EPOCH for runs that
    must come out the same on another day."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(epoch), timezone.utc) if epoch.isdigit() else datetime.now()


@dataclass(frozen=True)
class View:
    """One chat under one template: any part of it can be rendered, all at the same instant.

    variables: what the template sees beside the messages. control matches control tokens in what it writes, `ends` are
    those that end a turn. mark: what breaks control tokens in people's words (shield.py). where: for messages.
    """

    source: str
    variables: dict[str, Any]
    control: re.Pattern[str]
    ends: frozenset[str]
    mark: str
    where: str
    time: datetime = field(default_factory=now)

    def run(
        self, messages: list[dict[str, Any]], prompt: bool = False, begin: str = "", end: str = "", **more: Any
    ) -> str:
        """These messages as text; prompt: up to where the assistant is to speak. UserError: the template refuses."""
        given = {"messages": messages, "add_generation_prompt": prompt, "strftime_now": self.time.strftime}
        variables = {**self.variables, **given, **more}
        if variables.get("enable_thinking", True) is None:  # templates ask whether it is defined
            del variables["enable_thinking"]
        try:
            return render_text(self.source, variables, begin, end)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"chat template of {self.where}", f"cannot render this chat ({error})") from error

    def other_prompts(self, messages: list[dict[str, Any]]) -> Iterator[str]:
        """What generation may start from after these messages if another chat asked: some templates open or close the
        reasoning there, by enable_thinking."""
        if "enable_thinking" in self.source:
            for thinking in (None, True, False):
                yield self.run(messages, True, enable_thinking=thinking)

    def end(self, text: str, start: int) -> int | None:
        """Where the turn that begins at `start` of `text` ends, its end-of-turn token included; None if nowhere."""
        return next((m.end() for m in self.control.finditer(text, start) if m[0].strip() in self.ends), None)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what stands between is the assistant's own words."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.Name(f"generation_{side}", "load")], lineno=line) for side in ("begin", "end")
        )
        return nodes.Scope([begin, *body, end], lineno=line)


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML; chat templates mean plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
