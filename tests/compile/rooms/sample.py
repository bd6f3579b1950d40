"""sample at the sizes of a byte model's head, whole and half, and at an odd one."""

from functools import partial

import torch

from bytekernels.sample import triton as sample
from rooms.batch import Case, empty


def _sample(vocabulary: int, rows: int, dtype: torch.dtype) -> None:
    logits = empty(rows, vocabulary, dtype=dtype)
    seeds, counters = (empty(rows, dtype=torch.int64) for _ in range(2))
    temperature, top_p, min_p = (empty(rows, dtype=torch.float32) for _ in range(3))
    sample.sample(logits, seeds, counters, temperature, empty(rows, dtype=torch.int32), top_p, min_p)


CASES: dict[str, Case] = {f"sample V={vocabulary}": partial(_sample, vocabulary, 64) for vocabulary in (256, 512, 1000)}
CASES["sample V=512 odd"] = partial(_sample, 512, 1)
