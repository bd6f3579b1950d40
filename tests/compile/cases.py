"""The launches that `compile_check.py` compiles: for each room, calls of its launchers that between them make every
kernel in every configuration that the models use.

A case is called with a dtype and with tensors on the meta device: nothing is allocated or run, and a launcher that
would wait for the device fails. Hence the ``capacity``.
"""

import importlib
from pathlib import Path
from types import ModuleType

from rooms import byte_table, conv, dechunk, marginals, mixer, norm, route, sample, ssd, step
from rooms.batch import Case

import bytekernels

# Bytes of local memory (each of stack, spill stores and spill loads) that a kernel may use on sm_80, and in float32 on
# any chip; elsewhere none.
LOCAL_BYTES = {
    "ssd.triton.forward.scan_kernel": 32,
    "ssd.triton.backward.inputs_kernel": 16,
    "ssd.triton.backward.outer_kernel": 16,
}


def modules() -> list[ModuleType]:
    """The modules of bytekernels that define Triton kernels."""
    (root,) = bytekernels.__path__
    paths = [path for path in sorted(Path(root).rglob("*.py")) if "@triton.jit" in path.read_text()]
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return [importlib.import_module(f"bytekernels.{name}") for name in names]


CASES: dict[str, dict[str, Case]] = {
    "byte_table": byte_table.CASES,
    "conv": conv.CASES,
    "dechunk": dechunk.CASES,
    "marginals": marginals.CASES,
    "mixer": mixer.CASES,
    "norm": norm.CASES,
    "route": route.CASES,
    "sample": sample.CASES,
    "ssd": ssd.CASES,
    "step": step.CASES,
}
