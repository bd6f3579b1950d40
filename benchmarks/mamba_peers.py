"""What the Mamba2 kernels are measured against.

``eager`` is plain PyTorch under its own autograd: the scan in chunks of matrix products (Dao & Gu 2024, section 6,
packed: ``bytekernels.ssd.chunked``), the convolution sequence by sequence, the norm as in its reference.
``recurrence`` is the same with the scan one byte at a time. ``bytekernels`` is the public functions with the
implementation that they choose.

``mamba-minimal`` is mamba-ssm's ``ssd_minimal_discrete``, the published form of those matrix products. It knows no
sequences, so it gets them one by one, each padded to whole blocks. ``mamba-ssm`` is that project's Triton kernels with
its fused mixer and the causal-conv1d package; without that package the mixer is its parts with our convolution. ``fla``
is flash-linear-attention's simple gated linear attention, of which the scan is a case: q = C, k = B, v = Delta x,
g = Delta A. It has no groups, so B and C are repeated for each head, and no skip.

Every function takes its op's arguments by name and returns its outputs by name.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bytekernels
from benchmarks import public
from benchmarks.harness import Function, Provider, Unavailable
from bytekernels import MixerState, MixerStates
from bytekernels.conv import reference as conv_reference
from bytekernels.norm import reference as norm_reference
from bytekernels.ragged import segment_ids
from bytekernels.ssd import chunked
from bytekernels.ssd import reference as ssd_reference

OPS = ("ssd", "mixer", "step")
PROVIDERS = ("recurrence", "eager", "mamba-minimal", "mamba-ssm", "fla", "bytekernels")
ON_REQUEST = ("recurrence",)
EPS = 1e-5
BLOCK = 64  # bytes of a block of ssd_minimal_discrete: the size that its own test has
CHUNK = 256  # bytes of a chunk of mamba-ssm's kernels: their module's default

Conv = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x [T, C], weight [C, K], bias [C], cu_seqlens
Norm = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # y and z [T, inner], weight [inner], group size
ConvStep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x [S, C], state [S, C, K-1], weight [C, K], bias [C]
# x [T, H, P], dt [T, H], A [H], B and C [T, G, N], D and dt_bias [H], cu_seqlens
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# x [S, H, P], dt [S, H], A [H], B and C [S, G, N], state [S, H, P, N], D and dt_bias [H]
ScanStep = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def split(zxbcdt: Tensor, A: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns z | x B C | dt: [T, inner], [T, inner + 2GN], [T, H]."""
    inner = len(A) * head_dim
    return zxbcdt.split([inner, zxbcdt.shape[1] - inner - len(A), len(A)], dim=1)


def split_heads(xbc: Tensor, A: Tensor, head_dim: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns x | B | C: [T, H, P], [T, G, N], [T, G, N]."""
    inner = len(A) * head_dim
    x, B, C = xbc.split([inner, *[(xbc.shape[1] - inner) // 2] * 2], dim=1)
    return x.unflatten(1, (-1, head_dim)), B.unflatten(1, (num_groups, -1)), C.unflatten(1, (num_groups, -1))


def ssd_by(scan: Scan) -> Function:
    def ssd(**arguments: Tensor) -> dict[str, Tensor]:
        return dict(y=scan(**arguments))

    return ssd


def mixer_by(conv: Conv, scan: Scan, norm: Norm) -> Function:
    """All between in_proj and out_proj, from its three parts."""

    def mixer(
        zxbcdt: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        A: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        norm_weight: Tensor,
        cu_seqlens: Tensor,
        head_dim: int,
        num_groups: int,
    ) -> dict[str, Tensor]:
        z, xbc, dt = split(zxbcdt, A, head_dim)
        x, B, C = split_heads(conv(xbc, conv_weight, conv_bias, cu_seqlens), A, head_dim, num_groups)
        y = scan(x, dt, A, B, C, D, dt_bias, cu_seqlens).flatten(1)
        return dict(y=norm(y, z, norm_weight, y.shape[1] // num_groups))

    return mixer


def step_by(conv_step: ConvStep, scan_step: ScanStep, norm: Norm) -> Function:
    """The same for the next byte of each sequence, from its three parts; the states are updated in place."""

    def step(
        zxbcdt: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        A: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        norm_weight: Tensor,
        conv: Tensor,
        ssm: Tensor,
        head_dim: int,
        num_groups: int,
    ) -> dict[str, Tensor]:
        z, xbc, dt = split(zxbcdt, A, head_dim)
        x, B, C = split_heads(conv_step(xbc, conv, conv_weight, conv_bias), A, head_dim, num_groups)
        y = scan_step(x, dt, A, B, C, ssm, D, dt_bias).flatten(1)
        return dict(y=norm(y, z, norm_weight, y.shape[1] // num_groups), ssm=ssm)

    return step


def eager_conv(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """By PyTorch's own convolution, in float32 for half precision too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    channels, taps = weight.shape
    outputs = [x.new_zeros(channels, 0, dtype=wide)]
    for start, end in _bounds(cu_seqlens):
        rows = F.pad(x[start:end].T.to(wide), (taps - 1, 0))
        outputs.append(F.conv1d(rows[None], weight.to(wide)[:, None], bias.to(wide), groups=channels)[0])
    return F.silu(torch.cat(outputs, 1).T).to(x.dtype)


def eager_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, cu_seqlens: Tensor
) -> Tensor:
    return chunked.ssd_scan(x, dt, A, B, C, cu_seqlens, D, None, dt_bias, True, 0.0, math.inf, None)[0]


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, cu_seqlens: Tensor
) -> Tensor:
    return ssd_reference.ssd_scan(x, dt, A, B, C, cu_seqlens, D, None, dt_bias, True, 0.0, math.inf, None)[0]


