"""Programs that attack: each must lose, in time, and leave nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from groundup.errors import UserError
from groundup.rewards import sandbox
from groundup.rewards.code import code, find_program
from groundup.rewards.sandbox import Limits, check_locks, run_program, run_tests

SHORT = Limits(seconds=0.4)
PYTHON = Limits(seconds=0.4, locks="python")
kernel = pytest.mark.skipif(not check_locks().startswith("kernel"), reason="this system has no seccomp")
folders = pytest.mark.skipif("folders" not in check_locks(), reason="this kernel has no Landlock")
both = pytest.mark.parametrize("limits", [pytest.param(SHORT, marks=kernel), PYTHON], ids=["kernel", "python"])


# Says to every open file that it has passed, and ends.
LIAR = """
import os
for handle in range(3, 20):
    try: os.write(handle, b"0123456789abcdef 0 1 \\n")
    except OSError: pass
os._exit(0)
"""


def refused(program: str, limits: Limits = SHORT) -> str:
    """Why the program did not pass a test that it cannot fail."""
    outcome = run_tests(program, ["pass"], limits)
    assert outcome.passed == [False]
    return outcome.why


def test_a_program_and_its_tests() -> None:
    outcome = run_tests("def f(x): return x + 1", ["assert f(1) == 2", "assert f(1) == 3", "assert f(2) == 3"])
    assert outcome.passed == [True, False, True]
    assert outcome.why == "AssertionError:"
    assert run_program("print(int(input()) * 2)", "21\n").output == "42\n"
    assert run_program("print(1); raise SystemExit(3)", "").passed == [False]
    assert run_program("import sys; print(sys.stdin.read())", "é" * 10).output == "é" * 10 + "\n"


def test_what_honest_programs_use_is_there() -> None:
    program = """
import asyncio, collections, dataclasses, decimal, functools, heapq, itertools, math, random, re, string, threading
import numpy
@dataclasses.dataclass
class Point:
    x: int
async def later(): return await asyncio.sleep(0, 5)
thread = threading.Thread(target=print); thread.start(); thread.join()
print("noise that nobody sees")
if __name__ == "__main__":
    input()
"""
    tests = ["assert Point(3).x == 3", "assert asyncio.run(later()) == 5", "assert numpy.ones(3).sum() == 3"]
    outcome = run_tests(program, tests, Limits(seconds=5))
    assert outcome.passed == [True] * 3, outcome.why


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(100)", "__import__('re').match('(a+)+b', 'a' * 60)"]
)
def test_what_hangs_is_ended(program: str) -> None:
    started = time.perf_counter()
    refused(program, Limits(seconds=0.2))
    assert time.perf_counter() - started < 8  # the limit is 1.4 seconds; the machine may be busy


@both
@pytest.mark.parametrize(
    "program",
    ["import os\nwhile True: os.fork()", "import subprocess; subprocess.run(['true'])",
     "import os; assert os.system('true') == 0", "import multiprocessing as m; m.Process(target=print).start()",
     "import os; os.execv('/bin/true', ['true'])", "import os; os.posix_spawn('/bin/true', ['true'], {})"],
)  # fmt: skip
def test_no_other_process(program: str, limits: Limits) -> None:
    why = refused(program, limits)
    assert "Error" in why or "Resource" in why


@kernel
def test_a_fork_bomb_through_the_c_library_has_no_children() -> None:
    program = "import ctypes\nc = ctypes.CDLL(None)\nassert c.fork() != 0\nassert c.fork() == -1 and c.vfork() == -1"
    assert run_tests(program, ["pass"], SHORT).passed == [True]


def test_memory_ends() -> None:
    assert "MemoryError" in refused("x = 'a' * 10**10")
    assert refused("x = []\nwhile True: x.append(bytearray(10**7))", Limits(seconds=2, memory_mb=128))
    refused("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()")


def test_output_ends() -> None:
    started = time.perf_counter()
    flood = run_program("while True: print('x' * 10**6)", "", Limits(seconds=5, output_kb=64))
    assert flood.passed == [False] and flood.why == "wrote more than 64 KB" and len(flood.output) == 64 * 1024
    assert time.perf_counter() - started < 8
    refused("while True: print('x' * 10**6)", Limits(seconds=0.2))  # of a program with tests nothing is kept


@both
def test_no_network(limits: Limits) -> None:
    """There is somebody to reach, and he is not reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "Error" in refused(f"import socket; socket.create_connection(('127.0.0.1', {port}))", limits)
        fetch = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)"
        assert "Error" in refused(fetch, limits)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


