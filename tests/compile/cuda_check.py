"""Compiles csrc/cuda for chips that need not be there, with warnings as errors, and reads what each kernel takes.

``python tests/compile/cuda_check.py [--json FILE.json]``; exit status 1 where a kernel spills or uses a stack.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "90", "100")
FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings", "-Xptxas=-v,-warn-spills"]


def find_nvcc() -> str | None:
    """Where csrc/cuda.cmake finds it too."""
    folders = [os.environ.get(name, "") + "/bin" for name in ("CUDA_HOME", "CUDA_PATH")]
    path = os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=path)


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def resources(nvcc: str, source: Path) -> list[dict[str, Any]]:
    """A row for each kernel and chip: registers of a thread, bytes of stack, bytes of spills.

    Raises:
        RuntimeError: it does not compile without a warning; with what nvcc says.
    """
    chips = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, *chips, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or "warning" in done.stderr:
        raise RuntimeError(f"{source.name}: {done.stderr}")
    rows = []
    for part in re.split(r"(?=Compiling entry function)", done.stderr)[1:]:
        name = re.search(r"\d([A-Z]\w*?Kernel)", part)  # inside the mangled name
        chip = re.search(r"for 'sm_(\d+)'", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert name and chip and stack and registers, f"{source.name}: ptxas -v speaks otherwise: {part}"
        rows.append(
            {
                "kernel": name[1],
                "arch": int(chip[1]),
                "registers": int(registers[1]),
                "stack": int(stack[1]),
                "spills": int(stack[2]) + int(stack[3]),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="cuda_check.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write the rows")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        parser.error("no nvcc was found in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda/bin")
    rows = [row for source in sources() for row in resources(nvcc, source)]
    for row in rows:
        print("{kernel:18} sm_{arch:<4} registers {registers:3}  stack {stack}  spills {spills}".format(**row))
    if options.json:
        release = re.search(r"release [\d.]+, (V[\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))
        found = {"nvcc": release[1] if release else "unknown", "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(row["stack"] or row["spills"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
