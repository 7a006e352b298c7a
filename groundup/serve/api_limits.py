"""Who may come in, and with how much? The key and the size of a body, before anything is read or computed."""

from __future__ import annotations

import hmac

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from groundup.serve.api_errors import ApiError

OPEN_PATHS = frozenset({"/health", "/version"})  # what a load balancer asks has no key


class RequireKey:
    """401 without the right bearer token. The comparison takes as long for a near miss as for any other."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._fits(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        text = "No API key, or a wrong one: send the header Authorization: Bearer KEY"
        error = ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await error.response()(scope, receive, send)

    def _fits(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return hmac.compare_digest(token.strip().encode("latin-1"), self._key) and scheme.lower() == "bearer"


class LimitBody:
    """413 for a body of more than `most` bytes: at once where its length is told, or else when it comes to that."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        text = f"The body is larger than {self.most} bytes"
        told = Headers(scope=scope).get("content-length", "")
        if told.isascii() and told.isdigit() and int(told[:20]) > self.most:
            error = ApiError(413, text, code="request_too_large", headers={"Connection": "close"})
            await error.response()(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                raise HTTPException(413, text, {"Connection": "close"})
            return message

        await self.app(scope, counted, send)