@both
def test_no_file_is_written_moved_or_removed(tmp_path: Path, limits: Limits) -> None:
    kept = tmp_path / "kept"
    kept.write_text("here")
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')", f"open({str(kept)!r}, 'w')", f"open({str(kept)!r}, 'a').write('x')",
        f"import os; os.remove({str(kept)!r})", f"import os; os.rename({str(kept)!r}, {str(tmp_path / 'new')!r})",
        f"import os; os.open({str(kept)!r}, os.O_WRONLY | os.O_TRUNC)",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import os; os.chmod({str(kept)!r}, 0)", f"import os; os.symlink('/', {str(tmp_path / 'new')!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})", "open('here', 'w')",
        f"import os; os.truncate({str(kept)!r}, 0)", f"import os; os.utime({str(kept)!r}, (0, 0))",
    ):  # fmt: skip
        assert "Error" in refused(program, limits), program
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "here"


@folders
def test_files_of_others_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "answers.txt"
    secret.write_text("42")
    assert "Permission" in refused(f"open({str(secret)!r}).read()")
    assert "Permission" in refused(f"import os; os.listdir({str(tmp_path)!r})")
    assert "Permission" in refused("open('/etc/passwd').read()")
    assert "Permission" in refused("import os; open(f'/proc/{os.getppid()}/environ').read()")


@folders
def test_a_folder_of_its_own() -> None:
    limits = Limits(seconds=2, disk_mb=1)
    program = "open('a', 'w').write('x' * 1000)\nassert len(open('a').read()) == 1000\nimport os\nos.remove('a')"
    assert run_tests(program, ["pass"], limits).passed == [True]
    assert "too large" in refused("open('a', 'w').write('x' * 10**7)", limits)
    assert "Permission" in refused("open('/tmp/not-mine', 'w')", limits)
    assert not Path("/tmp/not-mine").exists()


@both
def test_no_signal_reaches_others(limits: Limits) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for target in (bystander.pid, os.getpid(), -1, 0):
            assert "Error" in refused(f"import os; os.kill({target}, 15)", limits)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@kernel
def test_the_kernel_refuses_what_python_cannot_see() -> None:
    """System calls by number: sockets, opening to write, raising limits, tracing, signals."""
    program = """
import ctypes, os, platform
c = ctypes.CDLL(None, use_errno=True)
x86 = platform.machine() == "x86_64"
def refused(*call):
    ctypes.set_errno(0)
    return c.syscall(*call) == -1 and ctypes.get_errno() in (1, 11, 13, 30, 38)
"""
    tests = [
        "assert refused(41 if x86 else 198, 2, 1, 0)",  # socket
        "assert refused(257 if x86 else 56, -100, b'/dev/null', os.O_WRONLY, 0)",  # openat
        "assert refused(437, -100, b'/dev/null', 0, 0)",  # openat2
        "assert refused(302 if x86 else 261, 0, 9, b'\\xff' * 16, 0)",  # prlimit64
        "assert refused(101 if x86 else 117, 16, os.getppid(), 0, 0)",  # ptrace
        "assert refused(62 if x86 else 129, os.getppid(), 0)",  # kill
        "assert refused(425, 1, b'\\0' * 120)",  # io_uring_setup
        "assert refused(272 if x86 else 97, 0x10000000)",  # unshare: a new user namespace
        "assert refused(435, b'\\0' * 88, 88)",  # clone3
        "assert refused(463, 0) and refused(10**6, 0)",  # newer than the filter
        "assert not x86 or refused(0x40000000 + 41, 2, 1, 0)",  # socket, the x32 way
    ]
    outcome = run_tests(program, tests, Limits(seconds=2))
    assert outcome.passed == [True] * len(tests), outcome.why


