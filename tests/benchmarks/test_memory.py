"""What a call is said to take of memory, against blocks of known size."""

import ctypes

import pytest
import torch

from benchmarks import memory

CPU = torch.device("cpu")


def test_a_peak_sees_what_is_freed_again_and_what_is_not_a_tensors():
    if memory.peak(lambda: None, CPU) is None:
        pytest.skip("no /proc/self/clear_refs")
    numel = 64 * memory.MIB // 4
    assert memory.peak(lambda: None, CPU) < 4
    assert memory.peak(lambda: torch.ones(numel), CPU) == pytest.approx(64, abs=8)
    assert memory.peak(lambda: torch.ones(numel).add(1).sum(), CPU) == pytest.approx(128, abs=8)
    assert memory.peak(lambda: len(b"x" * (64 * memory.MIB)), CPU) == pytest.approx(64, abs=8)


def test_a_peak_is_the_calls_whatever_holes_the_heap_has():
    def call():
        for size in (5, 3, 9, 7, 4):  # MiB
            held = [torch.ones(size * memory.MIB // 4) for _ in range(8)]
            del held[::2]
            del held

    call()
    if memory.peak(call, CPU) is None or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("no /proc/self/clear_refs, or no glibc that says what is free in its heap")
    for _ in range(4):
        assert memory.peak(call, CPU) == pytest.approx(72, abs=6)
        for _ in range(4):
            call()