def eager_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int) -> Tensor:
    return norm_reference.gated_rms_norm(y, z, weight, group_size, EPS)


def eager_conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return conv_reference.causal_conv1d_step(x, state, weight, bias, True)


def eager_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    return ssd_reference.mamba2_step(x, dt, A, B, C, state, D, None, dt_bias, True, 0.0, math.inf)


EAGER: dict[str, Function] = {
    "ssd": ssd_by(eager_scan),
    "mixer": mixer_by(eager_conv, eager_scan, eager_norm),
    "step": step_by(eager_conv_step, eager_scan_step, eager_norm),
}


def _one_sequence_at_a_time(scan: Scan) -> Scan:
    """In float64 a whole batch's states would not fit on a GPU: each sequence's are made again for its gradients."""

    def each(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        outputs = [x.new_zeros(0, *x.shape[1:])]
        for start, end in _bounds(cu_seqlens):
            whole = cu_seqlens.new_tensor([0, end - start])
            rows = (value[start:end] for value in (x, dt, B, C))
            x_rows, dt_rows, B_rows, C_rows = rows
            arguments = (x_rows, dt_rows, A, B_rows, C_rows, D, dt_bias, whole)
            outputs.append(checkpoint(scan, *arguments, use_reentrant=False))
        return torch.cat(outputs)

    return each


def _bounds(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    return ((start, end) for start, end in pairwise(cu_seqlens.tolist()) if start < end)


TRUTH = Provider(
    {
        "ssd": ssd_by(_one_sequence_at_a_time(eager_scan)),
        "mixer": mixer_by(eager_conv, _one_sequence_at_a_time(eager_scan), eager_norm),
        "step": EAGER["step"],
    }
)
RECURRENCE: dict[str, Function] = {
    "ssd": ssd_by(recurrence),
    "mixer": mixer_by(eager_conv, recurrence, eager_norm),
}


def our_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, cu_seqlens: Tensor
) -> Tensor:
    return bytekernels.ssd_scan(x, dt, A, B, C, cu_seqlens, D=D, dt_bias=dt_bias, dt_softplus=True)


def our_mixer(**arguments: Any) -> dict[str, Tensor]:
    return dict(y=bytekernels.mamba2_mixer(**arguments, eps=EPS))


def our_step(state: MixerState, **arguments: Any) -> dict[str, Tensor]:
    return dict(y=bytekernels.mamba2_mixer_step(**arguments, state=state, eps=EPS), ssm=state.ssm)


def our_state(conv: Tensor, ssm: Tensor, **arguments: Any) -> dict[str, Any]:
    return dict(arguments, state=MixerState.after(MixerStates(conv, ssm)))


OURS = Provider({"ssd": ssd_by(our_scan), "mixer": our_mixer, "step": our_step}, prepare={"step": our_state})


def minimal_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """In float32: the form wants one dtype, and running sums of Delta A in half precision would be useless."""
    form = public.mamba_ssm("modules.ssd_minimal").ssd_minimal_discrete
    wide = torch.promote_types(x.dtype, torch.float32)
    delta = F.softplus(dt.to(wide) + dt_bias)
    per_group = len(A) // B.shape[1]
    inflow, decay = delta[:, :, None] * x.to(wide), delta * A
    B, C = (value.to(wide).repeat_interleave(per_group, 1) for value in (B, C))
    outputs = [x.new_zeros(0, *x.shape[1:], dtype=wide)]
    for start, end in _bounds(cu_seqlens):
        padding = -(end - start) % BLOCK
        rows = [F.pad(v[start:end], (0,) * (2 * v.dim() - 1) + (padding,))[None] for v in (inflow, decay, B, C)]
        outputs.append(form(*rows, BLOCK)[0][0, : end - start])
    return (torch.cat(outputs) + D[:, None] * x).to(x.dtype)


def mamba_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, cu_seqlens: Tensor
) -> Tensor:
    scan = public.mamba_ssm("ops.triton.ssd_combined").mamba_chunk_scan_combined
    sequence = segment_ids(cu_seqlens, len(x)).to(torch.int32)[None]
    rows = (value[None] for value in (B, C))
    return scan(x[None], dt[None], A, *rows, CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True, seq_idx=sequence)[0]


