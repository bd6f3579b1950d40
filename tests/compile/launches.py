"""Records the launches that a function would make, specialised as Triton itself specialises them, and runs none.

Triton gives each launch that it has not compiled yet to a hook, with the types, constants, alignments and options that
it has derived from the arguments; a hook that returns True takes the compilation upon itself, and nothing is launched.
"""

import ast
import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launch:
    """What Triton compiles for one launch.

    Attributes:
        key: equal for launches of one kernel that share a binary.
        source: the function with its argument types, constants and alignments.
        options: warps, stages and the like.
        target: the chip.
    """

    key: str
    source: ASTSource
    options: dict[str, Any]
    target: GPUTarget

    @property
    def name(self) -> str:
        return name_of(self.source.fn)

    @property
    def identity(self) -> tuple[int, str, str]:
        return self.target.arch, self.name, self.key


class _Driver:
    """Stands in for the driver of a machine with one GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """The launches that are made inside the block, as on a chip of this compute capability; filled as they are made."""
    target = GPUTarget("cuda", arch, 32)
    launches: list[Launch] = []

    def record(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        options = json.loads(compile["specialization_data"])["options"]
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        launches.append(Launch(key, source, options, target))
        return True

    before = driver._active
    driver.set_active(_Driver(target))
    try:
        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = record
            yield launches
    finally:
        driver.set_active(before)


def name_of(kernel: JITFunction) -> str:
    """``route.gather_kernel`` for the one in ``bytekernels/route/triton.py``."""
    return f"{kernel.module.removeprefix('bytekernels.').removesuffix('.triton')}.{kernel.__name__}"


def kernels_of(modules: Iterable[ModuleType]) -> set[str]:
    """Names of the Triton functions that the modules define and that no Triton function there refers to."""
    functions = [
        function
        for module in modules
        for value in vars(module).values()
        if (function := _unwrapped(value)) is not None and function.module == module.__name__
    ]
    helpers = {name_of(helper) for function in functions for helper in _references(function)}
    return {name_of(function) for function in functions} - helpers


def _unwrapped(value: Any) -> JITFunction | None:
    """The Triton function under ``@triton.heuristics`` and the like, or None."""
    while not isinstance(value, JITFunction) and type(value).__module__.startswith("triton.runtime."):
        value = getattr(value, "fn", None)
    return value if isinstance(value, JITFunction) else None


def _references(function: JITFunction) -> Iterator[JITFunction]:
    """Triton functions that are named in a Triton function's source, by themselves or as a module's attribute."""
    for node in ast.walk(function.parse()):
        value = None
        if isinstance(node, ast.Name):
            value = function.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            value = getattr(function.__globals__.get(node.value.id), node.attr, None)
        if isinstance(value, JITFunction):
            yield value
