"""How does a run stop when it is told to? It finishes the step, saves, and leaves with the signal's exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """A run that was told to stop and has saved. Exit code 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(128 + signum)


class StopSignals:
    """While open, Ctrl-C and SIGTERM are only noted in `signum`; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # only there may Python set handlers
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == self.signum == signal.SIGINT:
            os._exit(128 + signum)
        if not self.signum:
            sys.stderr.write("\nfinishing this step, then saving; Ctrl-C twice leaves at once\n")
        self.signum = signum
