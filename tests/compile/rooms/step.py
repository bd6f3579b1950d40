"""mamba2_step, with all options and with none."""

from functools import partial

import torch

from bytekernels.ssd.triton import step
from rooms.batch import Case, empty

INFINITY = float("inf")


def _step(
    sequences: int, heads: int, headdim: int, groups: int, d_state: int, options: bool, dtype: torch.dtype
) -> None:
    """A step whose x, B, C, z and dt are slices of columns, as in_proj and the convolution leave them."""
    inner, wide = heads * headdim, groups * d_state
    x, B, C = empty(sequences, inner + 2 * wide, dtype=dtype).split([inner, wide, wide], dim=-1)
    z, _, dt = empty(sequences, 2 * inner + 2 * wide + heads, dtype=dtype).split([inner, inner + 2 * wide, heads], -1)
    state = empty(sequences, heads, headdim, d_state, dtype=torch.float32)
    A, D, bias = (empty(heads, dtype=torch.float32) for _ in range(3))
    heads_of, groups_of = (heads, headdim), (groups, d_state)
    x, z = x.unflatten(1, heads_of), z.unflatten(1, heads_of)
    B, C = B.unflatten(1, groups_of), C.unflatten(1, groups_of)
    if options:
        step.mamba2_step(x, dt, A, B, C, state, D, z, bias, True, 0.0, INFINITY)
    else:
        step.mamba2_step(x, dt, A, B, C, state, None, None, None, False, 0.0, INFINITY)


SIZES = {
    "H=48 P=64 G=1 N=128": (64, 48, 64, 1, 128),
    "H=24 P=64 G=2 N=64": (64, 24, 64, 2, 64),
    "H=8 P=128 G=1 N=256": (64, 8, 128, 1, 256),
    "H=4 P=32 G=1 N=16": (64, 4, 32, 1, 16),
    "H=3 P=5 G=3 N=7": (64, 3, 5, 3, 7),
    "H=3 P=5 G=3 N=7 odd": (1, 3, 5, 3, 7),
}
CASES: dict[str, Case] = {
    f"step{' with all' if options else ''} {name}": partial(_step, *sizes, options)
    for name, sizes in SIZES.items()
    for options in (False, True)
}
