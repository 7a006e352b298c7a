"""How do I talk to it in a browser? Starts the server and the chat page, and stops both."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

from groundup.errors import UserError
from groundup.serve.page_style import THEME

GRACE = 15.0  # seconds a child has to end by itself


def ui(
    directory: str | Path | None,
    *,
    url: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8501,
    adapters: Sequence[str] = (),
) -> None:
    """Serve the chat page at http://host:port until Ctrl-C or SIGTERM.

    directory: a model folder; `groundup serve` runs it on a free local port, with `adapters` as NAME=PATH.
    url: the base URL of a running OpenAI-compatible server instead; its key is taken from OPENAI_API_KEY.
    Raises UserError on a missing package, a port in use, or neither or both of directory and url.
    """
    for name in ("streamlit", "openai"):
        if importlib.util.find_spec(name) is None:
            raise UserError("groundup ui", f"{name} is not installed", 'pip install "groundup[ui]"')
    if (directory is None) == (url is None):
        raise UserError("groundup ui", "wants a model folder or --url, one of the two", "e.g. groundup ui out/run")
    if url is not None and adapters:
        raise UserError("--adapter", "belongs to a folder, not to --url", "give it to the server at that URL")
    _check_port(host, port)
    children: list[subprocess.Popen[bytes]] = []
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        if directory is not None:
            url, key = _start_server(directory, adapters, children)
        else:
            url, key = _base(url or ""), os.environ.get("OPENAI_API_KEY", "none")
        address = _start_page(url, key, host, port, children)
        print(f"chat page: {address} (Ctrl-C stops it)", flush=True)
        _watch(children)
    except KeyboardInterrupt:
        print("stopping", file=sys.stderr, flush=True)
    finally:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second signal must not leave a child behind
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _stop(children)
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


def _leave(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"{host}:{port}", f"cannot be used ({error.strerror})", "choose another --port") from None


def _base(url: str) -> str:
    """http://host:8000 means its API, which lies under /v1."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError("--url", f"{url} is no address", "e.g. http://127.0.0.1:8000/v1")
    return url if urlsplit(url).path.strip("/") else url.rstrip("/") + "/v1"


def _start_server(
    directory: str | Path, adapters: Sequence[str], children: list[subprocess.Popen[bytes]]
) -> tuple[str, str]:
    """`groundup serve` on a free port; returns its base URL and its key once it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = secrets.token_urlsafe(24)  # it answers this page only, not the other users of the machine
    command = [sys.executable, "-m", "groundup.cli", "serve", str(directory), "--host=127.0.0.1", f"--port={port}"]
    command += [f"--adapter={adapter}" for adapter in adapters]
    _start(command, os.environ | {"GROUNDUP_API_KEY": key}, children)
    _wait(f"http://127.0.0.1:{port}/health", children)
    return f"http://127.0.0.1:{port}/v1", key


def _start_page(url: str, key: str, host: str, port: int, children: list[subprocess.Popen[bytes]]) -> str:
    """Streamlit on the page; returns its address once it answers."""
    options = {
        "server.address": host,
        "server.port": str(port),
        "server.headless": "true",  # no browser is opened, no e-mail address asked for
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "runner.fastReruns": "false",  # a click breaks in as a rerun; a stop then means that the tab is gone (page.py)
        **THEME,
    }
    page = Path(__file__).with_name("page.py")
    command = [sys.executable, "-m", "streamlit", "run", str(page)]
    command += [f"--{name}={value}" for name, value in options.items()]
    # A proxy meant for the internet would swallow the calls to a server on this machine.
    direct = ",".join(filter(None, ["127.0.0.1,localhost", os.environ.get("NO_PROXY") or os.environ.get("no_proxy")]))
    environment = os.environ | {"GROUNDUP_UI_URL": url, "OPENAI_API_KEY": key, "NO_PROXY": direct, "no_proxy": direct}
    _start(command, environment, children, quiet=True)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}"
    _wait(f"{address}/_stcore/health", children)
    return address


def _start(
    command: list[str], environment: dict[str, str], children: list[subprocess.Popen[bytes]], quiet: bool = False
) -> None:
    """In a group of its own: Ctrl-C in the terminal reaches this process only, which ends the others in order."""
    out = subprocess.DEVNULL if quiet else None
    children.append(subprocess.Popen(command, env=environment, stdout=out, start_new_session=True))


def _wait(url: str, children: list[subprocess.Popen[bytes]]) -> None:
    """Until the address answers. A child that ends meanwhile has said why on stderr."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        _check(children)
        try:
            with direct.open(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)


def _watch(children: list[subprocess.Popen[bytes]]) -> None:
    while True:
        _check(children)
        time.sleep(0.3)


def _check(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is not None:
            raise SystemExit(child.returncode if child.returncode > 0 else 1)


def _stop(children: list[subprocess.Popen[bytes]]) -> None:
    """The page first, then the server, which drains."""
    for child in reversed(children):
        child.terminate()
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
