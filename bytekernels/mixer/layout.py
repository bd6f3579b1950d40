"""Where things lie: the columns of in_proj's output, the channels of the convolution, gradients among arguments."""

from collections.abc import Sequence

from torch import Tensor


def columns(zxbcdt: Tensor, inner: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views z [T, inner], xBC [T, C] and dt [T, H] of ``z | x | B | C | dt`` [T, W]."""
    z, xbc, dt = zxbcdt.split([inner, zxbcdt.shape[1] - inner - heads, heads], 1)
    return z, xbc, dt


def channels(xbc: Tensor, inner: int, head_dim: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views x [T, H, P], B [T, G, N] and C [T, G, N] of ``x | B | C`` [T, C]."""
    width = (xbc.shape[1] - inner) // 2
    x, B, C = xbc.split([inner, width, width], 1)
    per_group = (num_groups, width // num_groups)
    return x.unflatten(1, (-1, head_dim)), B.unflatten(1, per_group), C.unflatten(1, per_group)


def spread(gradients: Sequence[Tensor], arguments: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients in their arguments' places: None where the argument is None."""
    given = iter(gradients)
    return [None if argument is None else next(given) for argument in arguments]
