"""What the tests of align share: small corpora, spans of them, and a batch made byte by byte."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import bytekernels

NAMES = bytekernels.AlignedBatch._fields


@dataclass(frozen=True)
class Case:
    """The arguments of a call."""

    text: np.ndarray
    token_ids: np.ndarray
    token_lengths: np.ndarray
    spans: np.ndarray
    ends: np.ndarray | None = None

    def pack(self, **options: Any) -> bytekernels.AlignedBatch:
        options = {"bos_id": 1, "eos_id": 2, "ends": self.ends} | options
        return bytekernels.align_pack(self.text, self.token_ids, self.token_lengths, self.spans, **options)

    def but(self, **changes: Any) -> "Case":
        return replace(self, **changes)


def case_of(lengths, cuts, ends=None, dtype=np.uint16, seed=0):
    """Tokens of these lengths over text of their own, with spans from token to token as in `cuts`."""
    generator = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    first, last = np.array(cuts, dtype=np.int64).reshape(-1, 2).T
    return Case(
        generator.integers(0, 256, starts[-1], dtype=np.uint8),
        generator.integers(-(2**31), 2**31, len(lengths)).astype(np.int32),
        np.array(lengths, dtype=dtype),
        np.stack([starts[first], starts[last] - starts[first], first, last - first], axis=1),
        None if ends is None else np.array(ends, dtype=bool),
    )


@st.composite
def cases(draw):
    """Up to 30 tokens, and up to 6 spans of them in any order, that may overlap and be empty."""
    lengths = draw(st.lists(st.integers(1, 6) | st.sampled_from([1, 300]), max_size=30))
    cuts = draw(st.lists(st.tuples(*[st.integers(0, len(lengths))] * 2).map(sorted), max_size=6))
    ends = draw(st.none() | st.lists(st.booleans(), min_size=len(cuts), max_size=len(cuts)))
    return case_of(lengths, cuts, ends, draw(st.sampled_from([np.uint16, np.int32])), draw(st.integers(0, 9)))


def byte_by_byte(case, *, bos_id=1, eos_id=2, bos=0xFE, eos=0xFF, targets=True):
    """The six parts of the batch as lists."""
    ids, cu, token_end, token_ids, token_cu, wanted = [], [0], [], [], [0], []
    ends = [False] * len(case.spans) if case.ends is None else case.ends.tolist()
    for (first_byte, count, first_token, tokens), end in zip(case.spans.tolist(), ends, strict=True):
        start = len(ids)
        ids.append(bos)
        token_end.append(True)
        token_ids.append(bos_id)
        for token in range(first_token, first_token + tokens):
            token_ids.append(int(case.token_ids[token]))
            token_end += [False] * (int(case.token_lengths[token]) - 1) + [True]
        for at in range(first_byte, first_byte + count):
            ids.append(int(case.text[at]))
        if end:
            ids.append(eos)
            token_end.append(True)
            token_ids.append(eos_id)
        for t in range(start, len(ids) - 1):
            wanted.append(ids[t + 1] + 256 * token_end[t + 1])
        wanted.append(-100)
        cu.append(len(ids))
        token_cu.append(len(token_ids))
    return ids, cu, token_end, token_ids, token_cu, wanted if targets else None


def assert_same(batch, other):
    for name, value, expected in zip(NAMES, batch, other, strict=True):
        assert (value is None) == (expected is None), name
        if value is not None:
            assert value.dtype == expected.dtype, name
            assert torch.equal(value, expected), name
