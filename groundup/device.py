"""What machine is this? Device, number types, threads, the measured matrix-product peak, and when compiling pays."""

from __future__ import annotations

import functools
import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from groundup.errors import UserError

if TYPE_CHECKING:
    import torch


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU; under torchrun each rank takes the card of its LOCAL_RANK."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError("train.device", f"{name!r} is no device", "use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.device", "this torch sees no CUDA device", "use train.device=cpu, or install a CUDA build of torch"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type of a setting (fp32, bf16, fp16). `auto`: bf16 on a GPU that has it, else fp16; fp32 on a CPU.

    On a CPU bf16 products are ten times slower than fp32 without AMX or AVX512-BF16, so it must be asked for there.
    """
    import torch

    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("train.dtype", "fp16 training needs a GPU", "use train.dtype=fp32 or bf16")
    return dtype


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision around forward and loss; nothing at all for fp32."""
    import torch

    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def set_threads(threads: int | None = None) -> int:
    """Use `threads` CPU threads (default: OMP_NUM_THREADS if set, else physical cores) and return the number."""
    import torch

    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        import psutil

        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, min(psutil.cpu_count(logical=False) or affinity, affinity))
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


@functools.lru_cache(maxsize=1)
def keep_memory() -> bool:
    """Tell glibc to keep freed memory for the next step instead of giving it back; True where that worked.

    By default every tensor over 32 MB is mapped afresh and faulted in page by page at each step, which costs a tenth of
    a CPU training step. Peak memory stays what it was; it is only not returned in between.
    """
    import ctypes

    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):  # another C library: nothing to set
        return False


def share_arenas() -> None:
    """Let all threads allocate from two pools: glibc gives each its own, and none returns what the others could use."""
    import ctypes

    m_arena_max = -8  # malloc.h
    try:
        ctypes.CDLL("libc.so.6").mallopt(m_arena_max, 2)
    except (OSError, AttributeError):  # another C library
        return


def return_memory() -> None:
    """Give memory that was freed back to the system now, where the C library keeps it (glibc does)."""
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def use_huge_pages(tensor: torch.Tensor) -> bool:
    """Put a large tensor on 2 MB pages, now and in place; True where the system (Linux from 6.1) did.

    A matrix that is read from end to end for every token costs a tenth less time so: fewer addresses to translate.
    """
    import ctypes

    madv_collapse, huge = 25, 2**21  # mman.h
    if tensor.device.type != "cpu":
        return False
    start = -(-tensor.data_ptr() // huge) * huge  # whole pages inside
    size = (tensor.data_ptr() + tensor.nbytes - start) // huge * huge
    try:
        return (
            size > 0
            and ctypes.CDLL("libc.so.6").madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), madv_collapse) == 0
        )
    except (OSError, AttributeError):  # another C library
        return False


@functools.lru_cache(maxsize=8)
def peak_flops(device: str = "cpu", dtype_name: str = "fp32", seconds: float = 0.4, size: int | None = None) -> float:
    """The matrix-product rate this machine reaches now, in FLOP/s: the best of repeated square products.

    Measured, not looked up: shares of peak are then shares of what this machine, as busy as it is, can do.
    """
    import torch

    where = torch.device(device)
    dtype = pick_dtype(dtype_name, where)
    n = size or (1024 if where.type == "cpu" else 8192)
    a, b = (torch.randn(n, n, device=where).to(dtype) for _ in range(2))
    sync = torch.cuda.synchronize if where.type == "cuda" else (lambda: None)
    a @ b
    sync()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        sync()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


@dataclass(frozen=True)
class CompilePolicy:
    """Whether to compile the blocks, and the reason, which the run prints."""

    on: bool
    reason: str


def compile_policy(setting: str, device: torch.device) -> CompilePolicy:
    """`off` and `blocks` are obeyed; `auto` compiles on a GPU only.

    On a CPU the model has fused operators of its own (model/fast.py), which a compiled block cannot use. Compiling
    plain blocks costs half a minute and gained nothing over plain eager ones at 5M parameters.
    """
    if setting == "off":
        return CompilePolicy(False, "train.compile=off")
    if device.type == "cpu":
        if setting == "auto":
            return CompilePolicy(False, "the CPU path is fused by hand")
        compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
        if compiler is None:
            fix = "install g++ or clang++, or use train.compile=off"
            raise UserError("train.compile", "no C++ compiler on this machine", fix)
    return CompilePolicy(True, "a GPU run" if setting == "auto" else "train.compile=blocks")


def describe() -> dict[str, object]:
    """This machine in a few words and figures, for reports."""
    import platform

    import psutil
    import torch

    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": str(device),
        "name": name,
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    import platform
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
