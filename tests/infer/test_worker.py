"""An engine in a thread of its own: what goes in from an event loop, what comes out, and how it ends.

The engine here is a small stand-in that counts: each step says the next number of every request. tests/serve runs the
worker over the real one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from groundup.errors import UserError
from groundup.infer.params import SamplingParams
from groundup.infer.worker import (
    Aborted,
    Draining,
    EngineFailed,
    Handle,
    Limits,
    QueueFull,
    RequestTimeout,
    Worker,
)


class Counting:
    """Answers a prompt with its numbers from 0 up to max_tokens; one thread only may touch it."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(max_sequences=2)
        self.requests: list[Any] = []
        self.aborted: list[Any] = []
        self.threads: set[int] = set()
        self.gate: threading.Semaphore | None = None  # where set: one step a release
        self.fault: Exception | None = None
        self.bad: set[int] = set()  # prompts whose request fails alone

    def add(self, prompt, params, adapter=None, tenant=None):
        self._here()
        if not prompt:
            raise UserError("prompt", "is empty")
        request = SimpleNamespace(id=id(prompt), prompt_ids=prompt, params=params, said=0, finished=False)
        self.requests.append(request)
        return request

    def step(self):
        self._here()
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        deltas = []
        for request in list(self.requests):
            failed = request.prompt_ids[0] in self.bad
            last = request.said + 1 >= request.params.max_tokens
            for index in range(request.params.n):
                reason = "error" if failed else "length" if last else ""
                deltas.append(SimpleNamespace(request=request, index=index, ids=[request.said], finish_reason=reason))
            request.said += 1
            if failed or last:
                request.finished = True
                self.requests.remove(request)
        return deltas

    def abort(self, request):
        self._here()
        self.aborted.append(request)
        request.finished = True
        if request in self.requests:
            self.requests.remove(request)

    @property
    def has_work(self):
        return bool(self.requests)

    def stats(self):
        return {"running": len(self.requests)}

    def _here(self) -> None:
        self.threads.add(threading.get_ident())


@pytest.fixture
def engine() -> Counting:
    return Counting()


@pytest.fixture
def worker(engine: Counting) -> Iterator[Worker]:
    made = Worker(engine, Limits(max_waiting=3))  # type: ignore[arg-type]
    made.start()
    yield made
    if engine.gate is not None:
        engine.gate.release(1000)
    made.stop()


def params(max_tokens: int = 3, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, n=n)


async def numbers(handle: Handle) -> list[tuple[int, int]]:
    return [(delta.index, delta.ids[0]) async for delta in handle]


def test_many_at_once_each_gets_its_own(worker: Worker, engine: Counting) -> None:
    async def main() -> None:
        handles = [await worker.submit([[i]], params(i + 1)) for i in range(1, 4)]
        got = await asyncio.gather(*map(numbers, handles))
        assert got == [[(0, k) for k in range(i + 1)] for i in range(1, 4)]

    asyncio.run(main())
    assert engine.threads == {worker._thread.ident} != {threading.get_ident()}
    assert worker.in_flight == 0
    assert worker.stats == {"running": 0}


def test_several_prompts_and_answers_in_one_submit(worker: Worker) -> None:
    async def main() -> None:
        handle = await worker.submit([[1], [2]], params(2, n=2))
        seen = [(handle.requests.index(d.request), d.index, d.ids[0]) async for d in handle]
        assert sorted(seen) == [(r, i, k) for r in (0, 1) for i in (0, 1) for k in (0, 1)]
        with pytest.raises(StopAsyncIteration):
            await anext(handle)

    asyncio.run(main())


def test_a_whole_answer_comes_at_once(worker: Worker, engine: Counting) -> None:
    """The loop hears nothing before the last token."""
    engine.gate = threading.Semaphore(0)

    async def main() -> None:
        handle = await worker.submit([[1]], params(3, n=2), whole=True)
        other = asyncio.create_task(worker.submit([[2]], params(9)))
        await asyncio.sleep(0)
        engine.gate.release(2)
        pieces = await other
        await anext(pieces)
        assert handle._mail.empty() and handle.first_token is not None
        engine.gate.release(1000)
        assert sorted(await numbers(handle)) == [(i, k) for i in (0, 1) for k in range(3)]
        assert len(await numbers(pieces)) == 8

    asyncio.run(main())


def test_a_bad_prompt_is_told_and_leaves_nothing_behind(worker: Worker, engine: Counting) -> None:
    async def main() -> None:
        with pytest.raises(UserError, match="is empty"):
            await worker.submit([[1], []], params())
        await worker.call(lambda engine: None)
        assert engine.requests == [] and len(engine.aborted) == 1

    asyncio.run(main())
    assert worker.in_flight == 0


