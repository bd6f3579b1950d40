"""Other projects' code, where it is installed."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

from benchmarks.harness import Unavailable


def mamba_ssm(module: str) -> Any:
    """A module of mamba-ssm.

    mamba-ssm imports its first generation's CUDA extension with everything else. Where it was installed without
    (``MAMBA_SKIP_CUDA_BUILD=TRUE``) an empty module stands in: nothing that is measured or compared here calls it.
    """
    extension = "selective_scan_cuda"
    if extension not in sys.modules and importlib.util.find_spec(extension) is None:
        sys.modules[extension] = types.ModuleType(extension)
    return importlib.import_module(f"mamba_ssm.{module}")


def missing(load: Callable[[], Any], name: str, install: str) -> Unavailable | None:
    """Why ``load`` can't import a project, or None."""
    try:
        load()
    except Exception as error:  # not there, or built for another torch or Triton
        return Unavailable(f"{name} can't be imported ({error}): pip install {install}")
    return None
