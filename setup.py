"""Builds bytekernels._C with CMake and Ninja. Everything else about the package is in pyproject.toml.

The extension is compiled for the machine that builds it. ``BYTEKERNELS_MARCH=x86-64-v3 pip install .`` compiles for
another instruction set (any that the compiler's -march knows; empty for the compiler's own choice).

The CUDA half is compiled where an nvcc is found that can do it, whether there is a GPU or not: BYTEKERNELS_CUDA=1 makes
it an error where there is none, BYTEKERNELS_CUDA=0 leaves it out. BYTEKERNELS_CUDA_ARCHITECTURES="90;120" compiles for
other chips than 80, 90 and 100.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_choice() -> str:
    """CMake's word for what BYTEKERNELS_CUDA asks for."""
    choice = os.environ.get("BYTEKERNELS_CUDA")
    words = {None: "AUTO", "0": "OFF", "1": "ON"}
    if choice not in words:
        raise SystemExit(
            f"BYTEKERNELS_CUDA must be 0 (no CUDA), 1 (CUDA or an error) or unset (CUDA where nvcc is found), "
            f"got {choice!r}"
        )
    return words[choice]


class CMakeBuild(build_ext):
    """Configures csrc/ once per build and leaves the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            raise SystemExit(
                "pybind11 was not found: build with pip's build isolation, or `pip install pybind11`"
            ) from None

        headers = Path(sysconfig.get_path("include"))
        if not (headers / "Python.h").is_file():
            raise SystemExit(f"no Python.h in {headers}: install this Python's headers (python3-dev or python3-devel)")

        cmake, ninja = self.program("cmake"), self.program("ninja")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            # All are given each time: a build folder remembers what it was given last.
            "BYTEKERNELS_MARCH": os.environ.get("BYTEKERNELS_MARCH", "native"),
            "BYTEKERNELS_CUDA": cuda_choice(),
            "BYTEKERNELS_CUDA_ARCHITECTURES": os.environ.get("BYTEKERNELS_CUDA_ARCHITECTURES", "80;90;100"),
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        build = Path(self.build_temp).resolve() / "csrc"
        subprocess.run([cmake, "-S", ROOT / "csrc", "-B", build, "-G", "Ninja", *definitions], check=True)
        subprocess.run([cmake, "--build", build], check=True)

    def program(self, name: str) -> str:
        """Path of a build tool: from PATH, or from the environment that this Python runs in."""
        found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
        if found is None:
            raise SystemExit(f"{name} was not found: build with pip's build isolation, or `pip install {name}`")
        return found


# CMake finds the sources by itself; they are listed for the sake of source distributions.
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file())

setup(ext_modules=[Extension("bytekernels._C", sources=SOURCES)], cmdclass={"build_ext": CMakeBuild})
