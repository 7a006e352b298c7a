"""What may one request ask for, and what does it get back?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from groundup.errors import UserError


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like.

    kind: one of GRAMMAR_KINDS. text: JSON schema, pattern or rules; "" for json_object. thinking: the answer
    goes on with a thought that the prompt has opened, free until its end. where: the request's field, for messages.
    Whether the text is right is seen when the engine compiles it (grammar.py).
    """

    kind: str
    text: str = ""
    thinking: bool = False
    where: str = "response_format"

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS:
            raise UserError(self.where, f"{self.kind!r} is unknown", f"one of {', '.join(GRAMMAR_KINDS)}")


LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")  # as vLLM calls them
GRAMMAR_KINDS = ("json_object", "json_schema", "regex", "lark")


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token. The output of a request is a function of (weights, prompt, SamplingParams) alone.

    max_tokens: most new tokens; a request also ends at the model's context.
    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off.
    min_p: least probability kept, as a share of the largest; 0 is off.
    repetition_penalty: 1 is off; over prompt and answer (Keskar et al. 2019, CTRL, section 4.1).
    presence_penalty, frequency_penalty: 0 is off; over the answer only, as OpenAI defines them.
    logit_bias: added to the logits of these token ids, -100 (never) to 100 (nothing else).
    seed: None draws a fresh one; equal seeds on equal prompts give equal text. The i-th of n answers uses seed + i.
    stop: strings that end the answer and are left out of it. stop_token_ids: ids that end it, beside the tokenizer's.
    ignore_eos: go on past the tokenizer's stop tokens (for measuring).
    n: answers to this prompt. logprobs: None is off, 0 tells the chosen token's, k also those of the k likeliest;
    prompt_logprobs: the same for the prompt. logprobs_mode: of the model's own distribution (raw_logprobs), or of the
    one that the token was drawn from, after temperature, penalties and cuts (processed_logprobs: the chosen token's
    alone). grammar: what the answer must look like.
    Raises UserError, which names the field, on a value of a wrong type or out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, (fine, want) in _RULES.items():
            if not fine(getattr(self, name)):
                raise UserError(name, f"{_short(getattr(self, name))} is out of range", f"it must be {want}")
        # What the caller does to its own lists later must not reach a running request.
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Always the likeliest token. So near to 0, dividing by the temperature leaves nothing else in fp32."""
        return self.temperature < 1e-5


@dataclass(frozen=True)
class TokenLogprob:
    """How likely one token was: natural logarithms of the model's own distribution, log softmax of its raw logits.

    So temperature, cuts, penalties and grammar do not change it, unless logprobs_mode asks for that. top: (id, logprob)
    of the likeliest, likeliest first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """One answer. ids hold the stop token where one ended it; text does not.

    finish_reason: "stop", "length", "abort" or "error". stop_reason: the stop id or string that ended it, if one did.
    logprobs: one for each of ids, when asked for. index: which of the request's n answers.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None
    index: int = 0
    stop_reason: int | str | None = None


def params_from_dir(path: str | Path, **given: Any) -> SamplingParams:
    """The folder's own habits (generation_config.json), then what is given and not None.

    As in transformers, a folder that does not say do_sample answers greedily.
    """
    values: dict[str, Any] = {}
    file = Path(path) / "generation_config.json"
    if file.is_file():
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(file, "is not valid JSON", "mend or remove it") from None
        if stored.get("do_sample"):
            defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers' own
            values = {name: stored[name] if stored.get(name) is not None else v for name, v in defaults.items()}
        if stored.get("repetition_penalty"):
            values["repetition_penalty"] = stored["repetition_penalty"]
    return SamplingParams(**(values | {name: value for name, value in given.items() if value is not None}))


def _whole(low: int, high: float = float("inf")) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high  # also refuses nan


def _none_or(fine: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fine(value)


def _all(fine: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, Sequence) and not isinstance(values, str) and all(map(fine, values))


def _biases(value: Any) -> bool:
    ids, bias = _whole(0), _number(-100, 100)
    return isinstance(value, Mapping) and all(ids(token) and bias(b) for token, b in value.items())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# The upper ends of temperature and repetition_penalty keep fp32 finite, far beyond any use.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (_whole(1), "a whole number, 1 or more"),
    "temperature": (_number(0, 1e6), "0 (greedy) or more, at most 1e6"),
    "top_k": (_whole(0), "a whole number, 0 (off) or more"),
    "top_p": (lambda value: _number(0, 1)(value) and value > 0, "in (0, 1]"),
    "min_p": (_number(0, 1), "in [0, 1]"),
    "repetition_penalty": (_number(0.01, 100), "in [0.01, 100], 1 is off"),
    "presence_penalty": (_number(-2, 2), "in [-2, 2]"),
    "frequency_penalty": (_number(-2, 2), "in [-2, 2]"),
    "logit_bias": (_biases, "token ids with a number in [-100, 100] each"),
    "seed": (_none_or(_whole(-(2**63), 2**63 - 1)), "a whole number of 64 bits"),
    "stop": (_all(lambda text: isinstance(text, str) and bool(text)), "made of non-empty strings"),
    "stop_token_ids": (_all(_whole(0)), "made of token ids"),
    "ignore_eos": (lambda value: isinstance(value, bool), "true or false"),
    "n": (_whole(1), "a whole number, 1 or more"),
    "logprobs": (_none_or(_whole(0)), "a whole number, 0 or more"),
    "prompt_logprobs": (_none_or(_whole(0)), "a whole number, 0 or more"),
    "logprobs_mode": (lambda value: value in LOGPROBS_MODES, f"one of {', '.join(LOGPROBS_MODES)}"),
    "grammar": (_none_or(lambda value: isinstance(value, Grammar)), "a Grammar"),
}
