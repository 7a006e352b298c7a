"""Chat templates are Jinja, run in a sandbox as transformers runs them, plus a mark around what the assistant says."""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

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
    return _compile(template).render(**variables, generation_begin=begin, generation_end=end)


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
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML; chat templates mean plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
