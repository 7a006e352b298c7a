"""A plain HTTP client for JSON and server-sent events, and a server process to talk to. Only the standard library."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from bench.measure import ROOT, ProgramFailed

PATIENCE = 600.0  # seconds without a byte


class Refused(Exception):
    """An answer that is no 200: (status, body)."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body[:300]}")
        self.status, self.body = status, body


class Call:
    """One request under way; `close` hangs up at once."""

    def __init__(self, address: tuple[str, int], method: str, path: str, body: bytes | None = None) -> None:
        self.line = http.client.HTTPConnection(*address, timeout=PATIENCE)
        self.line.connect()
        self.line.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.line.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})

    def read(self) -> tuple[int, str, dict[str, str]]:
        """(status, body, headers) of the whole answer."""
        answer = self.line.getresponse()
        text = answer.read().decode("utf-8", "replace")
        self.close()
        return answer.status, text, {key.lower(): value for key, value in answer.getheaders()}

    def events(self) -> Iterator[str]:
        """The data of each event, as it comes. Refused where the status is no 200."""
        answer = self.line.getresponse()
        if answer.status != 200:
            raise Refused(answer.status, answer.read().decode("utf-8", "replace"))
        for line in answer:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8")
        self.close()

    def close(self) -> None:
        if self.line.sock is not None:
            self.line.sock.close()
        self.line.close()


def post(address: tuple[str, int], path: str, body: Any) -> Call:
    """Send a JSON body (or bytes as they are)."""
    return Call(address, "POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())


def get(address: tuple[str, int], path: str) -> tuple[int, str]:
    status, text, _ = Call(address, "GET", path).read()
    return status, text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def at_once(requests: int, work: Callable[[int], None]) -> None:
    """work(0), work(1), ... in a thread each; the first exception is raised."""
    with ThreadPoolExecutor(requests) as pool:
        for done in [pool.submit(work, place) for place in range(requests)]:
            done.result()


class ServerProcess:
    """A server in a process of its own, up and answering /health. line: its command; it listens on `port`."""

    def __init__(self, line: Sequence[str], port: int, env: dict[str, str] | None = None) -> None:
        self.address = ("127.0.0.1", port)
        quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(line, cwd=ROOT, stdout=2, env={**os.environ, **quiet, **(env or {})})
        self._wait()

    def _wait(self, seconds: float = 180.0) -> None:
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            with suppress(OSError):
                if get(self.address, "/health")[0] == 200:
                    return
            time.sleep(0.1)
        self.stop()
        raise ProgramFailed("the server did not come up; its words are on stderr")

    def stop(self) -> int:
        """Ask it to end, and its exit status; kill it where it does not."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
