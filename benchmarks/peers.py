"""What the chunking kernels are measured against.

``eager`` is the chain of plain PyTorch ops that H-Net's architecture (Hwang et al. 2025, arXiv 2507.07955, section 2.2)
describes, on a packed batch: normalise, multiply, force the edges, argmax of (1 - p, p), cumulative sums for the
layout; index for the gather; EMA, gather by chunk, straight-through confidence, residual. ``compile`` is the same under
``torch.compile``, ``mamba-ssm`` the same with its SSD scan for the EMA. ``bytekernels`` is the public functions with
the implementation that they choose, ``reference`` their specification.

Every function takes its op's arguments by name and returns its outputs by name.
"""

import contextlib
import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

import bytekernels
from benchmarks import public
from benchmarks.harness import Function, Provider, Unavailable
from bytekernels import Routing

OPS = ("route", "gather", "dechunk", "roundtrip")
PROVIDERS = ("eager", "compile", "bytekernels", "mamba-ssm", "reference")
ON_REQUEST = ("reference",)
BLOCK = 16  # chunks of one matrix in ema(): of 8 to 128, 16 costs the least processor time at 13107 chunks of 512
NULLS = 64  # rows of null: the gradient of a single one would be summed in half precision

Average = Callable[[Tensor, Tensor, Tensor], Tensor]  # chunks [M, D], weight [M], cu_chunks [S+1] -> z [M, D]


def ema(chunks: Tensor, weight: Tensor, cu_chunks: Tensor) -> Tensor:
    """``z_m = w_m c_m + (1 - w_m) z_{m-1}`` by matrix products, in float32 (float64 for float64).

    Block by block, z is a lower triangular matrix of decays times the new rows, plus what is left of the state before
    the block; those states are an EMA over blocks. The packed axis is one sequence whose memory is wiped at each
    sequence's first chunk, so nothing is padded. Decays are exponentials of sums of log(1 - w); 1 - w is kept above
    1e-12, below which its gradient is taken to be zero. Of the forms that plain PyTorch offers this takes the least
    processor time (a loop over positions, all sequences at once, takes as much backward and more forward).
    """
    wide = torch.promote_types(chunks.dtype, torch.float32)
    first = torch.zeros(len(chunks) + 1, dtype=torch.bool, device=chunks.device)
    first = first.index_fill(0, cu_chunks.long(), True)[: len(chunks)]
    weight = torch.where(first, 1.0, weight.to(wide))
    return _decaying_sum(weight[:, None] * chunks, (1 - weight).clamp(min=1e-12).log())


def _decaying_sum(rows: Tensor, log_decay: Tensor) -> Tensor:
    """``y_m = rows_m + exp(log_decay_m) y_{m-1}``: [M, D] and [M] to [M, D]."""
    count, width = rows.shape
    blocks = -(-count // BLOCK)
    rows = F.pad(rows, (0, 0, 0, blocks * BLOCK - count)).view(blocks, BLOCK, width)
    log_decay = F.pad(log_decay, (0, blocks * BLOCK - count)).view(blocks, BLOCK)
    causal = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=rows.device).tril()
    between = log_decay[:, :, None].expand(-1, -1, BLOCK).masked_fill(~causal.tril(-1), 0).cumsum(1)
    y = between.exp().masked_fill(~causal, 0) @ rows  # [blocks, BLOCK, D]
    if blocks > 1:
        since_start = log_decay.cumsum(1)
        states = _decaying_sum(y[:, -1], since_start[:, -1])  # [blocks, D], after each block
        y = torch.addcmul(y, since_start.exp()[:, :, None], F.pad(states[:-1], (0, 0, 1, 0))[:, None])
    return y.reshape(blocks * BLOCK, width)[:count]