def test_a_full_queue_turns_away(worker: Worker, engine: Counting) -> None:
    """Room for two side by side and three that wait; then again when one has ended."""
    engine.gate = threading.Semaphore(0)

    async def main() -> None:
        tasks = [asyncio.create_task(worker.submit([[i]], params(1))) for i in range(3)]
        two = asyncio.create_task(worker.submit([[9]], params(1, n=2)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="5 answers") as error:
            await worker.submit([[7]], params())
        assert 1 <= error.value.retry_after <= 60
        with pytest.raises(QueueFull):
            worker.check_room()
        engine.gate.release(1000)
        for handle in await asyncio.gather(*tasks, two):
            await numbers(handle)
        worker.check_room()

    asyncio.run(main())


def test_the_tokens_of_all_requests_are_bounded(engine: Counting) -> None:
    worker = Worker(engine, Limits(max_total_tokens=20))  # type: ignore[arg-type]
    worker.start()
    engine.gate = threading.Semaphore(0)

    async def main() -> None:
        first = asyncio.create_task(worker.submit([[1, 2]], params(10)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="20 tokens"):
            await worker.submit([[1]], params(8))
        engine.gate.release(1000)
        await numbers(await first)
        await numbers(await worker.submit([[1]], params(8)))

    asyncio.run(main())
    worker.stop()


def test_abort_frees_before_the_next_step(worker: Worker, engine: Counting) -> None:
    engine.gate = threading.Semaphore(0)

    async def main() -> None:
        gone = await worker.submit([[1]], params(100))
        other = asyncio.create_task(worker.submit([[2]], params(100)))
        await asyncio.sleep(0)
        engine.gate.release(1)
        stays = await other
        await anext(gone)
        gone.abort()
        engine.gate.release(1)  # the step that has begun; the abort comes before the one after it
        with pytest.raises(Aborted):
            await numbers(gone)
        assert [request.prompt_ids for request in engine.aborted] == [[1]]
        engine.gate.release(1000)
        assert len(await numbers(stays)) == 100
        stays.abort()  # all was said: nothing happens
        await worker.call(lambda engine: None)
        assert len(engine.aborted) == 1

    asyncio.run(main())


def test_a_cancelled_submit_leaves_nothing_behind(worker: Worker, engine: Counting) -> None:
    engine.gate = threading.Semaphore(0)

    async def main() -> None:
        running = await worker.submit([[1]], params(2))  # from here on the thread waits in a step
        task = asyncio.create_task(worker.submit([[2]], params(100)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.gate.release(1000)
        assert len(await numbers(running)) == 2
        await worker.call(lambda engine: None)
        assert engine.requests == []

    asyncio.run(main())
    assert worker.in_flight == 0


def test_a_failed_step_fails_its_requests_and_not_the_worker(worker: Worker, engine: Counting) -> None:
    async def main() -> None:
        engine.gate = threading.Semaphore(0)
        handle = await worker.submit([[1]], params())
        engine.fault = RuntimeError("out of memory")
        engine.gate.release(1000)
        with pytest.raises(EngineFailed):
            await numbers(handle)
        assert len(engine.aborted) == 1
        assert len(await numbers(await worker.submit([[2]], params()))) == 3

    asyncio.run(main())
    assert worker.healthy


def test_a_request_that_fails_fails_alone(worker: Worker, engine: Counting) -> None:
    engine.bad = {13}

    async def main() -> None:
        bad, good = await worker.submit([[13]], params()), await worker.submit([[1]], params())
        with pytest.raises(EngineFailed):
            await numbers(bad)
        assert len(await numbers(good)) == 3

    asyncio.run(main())


def test_a_request_ends_with_its_time(engine: Counting) -> None:
    worker = Worker(engine, Limits(request_timeout=0))  # type: ignore[arg-type]
    worker.start()

    async def main() -> None:
        with pytest.raises(RequestTimeout, match="within 0 seconds"):
            await numbers(await worker.submit([[1]], params(10**9)))

    asyncio.run(main())
    assert engine.requests == []
    worker.stop()


def test_call_runs_between_steps_and_returns_or_raises(worker: Worker) -> None:
    async def main() -> None:
        assert await worker.call(lambda engine: threading.get_ident()) == worker._thread.ident
        with pytest.raises(ZeroDivisionError):
            await worker.call(lambda engine: 1 // 0)

    asyncio.run(main())
    assert worker.healthy


def test_drain_lets_running_requests_finish(worker: Worker, engine: Counting) -> None:
    async def main() -> None:
        engine.gate = threading.Semaphore(0)
        handle = await worker.submit([[1]], params(5))
        drained = asyncio.create_task(worker.drain(grace=30))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await worker.submit([[2]], params())
        assert not worker.healthy
        engine.gate.release(1000)
        assert len(await numbers(handle)) == 5
        await drained

    asyncio.run(main())


def test_drain_ends_what_takes_too_long(worker: Worker, engine: Counting) -> None:
    async def main() -> None:
        handle = await worker.submit([[1]], params(10**9))
        await worker.drain(grace=0)
        with pytest.raises(Draining):
            await numbers(handle)
        assert engine.requests == []

    asyncio.run(main())


def test_stop_ends_everything_and_is_final(engine: Counting) -> None:
    worker = Worker(engine)  # type: ignore[arg-type]
    worker.start()

    async def main() -> None:
        handle = await worker.submit([[1]], params(10**9))
        await asyncio.to_thread(worker.stop)
        with pytest.raises(Draining):
            await numbers(handle)
        with pytest.raises(Draining):
            await worker.submit([[1]], params())
        with pytest.raises(Draining):
            await worker.call(lambda engine: None)
        handle.abort()

    asyncio.run(main())
    assert engine.requests == []


def test_a_closed_loop_does_not_hurt(worker: Worker, engine: Counting) -> None:
    """Who asked is gone with its loop: the answers go nowhere, and the next one is served."""

    async def leave() -> None:
        await worker.submit([[1]], params(50))

    asyncio.run(leave())

    async def main() -> None:
        assert len(await numbers(await worker.submit([[2]], params()))) == 3

    asyncio.run(main())
    assert worker._wait_idle(30)
