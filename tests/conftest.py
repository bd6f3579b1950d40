"""Settings for all tests: hypothesis without a deadline; without a GPU, Triton interpreted and GPU tests skipped.

``BYTEKERNELS_EXTENSION=PATH`` tests the extension at that path in place of the installed one (`make sanitize`), which
must have been built with ``BYTEKERNELS_SANITIZERS`` where that is set.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which no test module does by itself

# On a GPU too what offsets and lengths say is checked before kernels read them.
os.environ.setdefault("BYTEKERNELS_VALIDATE", "1")


def load_extension(path: str, sanitizers: str | None) -> None:
    """Make the module at ``path`` be bytekernels._C."""
    name = "bytekernels._C"
    if name in sys.modules:
        raise pytest.UsageError(f"BYTEKERNELS_EXTENSION={path}: {name} has been imported already")
    if not Path(path).is_file():
        raise pytest.UsageError(f"BYTEKERNELS_EXTENSION={path}: no such file; `make sanitize` builds one")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if sanitizers is not None and module.sanitizers != sanitizers:
        raise pytest.UsageError(f"{path} was built with sanitizers {module.sanitizers!r}, not {sanitizers!r}")
    sys.modules[name] = module


if "BYTEKERNELS_EXTENSION" in os.environ:
    load_extension(os.environ["BYTEKERNELS_EXTENSION"], os.environ.get("BYTEKERNELS_SANITIZERS"))

# Shared machines stall for longer than any deadline; a fixed seed keeps a run repeatable.
settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
