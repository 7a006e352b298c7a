"""Bad input: every fault is a 4xx in OpenAI's shape that names the field, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from api_server import Api, api, pair  # noqa: F401  (fixtures)

from groundup.serve.api_models import ServerSettings

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/embeddings": {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
}
SAMPLING = {
    "model": [5, [], {}],
    "stream": ["yes", 1],
    "stream_options": [{}, "x", {"include_usage": "x"}],
    "n": [0, -1, 1.5, "1", True, 10**30, 129],
    "temperature": [-0.1, 2.1, "0", True, [], 1e400],
    "top_p": [0, 1.1, "x"],
    "top_k": [-2, 0.5, 10**30],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, 1000],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, "x"],
    "logit_bias": [[], {"a": 1}, {"1": 101}, {"99999": 1}, {"1": "x"}, {"-1": 0}, {"9" * 5000: 0}],
    "seed": ["x", 2**63, 0.5],
    "stop": [5, [""], "", [5], {}],
    "stop_token_ids": [5, ["x"], [-1], [99999]],
    "ignore_eos": ["x"],
}
TOOL = {"type": "function", "function": {"name": "f"}}
FIELDS = {
    "/v1/chat/completions": SAMPLING
    | {
        "messages": [
            None, "x", [], [5], [{}], [{"role": "king", "content": "x"}], [{"role": "user", "content": 5}],
            [{"role": "user", "content": [5]}], [{"role": "user", "content": [{"text": "x"}]}],
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{no"}}]}],
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}],
            [{"role": "assistant", "tool_calls": [{}]}], [{"role": "assistant", "tool_calls": 5}],
        ],
        "max_tokens": [0, -1, "1", 10**30],
        "max_completion_tokens": [0, "1"],
        "logprobs": [1, "x"],
        "top_logprobs": [-1, 21, 2],
        "tools": [5, [5], [{}], [{"type": "x"}], [{"type": "function", "function": {"name": "a b"}}],
                  [{"type": "function", "function": {"name": "f", "parameters": 5}}]],
        "tool_choice": ["maybe", "required", 5, {"type": "function", "function": {"name": "g"}}],
        "parallel_tool_calls": ["x"],
        "response_format": [5, {}, {"type": "xml"}, {"type": "json_schema"},
                            {"type": "json_schema", "json_schema": {}}],
        "chat_template_kwargs": [5, {"enable_thinking": "x"}],
        "functions": [[TOOL["function"]]],
    },
    "/v1/completions": SAMPLING
    | {
        "prompt": [None, 5, {}, [1.5], [["x"]], ["x", 1], [[1], "x"]],
        "max_tokens": [-1, "1"],
        "logprobs": [-1, 21, True],
        "echo": ["x"],
        "best_of": [0, "x", 129],
        "suffix": [5],
    },
    "/v1/embeddings": {"input": [None, 5, [5.5]], "encoding_format": ["int8"], "dimensions": [0, "x", 3]},
    "/tokenize": {"prompt": [5, ["x"]], "messages": [5], "add_special_tokens": ["x"]},
    "/detokenize": {"tokens": [None, 5, ["x"], [-1], "x"]},
}  # fmt: skip


def fault(answer, status: int = 400) -> dict:
    """The error of an answer, in the one shape that all have."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and "Traceback" not in answer.text and "/work" not in answer.text
    assert ".py" not in answer.text and "/tmp" not in answer.text
    return error


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_with_wrong_values(api: Api, path: str) -> None:  # noqa: F811
    for field, values in FIELDS[path].items():
        for value in values:
            body = json.dumps({**BODIES[path], field: value})
            answer = api.http.post(path, content=body, headers={"content-type": "application/json"})
            error = fault(answer)
            assert (error["param"] or "").split("[")[0].split(".")[0] == field, (field, str(value)[:80], error)
            assert len(error["message"]) < 1000
    assert api.post(path, BODIES[path]).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_null_is_the_same_as_left_out(api: Api, path: str) -> None:  # noqa: F811
    optional = [field for field in FIELDS[path] if field not in BODIES[path]]
    assert api.post(path, {**BODIES[path], **dict.fromkeys(optional)}).status_code == 200


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b"5", b'"x"', b"\xff\xfe", b'{"a":', b"[" * 200_000, b'{"a":' * 200_000,
        b'{"n": ' + b"9" * 10_000 + b"}", b'{"max_tokens": NaN}', b"\x00", b'{"model": "\\ud800"}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(api: Api, path: str, content: bytes) -> None:  # noqa: F811
    answer = api.http.post(path, content=content, headers={"content-type": "application/json"})
    fault(answer)
    plain = fault(api.http.post(path, content=content, headers={"content-type": "text/plain"}))
    assert "Content-Type: application/json" in plain["message"]


def test_the_path_to_a_fault_is_told(api: Api) -> None:  # noqa: F811
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": 5}]}]
    assert fault(api.post("/v1/chat/completions", {"messages": messages}))["param"] == "messages[1].content[0].text"
    tools = [{"type": "function", "function": {"name": 5}}]
    error = fault(api.post("/v1/chat/completions", {**CHAT, "tools": tools}))
    assert error["param"] == "tools[0].function.name"
    assert "valid string" in error["message"]


def test_half_a_character_is_refused(api: Api) -> None:  # noqa: F811
    for body in ('{"prompt": "\\ud800"}', '{"prompt": "x", "stop": "\\udfff"}'):
        fault(api.http.post("/v1/completions", content=body, headers={"content-type": "application/json"}))


