"""The machine, the versions and the commit that a benchmark ran on."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def facts(device: torch.device, copy: float, flops: float | None = None) -> dict[str, Any]:
    """What numbers are measured on and with; ``copy`` in bytes and ``flops`` in FLOPs per second, of the same run."""
    return {
        **(_gpu(device) if device.type == "cuda" else _cpu()),
        "copy_gb_per_s": copy / 1e9,
        **({} if flops is None else {"matmul_tflop_per_s": flops / 1e12}),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        **commit(),
    }


def line(facts: Mapping[str, Any]) -> str:
    """:func:`facts` in words."""
    if facts["kind"] == "cuda":
        hardware = f"{facts['device']}, {facts['clocks']}, driver {facts['driver']}"
    else:
        hardware = f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads"
    rates = f"copies at {facts['copy_gb_per_s']:.1f} GB/s"
    if "matmul_tflop_per_s" in facts:
        rates += f", matrix products at {facts['matmul_tflop_per_s']:.2f} TFLOP/s"
    commit = facts["commit"] + (" with changes" if facts["dirty"] else "")
    return (
        f"{hardware}; {rates}\n{facts['system']}, Python {facts['python']}, "
        f"torch {facts['torch']}, triton {facts['triton'] or 'none'}; commit {commit}"
    )


def version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"kind": "cpu", "device": name, "cores": cores, "threads": torch.get_num_threads()}


def _gpu(device: torch.device) -> dict[str, Any]:
    """Name, clocks and driver. The clocks are read right after the copy's measurement, while they are still up."""
    properties = torch.cuda.get_device_properties(device)
    facts = {"kind": "cuda", "device": properties.name, "cuda": torch.version.cuda, "driver": "unknown"}
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return {**facts, "clocks": "clocks unknown (pip install nvidia-ml-py)"}
    except pynvml.NVMLError as error:
        return {**facts, "clocks": f"clocks unknown ({error})"}
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        clocks = []
        for name, kind in (("SM", pynvml.NVML_CLOCK_SM), ("memory", pynvml.NVML_CLOCK_MEM)):
            now = pynvml.nvmlDeviceGetClockInfo(handle, kind)
            clocks.append(f"{name} at {now} of {pynvml.nvmlDeviceGetMaxClockInfo(handle, kind)} MHz")
        return {**facts, "driver": pynvml.nvmlSystemGetDriverVersion(), "clocks": ", ".join(clocks)}
    except pynvml.NVMLError as error:
        return {**facts, "clocks": f"clocks unknown ({error})"}
    finally:
        pynvml.nvmlShutdown()


def commit() -> dict[str, Any]:
    """The commit of the checkout, and whether it has changes."""

    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": False}
