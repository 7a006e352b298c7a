"""What may a client send? The bodies of all requests, with the types and ranges of every field.

Types are strict ("5" is no number, 1 is not true); null is the same as left out; unknown fields are ignored, since
clients send many. What must hold between fields is checked in api_params.py. The names and meanings are OpenAI's;
what OpenAI does not have is named as in vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

INT64 = 2**63 - 1
MAX_INT = 2**31 - 1
MAX_NESTING = 32  # of a JSON schema: compilers of grammars recurse


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)


def _shallow(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """Refuse objects that are nested too deeply, without recursion."""
    level: list[Any] = [value]
    for _ in range(MAX_NESTING):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    raise ValueError(f"is nested more than {MAX_NESTING} levels deep")


Object = Annotated[dict[str, Any], AfterValidator(_shallow)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Ids = Annotated[list[TokenId], Field(fail_fast=True)]  # a million wrong ones are one fault
Texts = Annotated[list[str], Field(fail_fast=True)]
NonEmpty = Annotated[str, Field(min_length=1)]
FunctionName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_.:\-]+$")]


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampling(Body):
    """What chat and text completions have in common."""

    model: str | None = Field(None, description="One of /v1/models; left out: the first of them.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_INT, description="Answers to each prompt.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT, description="0 and -1: off.")
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        None, description="Added to the logits, by token id."
    )
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    stop: NonEmpty | Annotated[list[NonEmpty], Field(fail_fast=True)] | None = Field(
        None, description="Any number of strings that end an answer."
    )
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = Field(None, description="Requests of different salts share no cached prompts.")


class Part(Body):
    """A part of a message; a picture is refused while models cannot see."""

    type: str
    text: str | None = None


class CalledFunction(Body):
    name: str
    arguments: str | Object = "{}"


class SaidToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[SaidToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


class ToolFunction(Body):
    name: FunctionName
    description: str | None = None
    parameters: Object | None = Field(None, description="A JSON schema.")
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: ToolFunction


class ChosenFunction(Body):
    name: str


class ChosenTool(Body):
    type: Literal["function"] = "function"
    function: ChosenFunction


class SchemaFormat(Body):
    name: str
    description: str | None = None
    schema_: Object | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_is_given(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema.schema is missing")
        return self


class TemplateOptions(Body):
    enable_thinking: bool | None = Field(None, description="Left out: the model decides.")


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: TemplateOptions | None = None
    functions: list[Any] | None = Field(None, description="Old; refused: use tools.", deprecated=True)


class CompletionRequest(Sampling):
    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT, description="16 if left out, as OpenAI has it.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_INT)
    suffix: str | None = Field(None, description="Refused: these models do not fill in.")


class EmbeddingRequest(Body):
    model: str | None = None
    input: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=MAX_INT, description="Only the model's own.")


class TokenizeRequest(Body):
    """Either prompt, or messages (with tools), which are rendered as chat completions render them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = Field(None, min_length=1)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_special_tokens: bool | None = Field(None, description="Start prompt as /v1/completions does. Default true.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be given, and not both")
        return self


class ScoreRequest(Body):
    """One conversation or several, each ending in the answer that is judged."""

    model: str | None = Field(None, description="A reward model of /v1/models; left out: the first of them.")
    messages: (
        Annotated[list[Message], Field(fail_fast=True)]
        | Annotated[list[Annotated[list[Message], Field(fail_fast=True, min_length=1)]], Field(fail_fast=True)]
    ) = Field(min_length=1)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Ids