def mamba_ema(chunks: Tensor, weight: Tensor, cu_chunks: Tensor) -> Tensor:
    """The EMA by mamba-ssm's SSD scan: with A = -1, dt = -log(1 - w), x = w c / dt and B = C = 1 its state is z."""
    scan = public.mamba_ssm("ops.triton.ssd_combined").mamba_chunk_scan_combined
    count, width = chunks.shape
    heads = width // math.gcd(width, 64)  # of 64 columns where that goes
    first = torch.zeros(count + 1, dtype=torch.bool, device=chunks.device)
    first = first.index_fill(0, cu_chunks.long(), True)[:count]
    sequence = torch.repeat_interleave(cu_chunks.diff().long(), output_size=count).to(torch.int32)
    weight = torch.where(first, 1.0, weight.float())
    dt = -torch.log((1 - weight).clamp(min=1e-6))
    x = (weight / dt)[:, None] * chunks
    ones = torch.ones(1, count, 1, 1, dtype=chunks.dtype, device=chunks.device)
    z = scan(
        x.to(chunks.dtype).view(1, count, heads, width // heads),
        dt[None, :, None].expand(1, count, heads).contiguous(),
        -torch.ones(heads, device=chunks.device),
        ones,
        ones,
        chunk_size=256,
        seq_idx=sequence[None],
    )
    return z.view(count, width)


def eager_route(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> dict[str, Tensor]:
    """In float32 for half precision too: through a chain in bfloat16 the gradients miss bfloat16's tolerance."""
    cu = cu_seqlens.long()
    wide = torch.promote_types(q.dtype, torch.float32)
    left, right = (F.normalize(x.to(wide), dim=-1) for x in (q[:-1], k[1:]))
    prob = F.pad(((1 - torch.einsum("td,td->t", left, right)) / 2).clamp(0, 1), (0, 1), value=1.0)
    last = torch.zeros(len(q) + 1, dtype=torch.bool, device=q.device).index_fill(0, cu, True)[1:]
    prob = torch.where(last, 1.0, prob)
    boundary = torch.stack((1 - prob, prob), -1).argmax(-1) == 1
    count = F.pad(boundary.cumsum(0), (1, 0))
    cu_chunks = count[cu]
    newest = count[1:] - 1
    first = torch.repeat_interleave(cu_chunks[:-1], cu.diff(), output_size=len(q))
    chunk_of = torch.where(newest >= first, newest, -1)
    index = boundary.nonzero().flatten()
    return dict(prob=prob, boundary=boundary, chunk_of=chunk_of, index=index, cu_chunks=cu_chunks)


def eager_gather(h: Tensor, routing: Routing) -> dict[str, Tensor]:
    return dict(e=h[routing.index])


def eager_dechunk(
    chunks: Tensor,
    routing: Routing,
    weight: Tensor,
    null: Tensor,
    residual: Tensor,
    confidence: Tensor,
    *,
    average: Average = ema,
) -> dict[str, Tensor]:
    z = average(chunks, weight, routing.cu_chunks).to(chunks.dtype)
    rows = torch.arange(len(confidence), device=z.device) % NULLS + len(z)
    rows = torch.where(routing.chunk_of < 0, rows, routing.chunk_of)
    u = F.embedding(rows, torch.cat([z, null.expand(NULLS, -1)]))  # [T, D]
    straight_through = 1 + (confidence - confidence.detach())
    return dict(u=u * straight_through.to(u.dtype)[:, None] + residual)


def eager_roundtrip(
    q: Tensor, k: Tensor, h: Tensor, null: Tensor, residual: Tensor, cu_seqlens: Tensor, *, average: Average = ema
) -> dict[str, Tensor]:
    routing = Routing(**eager_route(q, k, cu_seqlens))
    chunks = eager_gather(h, routing)["e"]
    weight = routing.prob[routing.index]
    confidence = torch.where(routing.boundary, routing.prob, 1 - routing.prob)
    return eager_dechunk(chunks, routing, weight, null, residual, confidence, average=average)


def our_route(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> dict[str, Tensor]:
    return bytekernels.route(q, k, cu_seqlens)._asdict()


def our_gather(h: Tensor, routing: Routing) -> dict[str, Tensor]:
    return dict(e=bytekernels.gather_chunks(h, routing))


def our_dechunk(
    chunks: Tensor, routing: Routing, weight: Tensor, null: Tensor, residual: Tensor, confidence: Tensor
) -> dict[str, Tensor]:
    u = bytekernels.dechunk(chunks, routing, weight=weight, null=null, residual=residual, confidence=confidence)
    return dict(u=u)


def our_roundtrip(
    q: Tensor, k: Tensor, h: Tensor, null: Tensor, residual: Tensor, cu_seqlens: Tensor
) -> dict[str, Tensor]:
    routing = bytekernels.route(q, k, cu_seqlens)
    chunks = bytekernels.gather_chunks(h, routing)
    weight = routing.prob[routing.index.long()]
    confidence = torch.where(routing.boundary, routing.prob, 1 - routing.prob)
    return our_dechunk(chunks, routing, weight, null, residual, confidence)


EAGER: dict[str, Function] = {
    "route": eager_route,
    "gather": eager_gather,
    "dechunk": eager_dechunk,
    "roundtrip": eager_roundtrip,
}
OURS: dict[str, Function] = {
    "route": our_route,
    "gather": our_gather,
    "dechunk": our_dechunk,
    "roundtrip": our_roundtrip,
}


@contextlib.contextmanager
def _specification() -> Iterator[None]:
    """Every op by its reference: an environment variable reaches the threads of the backward pass too."""
    before = os.environ.get("BYTEKERNELS_IMPL")
    os.environ["BYTEKERNELS_IMPL"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["BYTEKERNELS_IMPL"]
        else:
            os.environ["BYTEKERNELS_IMPL"] = before


REFERENCE = Provider(OURS, _specification)


def providers(names: Iterable[str], device: torch.device) -> dict[str, Provider | Unavailable]:
    """The providers of these names, those that can't run on this device with the reason."""
    made: dict[str, Callable[[], Provider | Unavailable]] = {
        "eager": lambda: Provider(EAGER),
        "compile": lambda: compiled(EAGER, device),
        "bytekernels": lambda: Provider(OURS),
        "mamba-ssm": lambda: _mamba(device),
        "reference": lambda: REFERENCE,
    }
    return {name: made[name]() for name in names}


def compiled(functions: Mapping[str, Function], device: torch.device) -> Provider | Unavailable:
    """The functions under ``torch.compile``, or why they can't be."""
    compiler = os.environ.get("CXX", "g++") if device.type == "cpu" else os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        return Unavailable(f"torch.compile needs a compiler, and {compiler!r} is not there")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return Unavailable("torch.compile needs Triton on a GPU: pip install triton")
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # a backward on a kept graph must leave its buffers alone
    torch.compiler.reset()
    return Provider({op: torch.compile(function, dynamic=False) for op, function in functions.items()})


def _mamba(device: torch.device) -> Provider | Unavailable:
    if device.type != "cuda":
        return Unavailable(f"mamba-ssm's scan runs on CUDA devices alone, not on {device}")
    load = functools.partial(public.mamba_ssm, "ops.triton.ssd_combined")
    return public.missing(load, "mamba-ssm", "mamba-ssm") or Provider(
        {op: functools.partial(EAGER[op], average=mamba_ema) for op in ("dechunk", "roundtrip")}
    )
