"""How does an engine that only one thread may touch serve an event loop? In a thread of its own, with an inbox.

Whatever is to happen to the engine (a new request, an abort, an embedding) is put into the inbox and done between two
steps. What a step says goes back to the event loop in one call. The thread sleeps on a condition while there is
nothing to do. `submit`, `call` and `drain` are for coroutines; a Handle belongs to the loop that submitted it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from groundup.infer.engine import Engine
    from groundup.infer.params import SamplingParams
    from groundup.infer.sequence import Delta, Request

T = TypeVar("T")
logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """No room for another request now. retry_after: seconds after which it is worth another try."""

    def __init__(self, why: str, retry_after: int) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class Draining(Exception):
    """The worker takes no more requests, or ended this one because it stops."""


class RequestTimeout(Exception):
    """The request was not finished within its time."""


class EngineFailed(Exception):
    """The engine could not go on with this request."""


class Aborted(Exception):
    """The one who asked does not want the rest."""


@dataclass(frozen=True)
class Limits:
    """max_waiting: answers that may wait beside those that the engine runs side by side.

    max_total_tokens: sum of prompt + max_tokens over all requests taken (None: no bound).
    request_timeout: seconds from submit to the last token (None: no bound).
    """

    max_waiting: int = 256
    max_total_tokens: int | None = None
    request_timeout: float | None = None


class Handle:
    """The answers to one submit. Iterate over its Deltas; after the last one the iteration ends.

    It raises instead: EngineFailed, RequestTimeout, Draining, Aborted. requests: one a prompt, in their order.
    whole: the Deltas come all at once, at the end. first_token: when the first one was made (time.monotonic).
    """

    def __init__(
        self, worker: Worker, prompts: Sequence[Sequence[int]], params: SamplingParams, whole: bool = False
    ) -> None:
        self.requests: list[Request] = []
        self.whole = whole
        self.held: list[Delta] = []
        self.first_token: float | None = None
        self.sequences = len(prompts) * params.n
        self.tokens = sum(len(prompt) for prompt in prompts) + self.sequences * params.max_tokens
        self.started = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self.unfinished = self.sequences  # counted down by the engine's thread
        self._worker = worker
        self._mail: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> Handle:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        item = await self._mail.get()
        if item is None or isinstance(item, Exception):
            self._ended = True
            raise StopAsyncIteration if item is None else item
        return item

    def abort(self) -> None:
        """Stop computing and free the blocks, before the next step. Does nothing when all was said."""
        if not self._ended:
            self._worker.end(self, Aborted("aborted"))

    def put(self, item: Delta | Exception | None) -> None:
        self._mail.put_nowait(item)


class Worker:
    """An engine in a thread of its own.

    capacity: answers that may be on their way at once. stats: the engine's own figures after its last step.
    """

    def __init__(self, engine: Engine, limits: Limits | None = None) -> None:
        self.engine, self.limits = engine, limits or Limits()
        self.capacity = engine.settings.max_sequences + self.limits.max_waiting
        self.stats: dict[str, Any] = engine.stats()
        self._wake = threading.Condition()
        # Guarded by _wake: what is to be done, what is on its way, and whether more is taken.
        self._inbox: deque[Callable[[], None]] = deque()
        self._live: dict[Handle, None] = {}
        self._closed = self._stopping = False
        self._by_request: dict[int, Handle] = {}  # the engine's thread only
        self._seconds = 1.0  # what a request took of late
        self._thread: threading.Thread | None = None

    # -- for the event loop

    @property
    def healthy(self) -> bool:
        """Whether requests are taken and the thread is there to answer them."""
        return not self._closed and self._thread is not None and self._thread.is_alive()

    @property
    def in_flight(self) -> int:
        """Answers on their way, waiting or running."""
        with self._wake:
            return sum(handle.sequences for handle in self._live)

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="groundup-engine", daemon=True)
            self._thread.start()

    async def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        adapter: str | None = None,
        tenant: str | None = None,
        whole: bool = False,
    ) -> Handle:
        """Take all prompts or none, and return when the engine has them.

        adapter, tenant: as in Engine.add. whole: nobody waits for single tokens, so the event loop is left alone.
        Raises QueueFull, Draining, or what Engine.add raises (UserError: a prompt that cannot be answered).
        """
        handle = Handle(self, prompts, params, whole)
        with self._wake:
            self._check_room(handle.sequences, handle.tokens)
            self._live[handle] = None
        try:
            await self.call(lambda engine: self._begin(handle, prompts, params, adapter, tenant))
        except BaseException:  # a task that was cancelled meanwhile as well
            handle.abort()
            raise
        return handle

    def check_room(self) -> None:
        """Raise QueueFull or Draining when a request would be turned away now: before work is done for it."""
        with self._wake:
            self._check_room(1, 0)

    async def call(self, fn: Callable[[Engine], T]) -> T:
        """Run fn(engine) in the engine's thread between two steps; its result or its exception."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = fn(self.engine)
            except Exception as error:
                _tell(loop, _settle, future, None, error)
            else:
                _tell(loop, _settle, future, result, None)

        self._post(job)
        return await future

    def end(self, handle: Handle, error: Exception) -> None:
        """End a request before its time."""
        with suppress(Draining):  # then the thread has ended, and with it all requests
            self._post(lambda: self._end(handle, error))

    async def drain(self, grace: float) -> None:
        """Take no more requests, let the others finish for up to `grace` seconds, then end them."""
        self.refuse()
        if not await asyncio.to_thread(self._wait_idle, grace):
            await self.call(lambda engine: self._end_all(Draining("the server is shutting down")))

    def refuse(self) -> None:
        """From now on submit raises Draining."""
        with self._wake:
            self._closed = True

    def stop(self) -> None:
        """End what is left and the thread. The worker cannot be started again."""
        with self._wake:
            self._closed = self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _check_room(self, sequences: int, tokens: int) -> None:
        if self._closed:
            raise Draining("the server is shutting down")
        wait = max(1, min(60, math.ceil(self._seconds)))
        taken = sum(handle.sequences for handle in self._live)
        if max(taken, len(self._inbox)) + sequences > self.capacity:  # embeddings wait in the inbox
            raise QueueFull(f"{self.capacity} answers are being computed or waiting", wait)
        most = self.limits.max_total_tokens
        if most is not None and sum(handle.tokens for handle in self._live) + tokens > most:
            raise QueueFull(f"the requests taken may come to {most} tokens in all", wait)

    def _post(self, job: Callable[[], None]) -> None:
        with self._wake:
            if self._stopping:
                raise Draining("the server is shutting down")
            self._inbox.append(job)
            self._wake.notify_all()

    def _wait_idle(self, seconds: float) -> bool:
        with self._wake:
            return self._wake.wait_for(lambda: not self._live, seconds)

    # -- in the engine's thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            logger.exception("the engine's thread ended")
        finally:
            with self._wake:
                self._closed = self._stopping = True
                jobs, self._inbox = self._inbox, deque()
            for job in jobs:  # someone waits for each
                job()
            self._end_all(Draining("the server is shutting down"))

    def _turn(self) -> bool:
        """What is in the inbox, then a step; False when it was the last."""
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._stopping or self.engine.has_work)
            jobs, self._inbox = self._inbox, deque()
            stopping = self._stopping
        for job in jobs:
            job()
        if stopping:
            return False
        self._expire()
        if self.engine.has_work:
            self._step()
        self.stats = self.engine.stats()
        return True

    def _begin(
        self,
        handle: Handle,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        adapter: str | None,
        tenant: str | None,
    ) -> None:
        with self._wake:
            if handle not in self._live:  # aborted before it began
                return
        try:
            for prompt in prompts:
                request = self.engine.add(prompt, params, adapter, tenant)
                handle.requests.append(request)
                self._by_request[request.id] = handle
        except Exception:
            self._forget(handle)
            raise

    def _step(self) -> None:
        try:
            deltas = self.engine.step()
        except Exception:
            logger.exception("a step of the engine failed: its requests end, the engine goes on")
            self._end_all(EngineFailed("the engine failed"), begun=True)
            return
        mail: dict[asyncio.AbstractEventLoop, list[tuple[Handle, Delta | Exception | None]]] = {}
        for delta in deltas:
            handle = self._by_request.get(delta.request.id)
            if handle is None:  # its request was ended by a delta before this one
                continue
            letters = mail.setdefault(handle.loop, [])
            if delta.finish_reason == "error":
                self._forget(handle)
                letters.append((handle, EngineFailed("the engine failed on this request")))
                continue
            handle.first_token = handle.first_token or time.monotonic()
            handle.unfinished -= bool(delta.finish_reason)
            if handle.whole:
                handle.held.append(delta)
            else:
                letters.append((handle, delta))
            if not handle.unfinished:
                self._forget(handle)
                letters += [*((handle, held) for held in handle.held), (handle, None)]
        for loop, letters in mail.items():
            if letters:
                _tell(loop, _deliver, letters)

    def _expire(self) -> None:
        limit = self.limits.request_timeout
        if limit is None:
            return
        with self._wake:
            late = [handle for handle in self._live if time.monotonic() - handle.started > limit]
        for handle in late:
            self._end(handle, RequestTimeout(f"not finished within {limit:g} seconds"))

    def _end_all(self, error: Exception, begun: bool = False) -> None:
        """End all requests; begun: only those that the engine has."""
        with self._wake:
            handles = [handle for handle in self._live if handle.requests or not begun]
        for handle in handles:
            self._end(handle, error)

    def _end(self, handle: Handle, error: Exception) -> None:
        if self._forget(handle):
            _tell(handle.loop, handle.put, error)

    def _forget(self, handle: Handle) -> bool:
        """Free what a request holds; False when that was done before."""
        with self._wake:
            if handle not in self._live:
                return False
            del self._live[handle]
            self._seconds += 0.1 * (time.monotonic() - handle.started - self._seconds)
            self._wake.notify_all()
        for request in handle.requests:
            self._by_request.pop(request.id, None)
            if not request.finished:
                try:
                    self.engine.abort(request)
                except Exception:
                    logger.exception("a request could not be aborted")
        return True


def _tell(loop: asyncio.AbstractEventLoop, fn: Callable[..., None], *args: Any) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
        loop.call_soon_threadsafe(fn, *args)


def _deliver(letters: list[tuple[Handle, Delta | Exception | None]]) -> None:
    for handle, item in letters:
        handle.put(item)


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():  # cancelled by the one who waited
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
