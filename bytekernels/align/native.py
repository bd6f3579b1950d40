"""Aligned batches through the extension: csrc/align.h."""

import numpy as np
import torch

from bytekernels import _C
from bytekernels.align.batch import AlignedBatch, Layout
from bytekernels.extension import array, fresh


def align_pack(
    text: np.ndarray,
    token_ids: np.ndarray,
    token_lengths: np.ndarray,
    spans: np.ndarray,
    ends: np.ndarray | None,
    bos_id: int,
    eos_id: int | None,
    bos: int,
    eos: int,
    targets: bool,
    pin: bool,
    threads: int,
) -> AlignedBatch:
    corpus = array(text), array(token_ids)
    chosen = array(spans), None if ends is None else array(ends)
    rows, tokens = _C.align_sizes(*corpus, *chosen, eos_id is not None)
    layout = Layout(rows, tokens, len(spans), targets)
    if pin:
        arena = torch.empty(layout.size, dtype=torch.uint8, pin_memory=True)
    else:
        arena = fresh(torch.empty(0, dtype=torch.uint8), (layout.size,))
    batch = layout.batch(arena)
    narrow = token_lengths.dtype == np.uint16
    outputs = tuple(None if tensor is None else array(tensor) for tensor in batch)
    _C.align_pack(narrow, *corpus, array(token_lengths), *chosen, bos_id, eos_id, bos, eos, outputs, threads)
    return batch
