"""How much memory a call takes."""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

MIB = 2**20

# What mallopt calls them in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def peak(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that a call takes at its peak on top of what was there before it, its results included.

    On a CUDA device: torch's allocator, where every kernel of ours gets its memory. On the CPU: the resident memory of
    the process (its high-water mark, reset through /proc/self/clear_refs), so the working memory of native code and
    of any library counts as tensors do. Resident memory comes in pages, and the C library keeps small blocks that were
    freed: trust it from tens of MiB up. None where the system has no such file.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        highest = torch.cuda.max_memory_allocated(device)
    else:
        with _freed_blocks_are_given_back():
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                return None
            before = _high_water_mark()
            result = call()
            highest = _high_water_mark()
    del result
    return (highest - before) / MIB


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2: ten sizes, of which these are the bytes of the heap that are free."""

    _fields_ = [("_before", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("_after", ctypes.c_size_t)]


@contextlib.contextmanager
def _freed_blocks_are_given_back() -> Iterator[None]:
    """Within, glibc's malloc maps every block of a MiB or more for itself: freed, it is resident no longer.

    By itself glibc keeps blocks of up to 32 MiB in a heap once it has freed one, and what a call takes then depends on
    the holes that earlier calls left there; so those are taken out of use first. Afterwards malloc's two thresholds are
    what they grow to in such a process.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError):  # another C library
        yield
        return
    malloc_trim(0)
    mallopt(_M_MMAP_THRESHOLD, MIB)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    # Once the holes are gone a block is mapped, and wasted but for its addresses: of each only one page is written.
    holes = [libc.malloc(MIB) for _ in range(_free_bytes(libc) // MIB)]
    try:
        yield
    finally:
        for hole in holes:
            libc.free(hole)
        mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        mallopt(_M_TRIM_THRESHOLD, 64 * MIB)


def _free_bytes(libc: ctypes.CDLL) -> int:
    """Of the heap; 0 where glibc is older than 2.33 and does not say."""
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _Mallinfo2
    return int(libc.mallinfo2().fordblks)


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")
