"""What does a client read when something is wrong? One shape for every error, OpenAI's; no path, no traceback."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from groundup.errors import UserError
from groundup.infer.worker import Aborted, Draining, EngineFailed, QueueFull, RequestTimeout


class ApiError(Exception):
    """An answer that is an error. param: the field that is wrong; code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}


def bad(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param, code=code)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in UTF-8; half a character (a lone surrogate), which UTF-8 cannot write, becomes "?"."""
    content = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(content, status, dict(headers or {}), "application/json")


def as_api_error(error: Exception) -> ApiError:
    """What to say about any exception. What is not foreseen is a 500 that tells nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return from_user_error(error)
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(error.retry_after)}
        return ApiError(429, f"Too many requests: {error}", code="queue_full", headers=headers)
    if isinstance(error, Draining):
        headers = {"Retry-After": "5"}
        return ApiError(503, "The server is shutting down", code="shutting_down", headers=headers)
    if isinstance(error, RequestTimeout):
        return ApiError(408, f"The request was {error}", code="timeout")
    if isinstance(error, Aborted):
        return ApiError(499, "The client closed the request", code="aborted")
    return ApiError(500, "The server failed on this request", code="internal_error")


def from_user_error(error: UserError, param: str | None = None, hide: str = "") -> ApiError:
    """hide: a path that must not be told (tokenizers name their folder)."""
    message = str(error).replace(hide, "this model") if hide else str(error)
    field = param or (error.where if _FIELD.fullmatch(error.where) else None)
    return bad(field, message if len(message) <= 500 else message[:497] + "...")


_FIELD = re.compile(r"[a-z_][a-z_0-9]*(\[\d+\]|\.[a-z_][a-z_0-9]*)*")
_NAME = re.compile(r"[a-z_][a-z_0-9]*")
_TYPES_OF_BRANCHES = {"str", "int", "float", "bool", "list", "dict", "none"}


def from_validation(errors: Iterable[Mapping[str, Any]]) -> ApiError:
    """The first field that is wrong, and what is wrong about it.

    Of a type with several branches pydantic tells the faults of each: what counts is the branch with the fewest, and
    there the fault that lies deepest.
    """
    faults = [(*_place(error["loc"]), str(error["msg"]).removeprefix("Value error, ")) for error in errors]
    if not faults:
        return bad(None, "The request is not valid")
    faults = [fault for fault in faults if fault[1][:1] == faults[0][1][:1]]
    counts = Counter(branch for branch, _, _ in faults)
    likely = [fault for fault in faults if counts[fault[0]] == min(counts.values())]
    path = max((path for _, path, _ in likely), key=len)
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    said = dict.fromkeys(message for _, place, message in likely if place == path)
    return bad(field or None, f"{field or 'body'}: {' or: '.join(said)}", "invalid_value")


def _place(location: Iterable[Any]) -> tuple[str, tuple[str | int, ...]]:
    """("body", "messages", 0, "content", "str") -> the branch that was tried, ("messages", 0, "content")."""
    branch, path = "", []
    for part in list(location)[1:]:
        if isinstance(part, int) or (_NAME.fullmatch(part) and part not in _TYPES_OF_BRANCHES):
            path.append(part)
        else:
            branch += f"{path}{part}"
    return branch, tuple(path)


def install(app: FastAPI) -> None:
    """Give every error of an app this shape."""

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first: dict[str, Any] = next(iter(error.errors()), {})
        if first.get("type") == "json_invalid":
            why = first.get("ctx", {}).get("error", "it cannot be read")
            return bad(None, f"The body is not valid JSON: {why}", "invalid_json").response()
        if first.get("loc") == ("body",) and "json" not in request.headers.get("content-type", ""):
            return bad(None, "The body is not announced as JSON: send Content-Type: application/json").response()
        return from_validation(error.errors()).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        texts = {404: f"There is no {request.url.path[:200]} here", 405: f"{request.method} is not possible here"}
        codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
        status = error.status_code
        message = texts.get(status, str(error.detail))
        return ApiError(status, message, code=codes.get(status), headers=error.headers).response()

    async def known(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    for kind in (ApiError, UserError, QueueFull, Draining, RequestTimeout, EngineFailed, Aborted):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(Exception, known)
