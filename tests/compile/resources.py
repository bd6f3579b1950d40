"""What a compiled kernel needs of a chip, and whether the chip has it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from launches import Launch
from triton import knobs

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one block
REGISTERS = 255  # of one thread
REGISTER_FILE = 65536  # of one block; threads take registers in eights
TENSOR_COLUMNS = 512  # of one block


@dataclass(frozen=True)
class Resources:
    """Registers, bytes spilled and bytes of stack of a thread; bytes of shared memory, columns of tensor memory and
    warps of a block."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    tensor_memory: int
    num_warps: int

    def excess(self, arch: int, local_bytes: int) -> list[str]:
        """Each way in which this is more than the chip has, or more local memory than the given budget."""
        file = -(-self.registers // 8) * 8 * 32 * self.num_warps
        limits = [
            (self.spill_stores, local_bytes, "bytes of spill stores"),
            (self.spill_loads, local_bytes, "bytes of spill loads"),
            (self.stack, local_bytes, "bytes of stack"),
            (self.registers, REGISTERS, "registers a thread"),
            (file, REGISTER_FILE, "registers a block"),
            (self.shared, SHARED_BYTES[arch], "bytes of shared memory"),
            (self.tensor_memory, TENSOR_COLUMNS, "columns of tensor memory"),
        ]
        return [f"{value} {name}, at most {limit}" for value, limit, name in limits if value > limit]


def compiled(launch: Launch) -> Resources:
    """Compile a launch as Triton would for its chip, and read what it came to.

    Raises:
        RuntimeError: the assembler, run again for its report, did not make the binary that Triton has.
    """
    kernel = triton.compile(launch.source, target=launch.target, options=launch.options)
    registers, stack = _of_binary(kernel.asm["cubin"], kernel.metadata.name)
    report = _assembler_report(kernel.asm["ptx"], launch)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if not spills or f"Used {registers} registers" not in report or f"{stack} bytes stack frame" not in report:
        raise RuntimeError(f"{launch.name}: the binary has {registers} registers and {stack} bytes of stack:\n{report}")
    return Resources(
        registers=registers,
        spill_stores=sum(int(stores) for stores, _ in spills),
        spill_loads=sum(int(loads) for _, loads in spills),
        stack=stack,
        shared=kernel.metadata.shared,
        tensor_memory=kernel.metadata.tmem_size or 0,
        num_warps=kernel.metadata.num_warps,
    )


def _of_binary(cubin: bytes, name: str) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as the binary states them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    found = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump names no resources of {name}:\n{usage}")
    return int(found[1]), int(found[2])


def _assembler_report(ptx: str, launch: Launch) -> str:
    """What ``ptxas -v`` says of the assembly, run as Triton runs it."""
    tool = knobs.nvidia.ptxas_blackwell if launch.target.arch >= 100 else knobs.nvidia.ptxas
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    options = (launch.options["ptx_options"] or "").split()
    if not launch.options["enable_fp_fusion"]:
        options.append("--fmad=false")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        return _output(
            tool.path, "-v", "-lineinfo", "--regAllocOptLevel=2", *options, f"--gpu-name={target[1]}", path, "-o",
            path.with_suffix(".cubin"),
        )  # fmt: skip


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout
