"""The mixer through the extension: csrc/conv.h, ssd.h, norm.h and step.h. Float32 and bfloat16 on the CPU."""

from typing import Any

import torch
from torch import Tensor

import bytekernels.conv.native as conv_room
import bytekernels.norm.native as norm_room
import bytekernels.ssd.native as ssd_room
from bytekernels import _C
from bytekernels.byte_table.reference import byte_table, byte_table_backward
from bytekernels.extension import array, fresh, rows, threads
from bytekernels.mixer.layout import channels, columns, spread
from bytekernels.mixer.reference import composed


def mamba2_mixer(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return composed(conv_room, ssd_room, norm_room, *args)


def mamba2_mixer_backward(
    dout: Tensor,
    dconv_states: Tensor | None,
    dssm_states: Tensor | None,
    y: Tensor,
    conved: Tensor,
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
) -> list[Tensor]:
    inner, sequences = norm_weight.shape[0], len(cu_seqlens) - 1
    rows = zxbcdt if ids is None else byte_table(ids, zxbcdt)  # [T, W]
    z, xbc, dt = columns(rows, inner, A.shape[0])
    x, B, C = channels(conved, inner, head_dim, num_groups)
    if dconv_states is None:
        dconv_states = y.new_zeros(sequences, conv_weight.shape[0], conv_weight.shape[1] - 1)
    if dssm_states is None:
        dssm_states = y.new_zeros(sequences, *x.shape[1:], B.shape[2], dtype=torch.float32)

    dy, dz, dnorm_weight = norm_room.gated_rms_norm_backward(dout, y, z, norm_weight, inner // num_groups, eps)
    scan = (x, dt, A, B, C, cu_seqlens, D, None, dt_bias, True, dt_min, dt_max, ssm_states)
    gradients = ssd_room.ssd_scan_backward(dy.view_as(x), dssm_states, *scan)
    dx, ddt, dA, dB, dC, dD, ddt_bias, dssm = spread(gradients, (x, dt, A, B, C, D, dt_bias, ssm_states))
    dconved = torch.cat([part.flatten(1) for part in (dx, dB, dC) if part is not None], 1, out=fresh(conved))
    del gradients, dy, dx, dB, dC  # their memory serves what follows
    gradients = conv_room.causal_conv1d_backward(
        dconved, dconv_states, xbc, conv_weight, conv_bias, cu_seqlens, True, conv_states
    )
    dxbc, dweight, dbias, dconv = spread(gradients, (xbc, conv_weight, conv_bias, conv_states))
    parts = [part for part in (dz, dxbc, ddt) if part is not None]
    if ids is None:
        dzxbcdt = torch.cat(parts, 1, out=fresh(zxbcdt, zxbcdt.shape))
    else:
        dzxbcdt = torch.cat([byte_table_backward(part, ids) for part in parts], 1)
    found = [dzxbcdt, dweight, dbias, dA, dD, ddt_bias, dnorm_weight, dconv, dssm]
    return [gradient for gradient in found if gradient is not None]


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
    sequences, heads, _, state_size = ssm.shape
    out = zxbcdt.new_empty(sequences, norm_weight.shape[0])
    parameters = conv_weight, conv_bias, A, D, dt_bias, norm_weight
    _C.mamba2_mixer_step(
        zxbcdt.dtype == torch.bfloat16,
        (sequences, heads, head_dim, num_groups, state_size, conv.shape[2]),
        rows(zxbcdt),
        tuple(None if value is None else array(value.float().contiguous()) for value in parameters),
        (eps, dt_min, dt_max),
        (array(conv), array(position), array(ssm)),
        None if active is None else array(active.contiguous()),
        array(out),
        threads(),
    )
    return out
