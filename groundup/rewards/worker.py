"""How is somebody else's function called without risk? In a process of its own, which may raise, hang or die.

A thread would not do: a regular expression that never ends holds the interpreter, and nothing can stop it from within.
The process is a fresh interpreter that imports the file once and then answers calls on its pipe, so a function may keep
what it loaded. It ends when the pipe closes, and with its parent, however that ended: at once, or, where a call holds
the interpreter, when the call's time is up. What it prints goes to standard error.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

START_SECONDS = 300.0  # to import a file, which may load a model
GRACE = 2.0  # seconds by which a process outlives a call that its parent should have ended


class CallError(Exception):
    """A call that gave no answer. kind: raised, hung, died or missing. detail: its traceback."""

    def __init__(self, kind: str, why: str, detail: str = "") -> None:
        super().__init__(why)
        self.kind, self.detail = kind, detail


class Worker:
    """The function `name` of `file`, in a process. about: its signature and docstring, as `describe` gives them."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file.resolve(), name
        self.process: subprocess.Popen[bytes] | None = None
        self.about: dict[str, Any] = {}
        self._start()

    def __call__(self, seconds: float, *args: Any, **kwargs: Any) -> Any:
        """What the function returns, as plain values. CallError: it raised, took longer than `seconds`, or died."""
        if self.process is None:
            self._start()
        try:
            return self._ask((args, kwargs), seconds)
        except CallError as error:
            if error.kind != "raised":
                self.close()
            raise

    def close(self) -> None:
        """End the process; a later call starts another."""
        if self.process is not None:
            assert self.process.stdin
            self.process.kill()
            with suppress(OSError):  # what it was never told
                self.process.stdin.close()
            self.process.wait()
            self.process = None

    def _start(self) -> None:
        package = Path(__file__).resolve().parents[2]
        path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from groundup.rewards.worker import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **os.environ, "PYTHONPATH": path},
        )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(self.process, self._answers), daemon=True).start()
        try:
            self.about = self._ask((str(self.file), self.name), START_SECONDS)
        except CallError:
            self.close()
            raise

    @staticmethod
    def _listen(process: subprocess.Popen[bytes], answers: queue.SimpleQueue[bytes]) -> None:
        assert process.stdout
        for line in process.stdout:
            answers.put(line)
        answers.put(b"")

    def _ask(self, message: Any, seconds: float) -> Any:
        assert self.process and self.process.stdin
        try:
            pickle.dump((seconds, message), self.process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise CallError("hung", f"gave no answer within {seconds:g} seconds") from None
        except BrokenPipeError:
            line = b""
        if not line:
            raise CallError("died", f"its process ended with code {self.process.wait()}")
        answer = json.loads(line)
        if "value" in answer:
            return answer["value"]
        raise CallError(answer["kind"], answer["why"], answer["detail"])


def plain(value: Any) -> Any:
    """Numbers, text and lists of them, as JSON has them; numbers of numpy and torch become Python's."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # arrays and tensors
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return float(value) if hasattr(value, "__float__") else repr(value)


def describe(function: Callable[..., Any]) -> dict[str, Any]:
    """Its parameters, as [name, kind, whether it has a default, annotation], and its docstring."""
    parameters = inspect.signature(function).parameters.values()
    about = [[p.name, p.kind.name, p.default is not p.empty, _spelled(p.annotation)] for p in parameters]
    return {"parameters": about, "doc": inspect.getdoc(function) or ""}


def _spelled(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def serve() -> None:
    """A child's life: import the file, then answer calls until the pipe closes."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # both may reach the whole group; the parent decides
        signal.signal(ignored, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a function prints must not end up among the answers
    function: Callable[..., Any] | None = None
    while True:
        try:
            seconds, message = pickle.load(calls)
        except EOFError:
            return
        # What holds the interpreter keeps `_end_with` from running, too; this clock needs no interpreter.
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=2)
        try:
            if function is None:
                function = load(Path(message[0]), message[1])
                value: Any = describe(function)
            else:
                value = plain(function(*message[0], **message[1]))
            answer = {"value": value}
        except CallError as error:
            answer = {"kind": error.kind, "why": str(error), "detail": error.detail}
        except BaseException as error:
            why = f"raised {type(error).__name__}: {error}"
            answer = {"kind": "raised", "why": why, "detail": traceback.format_exc()}
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def load(file: Path, name: str) -> Callable[..., Any]:
    """A function of a file. CallError "missing": the file has none of that name."""
    sys.path.insert(0, str(file.parent))  # its neighbours
    own = f"groundup_{file.stem}"  # a file may be called as a module of Python is
    spec = importlib.util.spec_from_file_location(own, file)
    if spec is None or spec.loader is None:
        raise CallError("missing", "is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise CallError("missing", f"has no function {name}; there is {', '.join(there) or 'none'}")
    return function


def _end_with(parent: int) -> None:
    """A call that hangs must not outlive the run that made it."""
    while os.getppid() == parent:
        threading.Event().wait(1.0)
    os._exit(1)
