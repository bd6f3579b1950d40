"""Byte marginals through the extension: csrc/marginals.h. Logits of any dtype but float64 on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array, fresh, rows, threads


def byte_marginals(
    logits: Tensor,
    chunk_of: Tensor,
    prefix: Tensor,
    edges: Tensor,
    children: Tensor,
    nodes: Tensor,
    levels: Sequence[int],
    order: Tensor,
    spans: Tensor,
) -> Tensor:
    logits = logits.float() if logits.dtype == torch.float16 else logits
    out = fresh(logits, (len(chunk_of), 512), torch.float32)
    _C.byte_marginals(
        logits.dtype == torch.bfloat16,
        (logits.shape[0], logits.shape[1]),
        rows(logits),
        (array(edges), array(children), array(order), array(spans)),
        array(chunk_of.contiguous()),
        array(prefix.contiguous()),
        array(out),
        threads(),
    )
    return out


def token_prefix(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, edges: Tensor, children: Tensor) -> Tensor:
    prefix = edges.new_empty(ids.shape)
    _C.token_prefix(
        array(ids.contiguous()),
        array(cu_seqlens.contiguous()),
        array(boundary.contiguous()),
        array(edges),
        array(children),
        array(prefix),
        threads(),
    )
    return prefix
