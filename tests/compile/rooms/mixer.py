"""The mixer on columns of in_proj's output, on rows and on a table, and its step."""

from functools import partial

import torch

from bytekernels.mixer import triton as mixer
from rooms.batch import EVEN, ODD, Batch, Case, empty

OPTIONS = (1e-5, 0.0, float("inf"))


def _weights(heads: int, head_dim: int, groups: int, d_state: int) -> tuple[torch.Tensor, ...]:
    """conv_weight, conv_bias, A, D, dt_bias and norm_weight in float32, as the models have them."""
    channels = heads * head_dim + 2 * groups * d_state
    shapes = ((channels, 4), (channels,), (heads,), (heads,), (heads,), (heads * head_dim,))
    return tuple(empty(*shape, dtype=torch.float32) for shape in shapes)


def _mixer(size: tuple[int, int, int, int], batch: Batch, table: bool, dtype: torch.dtype) -> None:
    heads, head_dim, groups, _ = size
    weights = _weights(*size)
    width = heads * head_dim + len(weights[0]) + heads
    zxbcdt = empty(256 if table else batch.bytes, width, dtype=dtype)
    ids = empty(batch.bytes, dtype=torch.uint8) if table else None
    inputs = (zxbcdt, *weights, batch.cu(), head_dim, groups, *OPTIONS, ids, None, None)
    out, y, conved, _, _ = mixer.mamba2_mixer(*inputs)
    mixer.mamba2_mixer_backward(out, None, None, y, conved, *inputs)


def _step(size: tuple[int, int, int, int], sequences: int, bare: bool, dtype: torch.dtype) -> None:
    """A step with every option and a mask, or with none."""
    heads, head_dim, groups, d_state = size
    conv_weight, conv_bias, A, D, dt_bias, norm_weight = _weights(*size)
    zxbcdt = empty(sequences, heads * head_dim + len(conv_weight) + heads, dtype=dtype)
    conv = empty(sequences, *conv_weight.shape, dtype=torch.float32)
    position = empty(sequences, heads, dtype=torch.int32)
    ssm = empty(sequences, heads, head_dim, d_state, dtype=torch.float32)
    given = (conv_weight, None, A, None, None) if bare else (conv_weight, conv_bias, A, D, dt_bias)
    active = None if bare else empty(sequences, dtype=torch.bool)
    mixer.mamba2_mixer_step(zxbcdt, *given, norm_weight, conv, position, ssm, head_dim, groups, *OPTIONS, active)


MODEL = (48, 64, 1, 128)
SMALL = (6, 64, 1, 32)
SIZES = {"H=48 P=64 G=1 N=128": MODEL, "H=6 P=64 G=1 N=32": SMALL}
STEPS = {**SIZES, "H=24 P=64 G=2 N=64": (24, 64, 2, 64), "H=8 P=128 G=1 N=256": (8, 128, 1, 256)}
BARE = {"H=3 P=5 G=3 N=7": 64, "H=3 P=5 G=3 N=7 odd": 1}
CASES: dict[str, Case] = (
    {
        f"{'table' if table else 'rows'} {name}": partial(_mixer, size, EVEN, table)
        for name, size in SIZES.items()
        for table in (False, True)
    }
    | {"table odd": partial(_mixer, SMALL, ODD, True)}
    | {f"step {name}": partial(_step, size, 64, False) for name, size in STEPS.items()}
    | {f"step bare {name}": partial(_step, (3, 5, 3, 7), sequences, True) for name, sequences in BARE.items()}
)
