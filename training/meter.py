"""How fast a stage goes: rates, waiting and memory between two readings, against the device's peak."""

import functools
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

READINGS = ("bytes_per_second", "bytes_per_second_per_device", "data_wait", "mfu", "peak_memory_bytes")

_PROC = Path("/proc/self")

# Names as torch.cuda.get_device_name gives them, whole, and the vendor's bf16 and fp16 rates in TFLOP/s: dense (half of
# what data sheets state with sparsity), accumulated in fp32. A name that stands for several chips, or for a slice of
# one (MIG), is left to be measured.
_PUBLISHED = (
    (r"A[18]00(-\w+-(40|80)GB| 80GB PCIe)", 312),
    (r"A30", 165),
    (r"L4", 121),
    (r"L40S", 362),
    (r"H20", 148),
    (r"H100 PCIe", 756),
    (r"H[12]00 NVL", 835),
    (r"H100 80GB HBM3|H200|GH200 \w+( HBM3e)?", 989),
    (r"B200", 2250),
    (r"GB200", 2500),
)


@dataclass(frozen=True)
class Peak:
    """What a device could do at the most.

    Attributes:
        flops: FLOPs per second, a multiplication and an addition counted as two.
        source: where the number is from, in words.
    """

    flops: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.4g} TFLOP/s, {self.source}"


def peak_flops(device: torch.device, dtype: torch.dtype, tflops: float | None = None) -> Peak:
    """The rate that a device's work is held against.

    Args:
        device: CPU or CUDA.
        dtype: that matrix products are computed in.
        tflops: the recipe's word, in TFLOP/s, which goes before all.

    Returns:
        ``tflops``; else the published dense peak of a GPU that is known by its name, for bf16 and fp16; else the rate
        of a matrix product, measured once in a process. The measurement waits for the device.
    """
    if tflops is not None:
        return Peak(tflops * 1e12, "as log.peak_tflops says")
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for pattern, published in _PUBLISHED:
            if re.fullmatch(f"(NVIDIA )?({pattern})", name):
                return Peak(published * 1e12, f"published for {name}, {_short(dtype)} dense")
    return _measured(device, dtype)


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of 50 ms of products of square matrices, so wide that one takes 5 ms, but no wider than 4096.

    The global random state stays as it was.
    """
    width, seconds = 128, [0.0]
    while seconds[0] < 0.005 and width < 4096:
        width *= 2
        generator = torch.Generator(device).manual_seed(0)
        square = torch.randn(width, width, device=device, generator=generator).to(dtype)
        _product_seconds(square)  # the first of a width may compile, allocate or search
        seconds = [_product_seconds(square)]
    while sum(seconds) < 0.05:
        seconds.append(_product_seconds(square))
    return Peak(2 * width**3 / min(seconds), f"measured: {_short(dtype)} matrix product, {width} wide")


def _product_seconds(square: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.mm(square, square)
    if square.is_cuda:
        torch.cuda.synchronize(square.device)
    return time.perf_counter() - began


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class PeakMemory:
    """The most memory in use at a time since the last reading.

    On a CUDA device this is what torch's allocator had handed out, on the CPU the process's resident memory. The latter
    is Linux's high-water mark, which each reading resets (``ru_maxrss`` then begins anew as well). Where the system has
    none or forbids the reset, a reading is the peak since the process began; ``source`` says which.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.source = "allocated by torch on the device"
        if device.type != "cuda":
            self.source = "resident memory" if self._reset() else "resident memory since the process began"
        else:
            self._reset()

    def read(self) -> int:
        """Bytes; the next reading starts from now."""
        peak = self._peak()
        self._reset()
        return peak

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            lines = (_PROC / "status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024

    def _reset(self) -> bool:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            with (_PROC / "clear_refs").open("w") as file:
                file.write("5")
        except OSError:
            return False
        return True


class Meter:
    """Rates over the interval since the last reading, from totals that the caller keeps. It never waits for a device.

    The seconds are the caller's: for a true rate on a GPU, take them right after something that waited for the device
    (the copy of the losses to the host), and read then.

    Args:
        device: of this process, for its memory.
        devices: how many devices the bytes and FLOPs are spread over.
        peak: of one device; None leaves MFU out.
        num_bytes, seconds, waited, flops: the totals to start from, as in :meth:`read`.
    """

    def __init__(
        self,
        device: torch.device,
        devices: int,
        peak: Peak | None,
        *,
        num_bytes: int = 0,
        seconds: float = 0.0,
        waited: float = 0.0,
        flops: float = 0.0,
    ) -> None:
        self.devices, self.peak, self.memory = devices, peak, PeakMemory(device)
        self._totals = (num_bytes, seconds, waited, flops)

    def read(self, num_bytes: int, seconds: float, waited: float, flops: float | None = None) -> dict[str, float]:
        """What the interval came to, by the names in ``READINGS``.

        Args:
            num_bytes: bytes trained on so far, over all devices.
            seconds: of training so far.
            waited: those of them in which this process waited for data.
            flops: FLOPs of the model so far, over all devices; None leaves MFU out.

        Returns:
            Bytes per second, over all devices and for each; the share of time waited, in [0, 1]; MFU as a share of
            ``peak``; peak memory in bytes. An interval without time has memory alone.
        """
        totals = (num_bytes, seconds, waited, self._totals[3] if flops is None else flops)
        done, took, idle, worked = (new - old for new, old in zip(totals, self._totals, strict=True))
        self._totals = totals
        readings: dict[str, float] = {}
        if took > 0:
            readings["bytes_per_second"] = done / took
            readings["bytes_per_second_per_device"] = done / took / self.devices
            readings["data_wait"] = min(1.0, idle / took)
            if flops is not None and self.peak is not None:
                readings["mfu"] = worked / (took * self.devices * self.peak.flops)
        readings["peak_memory_bytes"] = float(self.memory.read())
        return readings
