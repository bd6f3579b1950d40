"""The sanitized build reports what it is there for. Run by `make sanitize`, which loads that build."""

import os
import subprocess
import sys

import pytest

from bytekernels import _C

LOAD = """
import importlib.util
spec = importlib.util.spec_from_file_location("bytekernels._C", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("loaded")
print("returned", module.overstep({memory}, {n}))
"""


def run(memory: bool, n: int) -> subprocess.CompletedProcess[str]:
    code = LOAD.format(path=os.path.abspath(_C.__file__), memory=memory, n=n)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not _C.sanitizers, reason="the extension is not sanitized: `make sanitize`")
@pytest.mark.parametrize(
    ("memory", "n", "report"),
    [
        (True, 4, "AddressSanitizer: heap-buffer-overflow"),
        (False, 1, "runtime error: signed integer overflow"),
    ],
)
def test_what_oversteps_is_reported(memory, n, report):
    done = run(memory, n)
    assert done.returncode != 0
    assert done.stdout == "loaded\n"
    assert report in done.stderr, done.stderr


@pytest.mark.skipif(bool(_C.sanitizers), reason="says what the installed build lacks")
def test_a_release_is_not_sanitized():
    assert not hasattr(_C, "overstep")