def test_ending_early_or_lying_is_not_passing() -> None:
    for program in (
        "import os; os._exit(0)",
        "print('passed'); import os; os.write(1, b'x 0 1 \\n'); os._exit(0)",
        LIAR,
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
        "raise SystemExit(1)",
        "def f(: pass",
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    ):
        refused(program, Limits(seconds=0.3))
    assert run_tests("import sys; sys.exit(0)", ["assert 1"], SHORT).passed == [True]  # it had come to its end
    assert run_tests("", ["raise SystemExit(0)"], SHORT).passed == [False]


def test_nothing_is_left_behind() -> None:
    """No child, no thread, no open file, whatever the programs did."""
    process = psutil.Process()
    before = process.num_fds(), threading.active_count(), process.children()
    for program in ("while True: pass", "import os; os.close(0); os.close(1); os.close(2)\nwhile True: pass"):
        refused(program, Limits(seconds=0.2))
    assert (process.num_fds(), threading.active_count(), process.children()) == before


def reward(text: str, question: str = "?", **columns: Any) -> float | None:
    prompts = [[{"role": "user", "content": question}]]
    settings = {name: columns.pop(name) for name in ("partial", "seconds", "disk_mb") if name in columns}
    (score,) = code(prompts, [text], **{name: [value] for name, value in columns.items()}, **settings)
    return score


def test_the_reward_reads_every_kind_of_tests() -> None:
    right, wrong = (
        "```python\ndef add(a, b):\n    return a + b\n```",
        "```python\ndef add(a, b):\n    return a - b\n```",
    )
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    assert [reward(text, tests=tests) for text in (right, wrong)] == [1, 0]
    assert reward(wrong, tests=tests, partial=True) == 0.5
    assert reward(right, test_list=tests, test_setup_code="import math") == 1
    asked = 'from typing import List\n\ndef total(xs: List[int]) -> int:\n    """Their sum."""\n'
    check = "def check(candidate):\n    assert candidate([1, 2]) == 3\n"
    human_eval = {"test": check, "entry_point": "total", "question": asked}
    assert reward("    return sum(xs)", **human_eval) == 1
    assert reward("```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```", **human_eval) == 1
    assert reward("    return 0", **human_eval) == 0
    double = "```py\nprint(int(input()) * 2)\n```"
    assert reward(double, tests=[{"input": "4\n", "output": "8"}, {"input": "5", "output": "10\n"}]) == 1
    assert reward(double, input_output='{"inputs": ["1", "2"], "outputs": ["2", "5"]}', partial=True) == 0.5
    assert reward(double, tests=None) is None and reward(double) is None


def test_the_program_is_found() -> None:
    text = "<think>```python\nbad\n```</think>First:\n```bash\nls\n```\nthen\n```python\ngood\n```\nDone."
    assert find_program(text, "", None) == "good\n"
    assert find_program("```\ncut off", "", None) == "cut off"
    assert find_program("<answer>x = 1</answer>", "", None) == "x = 1"
    assert find_program("x = 1", "", None) == "x = 1"


def test_a_weak_machine_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    weak = sandbox.Outcome([True], locks="python")
    monkeypatch.setattr(sandbox, "run_tests", lambda program, tests, limits=None: weak)
    check_locks.cache_clear()
    try:
        for _ in range(2):
            check_locks()
        assert caplog.text.count("audit hook alone") == 1
        with pytest.raises(UserError, match="Landlock"):
            check_locks(writing=True)
    finally:
        check_locks.cache_clear()


def test_limits_out_of_range() -> None:
    with pytest.raises(ValueError, match="memory_mb"):
        Limits(memory_mb=1)
