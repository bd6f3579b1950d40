"""Whether the CUDA half is built, and what is said where it isn't, with compilers that only seem to be nvcc."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

# Says its release and where its toolkit is; "compiles" as it is told to.
NVCC = """#!/bin/sh
case "$*" in
  --version) echo 'Cuda compilation tools, release {release}, V{release}.61' ;;
  *--dryrun*) echo '#$ INCLUDES="-I{toolkit}"'; echo '#$ LIBRARIES=  "-L{toolkit}"' ;;
  *) {compile} ;;
esac
"""

pytestmark = pytest.mark.skipif(
    CMAKE is None or not Path(CMAKE).with_name("ninja").exists(), reason="no CMake and Ninja"
)


@pytest.fixture
def configure(tmp_path):
    """Configures a copy of csrc/ with one kernel in it; returns CMake's status and what it prints of CUDA."""
    source = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    shutil.rmtree(source / "cuda", ignore_errors=True)
    (source / "cuda").mkdir()
    (source / "cuda" / "kernel.cu").write_text("__global__ void kernel() {}\n")

    def run(nvcc, *options):
        command = [CMAKE, "-S", source, "-B", tmp_path / "build", "-G", "Ninja", *options]
        tools = [f"-DCMAKE_MAKE_PROGRAM={Path(CMAKE).with_name('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
        environment = {**os.environ, "CUDACXX": str(nvcc)}
        done = subprocess.run([*command, *tools], env=environment, capture_output=True, text=True, timeout=120)
        lines = (done.stdout + done.stderr).splitlines()
        return done.returncode, [
            line.strip(" -") for line in lines if "bytekernels:" in line or "BYTEKERNELS_CUDA" in line
        ]

    return run


@pytest.fixture
def nvcc(tmp_path):
    """Makes a script that passes for nvcc."""

    def make(release="13.0", compile="exit 0"):
        toolkit = tmp_path / "toolkit"
        toolkit.mkdir(exist_ok=True)
        for name in ("cuda_runtime.h", "libcudart_static.a"):
            (toolkit / name).touch()
        script = tmp_path / "nvcc"
        script.write_text(NVCC.format(release=release, toolkit=toolkit, compile=compile))
        script.chmod(0o755)
        return script

    return make


def test_an_nvcc_that_can_is_used(configure, nvcc):
    script = nvcc()
    expected = f"bytekernels: CUDA kernels for 80;90;100 by nvcc 13.0 at {script}"
    assert configure(script) == (0, [expected])
    assert configure(script, "-DBYTEKERNELS_CUDA=ON") == (0, [expected])
    status, lines = configure(script, "-DBYTEKERNELS_CUDA_ARCHITECTURES=90;120a")
    assert (status, lines) == (0, [expected.replace("80;90;100", "90;120a")])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "no nvcc was found as CUDACXX says ({script})"),
        ({"release": "12.1"}, "nvcc 12.1 at {script} is too old for sm_100, 12.8 or newer is needed"),
        (
            {"compile": "echo warming up; echo 'error: unsupported GNU version!'; exit 1"},
            "nvcc 13.0 at {script} can't compile a kernel: error: unsupported GNU version!",
        ),
    ],
)
def test_without_one_the_line_says_why_and_asking_for_it_is_an_error(configure, nvcc, tmp_path, given, reason):
    script = tmp_path / "nvcc" if given is None else nvcc(**given)
    reason = reason.format(script=script)
    assert configure(script) == (0, [f"bytekernels: CPU only: {reason}"])
    assert f'R"~({reason})~"' in (tmp_path / "build" / "build.h").read_text()
    status, lines = configure(script, "-DBYTEKERNELS_CUDA=ON")
    assert status != 0
    assert lines == [f"bytekernels: CUDA was asked for: {reason}"]


def test_off_asks_no_nvcc(configure, nvcc):
    script = nvcc()
    assert configure(script, "-DBYTEKERNELS_CUDA=OFF") == (
        0,
        ["bytekernels: CPU only: it was built with BYTEKERNELS_CUDA=OFF"],
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("-DBYTEKERNELS_CUDA=yes", "BYTEKERNELS_CUDA must be AUTO, ON or OFF, got yes"),
        ("-DBYTEKERNELS_CUDA_ARCHITECTURES=sm_90", "BYTEKERNELS_CUDA_ARCHITECTURES must be numbers such as 90 or 100a"),
    ],
)
def test_what_cannot_be_meant_is_refused(configure, nvcc, option, message):
    status, lines = configure(nvcc(), option)
    assert status != 0
    assert message in " ".join(lines)


@pytest.mark.parametrize("value", ["", "2", "yes"])
def test_setup_refuses_other_values(value):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=ROOT,
        env={**os.environ, "BYTEKERNELS_CUDA": value},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "BYTEKERNELS_CUDA must be 0 (no CUDA), 1 (CUDA or an error) or unset" in done.stderr
    assert f"got {value!r}" in done.stderr
