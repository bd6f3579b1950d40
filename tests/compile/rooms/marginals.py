"""byte_marginals of a large vocabulary and of a small one."""

from functools import partial

import torch

from bytekernels.marginals import triton as marginals
from rooms.batch import EVEN, ODD, Batch, Case, empty


def _marginals(vocabulary: int, batch: Batch, dtype: torch.dtype) -> None:
    nodes = 2 * vocabulary + 1
    edges, children, ids, spans = (
        empty(*shape, dtype=torch.int32) for shape in ((nodes,), (nodes + 1,), (nodes,), (nodes, 3))
    )
    logits, order = empty(batch.chunks, vocabulary, dtype=dtype), empty(vocabulary, dtype=torch.int32)
    prefix = empty(batch.bytes, dtype=torch.int32)
    marginals.byte_marginals(logits, batch.chunk_of(), prefix, edges, children, ids, [0, nodes], order, spans)


CASES: dict[str, Case] = {
    f"marginals V={vocabulary}": partial(_marginals, vocabulary, EVEN) for vocabulary in (4099, 128256)
}
CASES["marginals V=128256 odd"] = partial(_marginals, 128256, ODD)
