"""Block sizes and launch options of the scan's kernels: fixed by dtype, sizes and chip, as results depend on them.

Chosen so that nothing spills where that can be had (tests/compile). float32 makes do without tensor cores, or with
three products in TF32. On Blackwell loops are not pipelined: that has been seen to corrupt what they carry.
"""

from typing import Any

import torch
import triton


def chunk_length(dtype: torch.dtype, arch: int) -> int:
    """Q: bytes of a chunk."""
    dtype, arch = _compiled_for(dtype, arch)
    if dtype == torch.float32:
        return 16
    return 64 if arch >= 90 else 32


def configuration(
    kernel: str, dtype: torch.dtype, arch: int, headdim: int, d_state: int, gated: bool = False
) -> dict[str, Any]:
    """Of "scan", "walk", "inputs" or "outer", on a chip of this compute capability (0 for the interpreter).

    ``gated`` says whether a scan multiplies by silu(z).
    """
    dtype, arch = _compiled_for(dtype, arch)
    block_p, block_n = (max(16, triton.next_power_of_2(size)) for size in (headdim, d_state))
    hopper, precision, stages = 90 <= arch < 100, "ieee", 1
    if dtype == torch.float32:
        warps = 16 if kernel == "inputs" else 8
        if kernel in ("scan", "walk"):
            block_p = 16
        if kernel == "outer":
            precision = "tf32x3"
    elif kernel in ("scan", "walk"):
        warps = 8 if kernel == "scan" and (gated or arch < 90) else 4
        stages = 2 if hopper and not gated else 1
    else:
        warps = 4 if kernel == "outer" and arch < 90 else 8
    if kernel == "outer":
        block_n = min(128 if dtype != torch.float32 and arch >= 90 else 64, block_n)
    blocks = dict(Q=chunk_length(dtype, arch), BLOCK_P=block_p, BLOCK_N=block_n, PRECISION=precision)
    return blocks | dict(num_warps=warps, num_stages=stages)


def _compiled_for(dtype: torch.dtype, arch: int) -> tuple[torch.dtype, int]:
    """The interpreter takes the blocks that bfloat16 has on Hopper."""
    return (dtype, arch) if arch else (torch.bfloat16, 90)