def mamba_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int) -> Tensor:
    norm = public.mamba_ssm("ops.triton.layernorm_gated").rmsnorm_fn
    return norm(y, weight, None, z=z, eps=EPS, group_size=group_size, norm_before_gate=False)


mamba_mixer = mixer_by(bytekernels.causal_conv1d, mamba_scan, mamba_norm)


def mamba_fused_mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
    head_dim: int,
    num_groups: int,
) -> dict[str, Tensor]:
    mixer = public.mamba_ssm("ops.triton.ssd_combined").mamba_split_conv1d_scan_combined
    y = mixer(
        zxbcdt[None],
        conv_weight,
        conv_bias,
        dt_bias,
        A,
        D,
        CHUNK,
        seq_idx=segment_ids(cu_seqlens, len(zxbcdt)).to(torch.int32)[None],
        rmsnorm_weight=norm_weight,
        rmsnorm_eps=EPS,
        headdim=head_dim,
        ngroups=num_groups,
        norm_before_gate=False,
    )
    return dict(y=y[0])


def mamba_conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_update

    return causal_conv1d_update(x, state, weight, bias, "silu")


def mamba_state(conv: Tensor, zxbcdt: Tensor, **arguments: Any) -> dict[str, Any]:
    """causal-conv1d keeps its state in the rows' dtype."""
    return dict(arguments, zxbcdt=zxbcdt, conv=conv.to(zxbcdt.dtype))


def mamba_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    step = public.mamba_ssm("ops.triton.selective_state_update").selective_state_update
    headdim, d_state = state.shape[2:]
    A = A[:, None, None].expand(-1, headdim, d_state)
    dt = dt[:, :, None].expand(-1, -1, headdim)
    D, dt_bias = (value[:, None].expand(-1, headdim) for value in (D, dt_bias))
    return step(state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True)


def fla_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, cu_seqlens: Tensor
) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    delta = F.softplus(dt.float() + dt_bias)
    B, C = (value.repeat_interleave(len(A) // B.shape[1], 1) for value in (B, C))
    v = (delta[:, :, None] * x).to(x.dtype)
    rows = (value[None] for value in (C, B, v, delta * A))
    y, _ = chunk_simple_gla(*rows, scale=1.0, cu_seqlens=cu_seqlens)
    return (y[0] + D[:, None] * x).to(x.dtype)


def providers(names: Iterable[str], device: torch.device) -> dict[str, Provider | Unavailable]:
    """The providers of these names, those that can't run on this device with the reason."""
    made: dict[str, Callable[[], Provider | Unavailable]] = {
        "recurrence": lambda: Provider(RECURRENCE),
        "eager": lambda: Provider(EAGER),
        "mamba-minimal": _minimal,
        "mamba-ssm": lambda: _mamba(device),
        "fla": lambda: _fla(device),
        "bytekernels": lambda: OURS,
    }
    return {name: made[name]() for name in names}


def _minimal() -> Provider | Unavailable:
    load = functools.partial(public.mamba_ssm, "modules.ssd_minimal")
    return public.missing(load, "mamba-ssm", "mamba-ssm") or Provider(
        {"ssd": ssd_by(minimal_scan), "mixer": mixer_by(eager_conv, minimal_scan, eager_norm)}
    )


def _mamba(device: torch.device) -> Provider | Unavailable:
    if device.type != "cuda":
        return Unavailable(f"mamba-ssm's Triton kernels run on CUDA devices alone, not on {device}")
    load = functools.partial(public.mamba_ssm, "ops.triton.ssd_combined")
    missing = public.missing(load, "mamba-ssm", "mamba-ssm")
    if missing is not None:
        return missing
    if importlib.util.find_spec("causal_conv1d") is None:
        mixer, conv_step, prepare = mamba_mixer, bytekernels.causal_conv1d_step, {}
    else:
        mixer, conv_step, prepare = mamba_fused_mixer, mamba_conv_step, {"step": mamba_state}
    step = step_by(conv_step, mamba_scan_step, mamba_norm)
    return Provider({"ssd": ssd_by(mamba_scan), "mixer": mixer, "step": step}, prepare=prepare)


def _fla(device: torch.device) -> Provider | Unavailable:
    if device.type != "cuda":
        return Unavailable(f"flash-linear-attention's kernels run on CUDA devices alone, not on {device}")
    load = functools.partial(importlib.import_module, "fla.ops.simple_gla")
    return public.missing(load, "flash-linear-attention", "flash-linear-attention") or Provider(
        {"ssd": ssd_by(fla_scan)}
    )
