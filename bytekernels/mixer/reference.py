"""The mixer as the composition of its rooms' specifications: the specification.

``out = norm(y silu(z)) weight`` with ``y = scan(silu(conv(x | B | C)), softplus(dt + dt_bias), A, D)`` (Dao & Gu 2024,
arXiv 2405.21060, section 7.1, the block between its projections).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import bytekernels.conv.reference as conv_room
import bytekernels.norm.reference as norm_room
import bytekernels.ssd.reference as ssd_room
from bytekernels import dispatch
from bytekernels.byte_table.reference import byte_table
from bytekernels.mixer.layout import channels, columns


def composed(
    conv: Any,
    ssd: Any,
    norm: Any,
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
    head_dim: int,
    num_groups: int,
    eps: float,
    dt_min: float,
    dt_max: float,
    ids: Tensor | None,
    conv_states: Tensor | None,
    ssm_states: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The mixer on one implementation (a module) of each room.

    Returns:
        out [T, H*P], the scan's y [T, H*P], the convolution's output [T, C], and both final states.
    """
    inner = norm_weight.shape[0]
    rows = zxbcdt if ids is None else byte_table(ids, zxbcdt)  # [T, W]
    z, xbc, dt = columns(rows, inner, A.shape[0])
    conved, final_conv = conv.causal_conv1d(xbc, conv_weight, conv_bias, cu_seqlens, True, conv_states)
    x, B, C = channels(conved, inner, head_dim, num_groups)
    y, final_ssm = ssd.ssd_scan(x, dt, A, B, C, cu_seqlens, D, None, dt_bias, True, dt_min, dt_max, ssm_states)
    y = y.flatten(1)  # [T, H*P]
    return norm.gated_rms_norm(y, z, norm_weight, inner // num_groups, eps), y, conved, final_conv, final_ssm


def mamba2_mixer(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return composed(conv_room, ssd_room, norm_room, *args)


def mamba2_mixer_backward(
    dout: Tensor, dconv_states: Tensor | None, dssm_states: Tensor | None, y: Tensor, conved: Tensor, *args: Any
) -> list[Tensor]:
    return dispatch.vjp(mamba2_mixer, args, (dout, None, None, dconv_states, dssm_states))


def mamba2_mixer_step(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    conv: Tensor,
    position: Tensor,
    ssm: Tensor,
    head_dim: int,
    num_groups: int,
    eps: float,
    dt_min: float,
    dt_max: float,
    active: Tensor | None,
) -> Tensor:
    parameters = conv_weight, conv_bias, A, D, dt_bias, norm_weight
    options = head_dim, num_groups, eps, dt_min, dt_max
    if active is None:
        return _step(zxbcdt, *parameters, conv, position, ssm, *options)
    new_conv, new_position, new_ssm = conv.clone(), position.clone(), ssm.clone()
    out = _step(zxbcdt, *parameters, new_conv, new_position, new_ssm, *options)
    for value, new in ((conv, new_conv), (position, new_position), (ssm, new_ssm)):
        value.copy_(torch.where(active.view(-1, *[1] * (value.dim() - 1)), new, value))
    return out.masked_fill(~active[:, None], 0.0)


def _step(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    conv: Tensor,
    position: Tensor,
    ssm: Tensor,
    head_dim: int,
    num_groups: int,
    eps: float,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    inner, heads, taps = norm_weight.shape[0], A.shape[0], conv.shape[2]
    z, xbc, dt = columns(zxbcdt, inner, heads)
    wide = torch.promote_types(conv.dtype, zxbcdt.dtype)

    # A row j bytes old lies in slot (position - j) mod K; x's channels are their head's, B's and C's the group's first.
    first_heads = torch.arange(0, heads, heads // num_groups, device=conv.device)  # [G]
    state = (conv.shape[1] - inner) // (2 * num_groups)
    owner = torch.arange(heads, device=conv.device).repeat_interleave(head_dim)
    owner = torch.cat([owner, first_heads.repeat_interleave(state).repeat(2)])  # [C]
    newest = position[:, owner].long()[:, :, None]  # [S, C, 1]
    conv.scatter_(2, newest % taps, xbc.to(conv.dtype)[:, :, None])
    back = torch.arange(taps - 1, -1, -1, device=conv.device)  # oldest first
    window = conv.gather(2, (newest - back) % taps)  # [S, C, K]
    position.add_(1).remainder_(taps)

    conved = (window.to(wide) * conv_weight.to(wide)).sum(2)
    if conv_bias is not None:
        conved = conved + conv_bias.to(wide)
    x, B, C = channels(F.silu(conved).to(zxbcdt.dtype), inner, head_dim, num_groups)
    y = ssd_room.mamba2_step(x, dt, A, B, C, ssm, D, None, dt_bias, True, dt_min, dt_max)
    return norm_room.gated_rms_norm(y.flatten(1), z, norm_weight, inner // num_groups, eps)
