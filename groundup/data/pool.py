"""How is work spread over processes? Children answer pickled tasks on their pipes, results come in the tasks' order.

Not multiprocessing: its spawn imports the caller's main module again (which breaks scripts without a guard, notebooks
and `python -`), its fork copies threads and a CUDA context in the middle of their work, and its Pool waits for ever
when a child is killed. Here a child is a fresh interpreter that imports this file, ends when its pipe closes (so it
cannot outlive us), and a dead one is an error at once.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from groundup.errors import UserError

AHEAD = 4  # tasks a worker may be ahead of the slowest one, so that nobody waits on a busy machine

Function = Callable[[Any], Any]


def map_in_order(make: Callable[[], Function], tasks: Iterable[Any], workers: int) -> Generator[Any]:
    """Results of make()(task) for each task, in order; make is pickled and runs once in each of `workers` processes.

    workers 0 does the work here, without a process. At most AHEAD x workers tasks are under way, so memory stays flat
    however slowly the results are taken. An exception in a child is raised here as a UserError. Children end when the
    iterator is exhausted or closed.
    """
    if not workers:
        yield from map(make(), tasks)
        return
    children = [_start() for _ in range(workers)]
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    threads = ThreadPoolExecutor(workers, thread_name_prefix="pool")
    pending: deque[Future[Any]] = deque()
    try:
        for child in children:
            _send(child, make)
            idle.put(child)
        for task in tasks:
            pending.append(threads.submit(_ask, idle, task))
            if len(pending) >= AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for child in children:
            child.kill()  # first: a thread that waits for an answer wakes up on the closed pipe
        threads.shutdown(wait=True, cancel_futures=True)
        for child in children:
            child.communicate()


def _start() -> subprocess.Popen[bytes]:
    package = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    one_thread = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", "from groundup.data.pool import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **one_thread, "PYTHONPATH": path},
    )


def _send(child: subprocess.Popen[bytes], message: Any) -> None:
    assert child.stdin
    try:
        pickle.dump(message, child.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        child.stdin.flush()
    except BrokenPipeError:
        raise _dead(child) from None


def _dead(child: subprocess.Popen[bytes]) -> UserError:
    code = child.wait()
    why = f"died with code {code}" + (" (killed, perhaps out of memory)" if code == -signal.SIGKILL else "")
    return UserError("a worker process", why, "try again with fewer workers")


def _ask(idle: queue.SimpleQueue[subprocess.Popen[bytes]], task: Any) -> Any:
    child = idle.get()
    try:
        _send(child, task)
        assert child.stdout
        good, answer = pickle.load(child.stdout)
    except (EOFError, pickle.UnpicklingError):
        raise _dead(child) from None
    finally:
        idle.put(child)
    if not good:
        raise UserError(*answer)
    return answer


def serve() -> None:
    """A child's life: receive the function's maker, then answer tasks until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    tasks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    function: Function | None = None
    while True:
        try:
            message = pickle.load(tasks)
        except EOFError:
            return
        try:
            if function is None:
                function = message()
                continue
            answer = (True, function(message))
        except UserError as error:
            answer = (False, (error.where, error.why, error.fix))
        except Exception:  # not every exception survives pickling; its traceback does
            answer = (False, ("a worker process", traceback.format_exc(), "this is a bug, please report it"))
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()
