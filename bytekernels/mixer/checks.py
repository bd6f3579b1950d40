"""What the mixer and its step refuse."""

from torch import Tensor


def check_sizes(
    axis: str,
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    head_dim: int,
    num_groups: int,
) -> int:
    """Refuse arguments that do not fit each other; ``axis`` names the rows of zxbcdt. Returns N."""
    if not zxbcdt.is_floating_point():
        raise TypeError(f"zxbcdt must have a floating dtype, got {zxbcdt.dtype}")
    if norm_weight.dim() != 1 or head_dim < 1 or norm_weight.shape[0] % head_dim or not norm_weight.shape[0]:
        raise ValueError(
            f"norm_weight must have shape [H*P] with P = head_dim = {head_dim} >= 1, got {list(norm_weight.shape)}"
        )
    inner = norm_weight.shape[0]
    heads = inner // head_dim
    for name, value in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            check_shape(name, value, "[H]", [heads])
    if num_groups < 1 or heads % num_groups:
        raise ValueError(f"num_groups must divide the {heads} heads, got {num_groups}")
    if conv_weight.dim() != 2 or conv_weight.shape[1] < 1:
        raise ValueError(f"conv_weight must have shape [C, K] with K >= 1, got {list(conv_weight.shape)}")
    channels = conv_weight.shape[0]
    if channels <= inner or (channels - inner) % (2 * num_groups):
        raise ValueError(
            f"conv_weight must have C = H*P + 2*G*N = {inner} + {2 * num_groups} N rows with N >= 1, got {channels}"
        )
    if conv_bias is not None:
        check_shape("conv_bias", conv_bias, "[C]", [channels])
    width = inner + channels + heads
    if zxbcdt.dim() != 2 or zxbcdt.shape[1] != width:
        raise ValueError(f"zxbcdt must have shape [{axis}, W] with W = H*P + C + H = {width}, got {list(zxbcdt.shape)}")
    return (channels - inner) // (2 * num_groups)


def check_shape(name: str, value: Tensor, names: str, shape: list[int]) -> None:
    if list(value.shape) != shape:
        raise ValueError(f"{name} must have shape {names} = {shape}, got {list(value.shape)}")


def limits_of(dt_limit: tuple[float, float]) -> tuple[float, float]:
    low, high = map(float, dt_limit)
    if not 0 <= low <= high:
        raise ValueError(f"dt_limit must be (least, greatest) with 0 <= least <= greatest, got {(low, high)}")
    return low, high
