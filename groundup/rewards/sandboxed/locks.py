"""How does a process give up what it may do, for good? For itself and for all that it starts, without special rights.

On Linux a seccomp filter makes the kernel refuse system calls: no network, no new processes, no signals to others, no
writing of files. Landlock leaves it some folders to read. Elsewhere an audit hook refuses the same from within Python,
which holds against mistakes, not against malice.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Iterable
from typing import Any

# System calls that are refused: name, number on x86-64, number of the generic table (aarch64, riscv64); - where absent.
NETWORK = """
socket 41 198, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242, sendmsg 46 211,
sendmmsg 307 269, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427
"""
PROCESSES = """
execve 59 221, execveat 322 281, fork 57 -, vfork 58 -, ptrace 101 117, process_vm_readv 310 270,
process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448, pidfd_open 434 434, pidfd_getfd 438 438,
pidfd_send_signal 424 424, tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, kcmp 312 272,
setrlimit 160 164, sched_setscheduler 144 119, sched_setattr 314 274, unshare 272 97, setns 308 268
"""
MEMORY = """
memfd_create 319 279, memfd_secret 447 447, shmget 29 194, shmat 30 196, shmctl 31 195, msgget 68 186, semget 64 190,
mq_open 240 180, mq_unlink 241 181, userfaultfd 323 282
"""
KERNEL = """
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, fsopen 430 430, fsconfig 431 431, fsmount 432 432,
fspick 433 433, move_mount 429 429, open_tree 428 428, mount_setattr 442 442, swapon 167 224, swapoff 168 225,
init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294,
bpf 321 280, perf_event_open 298 241, reboot 169 142, syslog 103 116, acct 163 89, settimeofday 164 170,
clock_settime 227 112, clock_adjtime 305 266, adjtimex 159 171, sethostname 170 161, setdomainname 171 162, iopl 172 -,
ioperm 173 -, quotactl 179 60, quotactl_fd 443 443, add_key 248 217, request_key 249 218, keyctl 250 219,
fanotify_init 300 262, open_by_handle_at 304 265, name_to_handle_at 303 264, vhangup 153 58
"""
ATTRIBUTES = """
chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -,
utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14,
lremovexattr 198 15, fremovexattr 199 16
"""
WRITING = """
unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -,
link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, mknod 133 -, mknodat 259 33, truncate 76 45, creat 85 -
"""
# Those that are looked at: the two numbers, -1 where absent.
OPEN, OPENAT, OPENAT2, CLONE, CLONE3 = (2, -1), (257, 56), (437, 437), (56, 220), (435, 435)
KILL, TGKILL, SENDTO, PRLIMIT = (62, 129), (234, 131), (44, 206), (302, 261)
NEWER = 451  # and above: unknown to this table, so the kernel is asked to say that it does not have them
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "riscv64": (0xC00000F3, 1)}  # audit.h; column above

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CLONE_THREAD = 0x10000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF, as linux/bpf_common.h spells it
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value


def _argument(number: int, high: bool = False) -> Instruction:
    return LOAD, 0, 0, 16 + 8 * number + 4 * high


def _refuse(code: int) -> Instruction:
    return RETURN, 0, 0, ERRNO | code


_ALLOW: Instruction = (RETURN, 0, 0, ALLOW)


def seccomp_program(architecture: int, column: int, pid: int, writing: bool) -> list[Instruction]:
    """The filter. writing: files may be written, as far as Landlock allows."""
    program: list[Instruction] = [
        (LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL_PROCESS), (LOAD, 0, 0, 0),
        (AT_LEAST, 0, 1, NEWER), _refuse(errno.ENOSYS),  # the x32 calls of x86-64, too: their numbers begin at 2**30
    ]  # fmt: skip

    def on(call: tuple[int, int], block: list[Instruction]) -> None:
        if call[column] >= 0:
            program.extend([(EQUAL, 0, len(block), call[column]), *block])

    groups = [(NETWORK, errno.EACCES), (PROCESSES, errno.EPERM), (MEMORY, errno.EPERM), (KERNEL, errno.EPERM),
              (ATTRIBUTES, errno.EPERM)]  # fmt: skip
    for calls, code in groups if writing else [*groups, (WRITING, errno.EROFS)]:
        for entry in calls.split(","):
            _, one, other = entry.replace(" -", " -1").split()
            on((int(one), int(other)), [_refuse(code)])
    # Threads are made by clone, too; clone3 hides its flags behind a pointer, and the C library does without it.
    on(CLONE, [_argument(0), (ANY_BIT, 0, 1, CLONE_THREAD), _ALLOW, _refuse(errno.EAGAIN)])
    on(CLONE3, [_refuse(errno.ENOSYS)])
    for call in (KILL, TGKILL):  # itself only
        on(call, [_argument(0), (EQUAL, 0, 1, pid), _ALLOW, _refuse(errno.EPERM)])
    # Limits may be read (no new one is given), and bytes sent to the other end of a pair, without an address.
    for call, place in ((PRLIMIT, 2), (SENDTO, 4)):
        on(call, [_argument(place), (EQUAL, 0, 2, 0), _argument(place, high=True), (EQUAL, 1, 0, 0),
                  _refuse(errno.EPERM), _ALLOW])  # fmt: skip
    if not writing:
        on(OPENAT2, [_refuse(errno.ENOSYS)])
        for call, place in ((OPEN, 1), (OPENAT, 2)):
            on(call, [_argument(place), (ANY_BIT, 0, 1, WRITE_FLAGS), _refuse(errno.EROFS), _ALLOW])
    return [*program, _ALLOW]


def seccomp(writing: bool) -> bool:
    """Install the filter; False where this system has none."""
    if sys.platform != "linux" or platform.machine() not in MACHINES or sys.maxsize < 2**32:  # 32 bits: other numbers
        return False
    program = seccomp_program(*MACHINES[platform.machine()], os.getpid(), writing)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    set_seccomp, mode_filter = 22, 2  # prctl.h, seccomp.h
    return _call("prctl", set_seccomp, mode_filter, header, 0, 0) == 0


def give_up_rights() -> None:
    """No process gains rights from here on, as a filter and Landlock ask for; root loses its own, too. Whoever started
    this process takes it along when it dies."""
    if sys.platform != "linux":
        return
    set_death_signal, set_no_new_privs, version_3 = 1, 38, 0x20080522  # prctl.h, capability.h
    _call("prctl", set_death_signal, signal.SIGKILL, 0, 0, 0)
    _call("prctl", set_no_new_privs, 1, 0, 0, 0)
    if os.geteuid() == 0:
        header = ctypes.create_string_buffer(struct.pack("Ii", version_3, 0))
        _call("capset", header, ctypes.create_string_buffer(24))


def landlock(readable: Iterable[str], writable: str | None) -> bool:
    """Leave only these files and folders to read, and one folder to write in; False: the kernel has no Landlock."""
    if sys.platform != "linux":
        return False
    create, add, restrict = 444, 445, 446  # on every architecture
    version = _call("syscall", create, 0, 0, 1)
    if version < 1:
        return False
    rights = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1  # of ABI 1, 2, 3, 4, 5
    attributes = ctypes.create_string_buffer(struct.pack("Q", rights))
    ruleset = _call("syscall", create, attributes, 8, 0)
    if ruleset < 0:
        return False
    read_file, read_folder, of_a_file = 1 << 2, 1 << 3, 0xC007  # landlock.h
    for path, allowed in [*((one, read_file | read_folder) for one in readable), (writable, rights)]:
        if path is None or not os.path.exists(path):  # noqa: PTH110  # this script stands alone, and starts quickly
            continue
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):  # noqa: PTH112
            allowed &= of_a_file
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed & rights, handle))
        _call("syscall", add, ruleset, 1, rule, 0)
        os.close(handle)
    return _call("syscall", restrict, ruleset, 0) == 0


REFUSED = (
    "socket.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "os.remove", "os.rename",
    "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr",
    "os.removexattr", "subprocess.", "pty.", "ctypes.", "shutil.", "resource.setrlimit", "resource.prlimit",
)  # fmt: skip


def audit() -> None:
    """Python's own refusal, where the kernel offers none."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(errno.EPERM, f"{event} is not allowed here")
        if event == "open" and len(arguments) == 3:
            mode, flags = arguments[1:]
            if any(letter in (mode or "") for letter in "wax+") or (isinstance(flags, int) and flags & WRITE_FLAGS):
                raise PermissionError(errno.EROFS, "files are read only here")

    sys.addaudithook(hook)


def _call(function: str, *values: Any) -> int:
    """A function of the C library; numbers as wide as the kernel takes them."""
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in values]
    return getattr(ctypes.CDLL(None), function)(*wide)
