"""The process in which a program is run: it takes its limits, then the program, then its tests, and tells the result.

Standard input is a file: a line of JSON (the job), then the tests as another line, or the program's own input. The
program is run before its tests are read, and each result carries a word that came with them: a program that ends early,
prints what it likes or closes its output has not passed.
"""

import sys

import locks

sys.path.pop(0)  # this folder
sys.dont_write_bytecode = True

import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
from contextlib import suppress  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

MB = 2**20
READABLE = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/random",
    "/dev/urandom", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu",
)  # fmt: skip


def main() -> None:
    job: dict[str, Any] = json.loads(_line(0))
    if job["mode"] == "program":
        _lock(job)
        _run_program(job["program"])
    nothing = os.open(os.devnull, os.O_RDWR)
    tests, results = os.dup(0), os.dup(1)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    _run_tests(job["program"], tests, results, _lock(job))


def _lock(job: dict[str, Any]) -> str:
    """Take the limits of the job; what holds beside them: kernel or python, and folders where reading is limited."""
    limits = [
        (resource.RLIMIT_CPU, job["cpu_seconds"]), (resource.RLIMIT_AS, job["memory_mb"] * MB),
        (resource.RLIMIT_FSIZE, job["disk_mb"] * MB), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 256),
    ]  # fmt: skip
    for limit, most in limits:
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with suppress(*([] if sys.platform == "linux" else [ValueError])):  # macOS takes no limit of address space
            resource.setrlimit(limit, (most, most))
    held = []
    if job["locks"] == "kernel":
        locks.give_up_rights()
        folders = {sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), *READABLE}  # noqa: PTH120  # quick to start
        if locks.landlock(folders, job["folder"]):
            held.append("folders")
        if locks.seccomp(writing=job["folder"] is not None):
            return " ".join(["kernel", *held])
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # root is not bound by it
    locks.audit()
    return " ".join(["python", *held])


def _run_program(program: str) -> NoReturn:
    """As if started by a person; the exit code says whether it came to its end."""
    sys.modules["__main__"] = module = ModuleType("__main__")
    problem = _execute(program, module, may_exit=True)
    sys.exit(1 if problem else 0)


def _run_tests(program: str, tests: int, results: int, held: str) -> NoReturn:
    """A line for the locks, then one a test: word, number of the test, 1 or 0, what went wrong."""
    write, end = os.write, os._exit
    sys.modules["answer"] = module = ModuleType("answer")
    broken = _execute(program, module, may_exit=True)
    given = json.loads(_line(tests))
    word = given["word"]
    write(results, f"{word} locks 1 {held}\n".encode())
    for number, test in enumerate(given["tests"]):
        problem = broken or _execute(test, module, may_exit=False)
        write(results, f"{word} {number} {int(not problem)} {problem}\n".encode(errors="replace"))
    end(0)


def _execute(source: str, module: ModuleType, may_exit: bool) -> str:
    """What went wrong, in a line; "" where nothing did."""
    try:
        exec(compile(source, "<answer>", "exec"), module.__dict__)
    except SystemExit as stop:
        return "" if may_exit and not stop.code else f"ended itself ({stop.code})"
    except BaseException as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return ""


def _line(handle: int) -> bytes:
    """The next line of a file; what comes behind it can be read by others."""
    start, line = os.lseek(handle, 0, os.SEEK_CUR), b""
    while b"\n" not in line and (piece := os.read(handle, 1 << 16)):
        line += piece
    line = line.partition(b"\n")[0]
    os.lseek(handle, start + len(line) + 1, os.SEEK_SET)
    return line


main()
