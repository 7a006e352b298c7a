"""How does an answer travel? Whole, or event by event; and when the client goes away, so does the work."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from groundup.infer.worker import Aborted, Draining, EngineFailed, Handle, RequestTimeout
from groundup.serve.api_errors import as_api_error, json_response
from groundup.serve.api_metrics import Clock

if TYPE_CHECKING:
    from groundup.infer.sequence import Delta

logger = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
# Line separators that JSON may hold as they are, but at which some clients split lines.
_LINES = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


class View(Protocol):
    """How an endpoint writes what the engine says."""

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first piece of text."""

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of a delta; also kept for `whole`."""

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, of no choice, for who asked for it."""

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""


async def respond(
    request: Request, handle: Handle, view: View, clock: Clock, stream: bool, include_usage: bool
) -> Response:
    """Wait for the first token, so that what is wrong until then is an error of its own and not inside a 200."""
    try:
        async with ends_with_client(request.receive, handle):
            first = await anext(handle)
            if not stream:
                view.chunks(first)
                async for delta in handle:
                    view.chunks(delta)
                clock.finished(handle)
                return json_response(view.whole())
    except BaseException:
        handle.abort()
        raise
    return EventStream(handle, _events(handle, first, view, clock, include_usage))


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, nothing is computed any more for it."""

    def __init__(self, handle: Handle, events: AsyncIterator[bytes]) -> None:
        # no-buffering is what proxies in front need to know
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, 200, headers, "text/event-stream")
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with ends_with_client(receive, self._handle):
                await self.stream_response(send)
        except OSError:
            pass  # how newer servers say that the client is gone
        finally:
            self._handle.abort()


@asynccontextmanager
async def ends_with_client(receive: Receive, handle: Handle) -> AsyncIterator[None]:
    """Abort the handle as soon as the client is gone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        handle.abort()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def event(chunk: dict[str, Any]) -> bytes:
    text = json.dumps(chunk, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if not text.isascii():
        text = text.translate(_LINES)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


async def _events(handle: Handle, first: Delta, view: View, clock: Clock, include_usage: bool) -> AsyncIterator[bytes]:
    try:
        for chunk in [*view.opening(), *view.chunks(first)]:
            yield event(chunk)
        async for delta in handle:
            chunks = view.chunks(delta)
            if chunks:
                yield b"".join(map(event, chunks))
        clock.finished(handle)
        if include_usage:
            yield event(view.usage_chunk())
    except Aborted:
        return
    except Exception as error:
        if not isinstance(error, (Draining, EngineFailed, RequestTimeout)):
            logger.exception("a stream failed")
        yield event(as_api_error(error).body())
    yield DONE
