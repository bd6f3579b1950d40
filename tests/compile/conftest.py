"""The compile check in a process of its own: under TRITON_INTERPRET kernels can't be compiled."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def compile_check(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `compile_check.py` with the given arguments and a cache of its own."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, HERE / "compile_check.py", *map(str, arguments)],
            env={**inherited, "TRITON_CACHE_DIR": str(tmp_path / "cache"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    return run