def test_schemas_that_are_nested_without_end(api: Api) -> None:  # noqa: F811
    deep: dict = {}
    for _ in range(200):
        deep = {"properties": {"a": deep}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
    error = fault(api.post("/v1/chat/completions", {**CHAT, "response_format": form}))
    assert error["param"].startswith("response_format") and "nested" in error["message"]
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    assert "nested" in fault(api.post("/v1/chat/completions", {**CHAT, "tools": [tool]}))["message"]


def test_fields_that_exclude_each_other(api: Api) -> None:  # noqa: F811
    more = {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}
    assert fault(api.post("/v1/chat/completions", {**CHAT, **more}))["param"] == "response_format"


def test_an_unknown_model_is_404(api: Api) -> None:  # noqa: F811
    with pytest.raises(openai.NotFoundError) as error:
        api.client.chat.completions.create(model="gpt-4", messages=CHAT["messages"])
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    for path, body in BODIES.items():
        fault(api.post(path, {**body, "model": "x" * 5000}), 404)


def test_unknown_paths_and_methods(api: Api) -> None:  # noqa: F811
    assert fault(api.http.get("/v1/nothing"), 404)["code"] == "not_found"
    answer = api.http.get("/v1/chat/completions")
    assert fault(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    fault(api.http.request("DELETE", "/v1/models"), 405)


def test_health_version_and_description(api: Api) -> None:  # noqa: F811
    from groundup import __version__

    assert api.http.get("/health").json() == {"status": "ok"}
    assert api.http.get("/version").json() == {"version": __version__}
    page = api.http.get("/openapi.json").json()
    assert set(BODIES) | {"/v1/models", "/health", "/metrics"} <= set(page["paths"])
    assert "422" not in json.dumps(page)


@pytest.fixture(scope="module")
def locked(pair) -> Iterator[Api]:  # noqa: F811
    settings = ServerSettings(
        api_key="sésame", max_body_bytes=2000, max_tokens_limit=20, cors_origins=("https://page.example",)
    )
    running = Api(*pair, settings=settings)
    yield running
    running.close()


def test_the_key(locked: Api) -> None:
    right = {"authorization": "Bearer sésame".encode()}
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "sésame".encode()}, {"authorization": ""}):
        answer = locked.http.get("/v1/models", headers=headers)
        assert fault(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        fault(locked.http.post("/tokenize", json={"prompt": "x"}, headers=headers), 401)
        fault(locked.http.get("/metrics", headers=headers), 401)
        assert locked.http.get("/health", headers=headers).status_code == 200
    assert locked.http.get("/v1/models", headers=right).status_code == 200


def test_a_body_that_is_too_large(locked: Api) -> None:
    headers = {"authorization": "Bearer sésame".encode(), "content-type": "application/json"}
    content = json.dumps({"prompt": "x" * 3000}).encode()
    assert fault(locked.http.post("/tokenize", content=content, headers=headers), 413)["code"] == "request_too_large"
    pieces = (content[i : i + 500] for i in range(0, len(content), 500))  # chunked: its length is not told
    assert fault(locked.http.post("/tokenize", content=pieces, headers=headers), 413)["code"] == "request_too_large"
    small = json.dumps({"prompt": "x" * 1000})
    assert locked.http.post("/tokenize", content=small, headers=headers).status_code == 200


def test_more_tokens_than_the_server_gives(locked: Api) -> None:
    headers = {"authorization": "Bearer sésame".encode()}
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"messages": CHAT["messages"], name: 21}
        assert fault(locked.http.post("/v1/chat/completions", json=body, headers=headers))["param"] == name
    body = {"messages": CHAT["messages"], "ignore_eos": True}
    answer = locked.http.post("/v1/chat/completions", json=body, headers=headers).json()
    assert answer["usage"]["completion_tokens"] == 20


def test_cors_by_setting(locked: Api, api: Api) -> None:  # noqa: F811
    """A preflight needs no key; only pages that were named may read an answer, and errors too."""
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    page = {"origin": "https://page.example"}
    answer = locked.http.options("/v1/chat/completions", headers={**ask, **page})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    assert locked.http.get("/v1/models", headers=page).headers["access-control-allow-origin"] == page["origin"]
    other = locked.http.options("/v1/chat/completions", headers={**ask, "origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in api.http.get("/v1/models", headers=page).headers


def fuzz(api: Api, examples: int) -> None:  # noqa: F811
    """schemathesis over the app's own description: whatever fits it, and what does not, is never a 5xx."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    description = api.http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(description)
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.NEGATIVE, schemathesis.GenerationMode.POSITIVE)[not operation.body :]:
            cases = operation.as_strategy(generation_mode=mode)

            @settings(
                max_examples=examples, deadline=None, database=None, derandomize=True,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=cases)
            def never_5xx(case) -> None:
                answer = case.call(base_url=api.url, timeout=60)
                assert answer.status_code < 500, (answer.status_code, answer.text, case.body)

            never_5xx()
    assert api.http.get("/health").status_code == 200


def test_no_5xx_whatever_is_sent(api: Api) -> None:  # noqa: F811
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    fuzz(api, examples=5)


@pytest.mark.slow
def test_no_5xx_whatever_is_sent_for_long(api: Api) -> None:  # noqa: F811
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    fuzz(api, examples=100)
