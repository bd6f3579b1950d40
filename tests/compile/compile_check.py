"""Compile every Triton kernel, as its launcher launches it, for chips that need not be here, and hold it to a budget.

    python tests/compile/compile_check.py [--arch 90] [--dtype bf16] [--room route] [--case D=512] [--json FILE]

Prints a row for each binary: registers, bytes spilled and of stack of a thread; bytes of shared memory and columns of
tensor memory of a block; its warps. The budget is no spills and no stack (on sm_80 and in fp32: cases.py's
LOCAL_BYTES), and what a block can have on the chip. Exits with 1 where a kernel is past it or does not compile, and
where no case launches a kernel.
"""

import argparse
import concurrent.futures
import importlib.util
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from launches import Launch, kernels_of, recorded
from resources import Resources, compiled
from triton import knobs
from triton.runtime.errors import TritonError

from benchmarks import machine
from bytekernels.files import write_json

HERE = Path(__file__).parent
ARCHES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Row:
    """A launch, the dtype of the calls that made it, and those calls: (room, case), the first first."""

    launch: Launch
    dtype: str
    calls: list[tuple[str, str]]

    @property
    def case(self) -> str:
        return self.calls[0][1]

    @property
    def label(self) -> str:
        return f"{self.launch.name} {self.dtype} sm_{self.launch.target.arch} ({self.case})"


def record(cases: ModuleType) -> list[Row]:
    """The distinct launches of all cases, by kernel, chip and dtype."""
    rows: dict[Any, Row] = {}
    for arch in ARCHES:
        for dtype, torch_dtype in DTYPES.items():
            for call in ((room, name) for room, named in cases.CASES.items() for name in named):
                with recorded(arch) as launches:
                    cases.CASES[call[0]][call[1]](torch_dtype)
                for launch in launches:
                    row = rows.setdefault((launch.identity, dtype), Row(launch, dtype, []))
                    row.calls.append(call)
    return sorted(rows.values(), key=lambda row: (row.launch.name, row.launch.target.arch, row.dtype))


_launches: list[Launch] = []  # what forked workers compile: a launch can't be sent to them


def measure(rows: list[Row]) -> Iterator[tuple[Row, Resources | str]]:
    """Each row with what its kernel came to, or with the reason why it does not compile; each binary is made once."""
    binaries = {row.launch.identity: row.launch for row in rows}
    _launches[:] = binaries.values()
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=fork) as pool:
        futures = {identity: pool.submit(_compiled, i) for i, identity in enumerate(binaries)}
        for row in rows:
            yield row, futures[row.launch.identity].result()


def _compiled(number: int) -> Resources | str:
    try:
        return compiled(_launches[number])
    except (TritonError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return " ".join(dict.fromkeys([lines[0], lines[-1]]))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHES, default=ARCHES, help="compute capabilities")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--room", nargs="+", help="only launches that these rooms' cases make")
    parser.add_argument("--case", default="", metavar="REGEX", help="only launches of cases whose name it is found in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--list", action="store_true", help="list the distinct launches and compile nothing")
    parser.add_argument("--cases", type=Path, default=HERE / "cases.py", metavar="FILE", help="instead of cases.py")
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so kernels would be interpreted: unset it")

    cases = _module(options.cases)
    everything = record(cases)
    failures = [
        f"{name}: no case launches it; add one to {options.cases.name}"
        for name in sorted(kernels_of(cases.modules()) - {row.launch.name for row in everything})
    ]
    rows = [
        row
        for row in everything
        if row.launch.target.arch in options.arch
        and row.dtype in options.dtype
        and any(
            (options.room is None or room in options.room) and re.search(options.case, case) for room, case in row.calls
        )
    ]
    if not rows:
        parser.error("no launch of the cases is selected")
    if options.list:
        print(*(row.label for row in rows), sep="\n")
    else:
        failures += _check(rows, cases.LOCAL_BYTES, options.json)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _check(rows: list[Row], local_bytes: dict[str, int], report: Path | None) -> list[str]:
    """Compile, print the table and write the report. Returns what failed."""
    failures, numbers = [], []
    columns = [field.name for field in fields(Resources)]
    kernel = max(len(row.launch.name) for row in rows)
    case = max(len(row.case) for row in rows)
    form = f"{{:{kernel}}}  {{:{case}}}  {{:5}}  {{:6}}" + "".join(f"  {{:>{len(name)}}}" for name in columns)
    print(form.format("kernel", "case", "dtype", "arch", *columns))
    for row, found in measure(rows):
        name, arch = row.launch.name, row.launch.target.arch
        if isinstance(found, str):
            failures.append(f"{row.label}: does not compile: {found}")
            continue
        values = asdict(found)
        print(form.format(name, row.case, row.dtype, f"sm_{arch}", *values.values()), flush=True)
        numbers.append({"kernel": name, "dtype": row.dtype, "arch": f"sm_{arch}", **values, "case": row.case})
        excess = found.excess(arch, local_bytes.get(name, 0) if arch == 80 or row.dtype == "fp32" else 0)
        if excess:
            failures.append(f"{row.label}: {'; '.join(excess)}")
    if report is not None:
        write_json(report, {**machine.commit(), "versions": _versions(), "rows": numbers, "failures": failures})
    return failures


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _versions() -> dict[str, str]:
    tools = {"ptxas": knobs.nvidia.ptxas, "ptxas-blackwell": knobs.nvidia.ptxas_blackwell}
    return {"triton": triton.__version__, **{name: tool.version for name, tool in tools.items()}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
