"""Arbitrary numbers straight into the native function: it refuses as the reference does, or gives what that gives."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytekernels import _C
from bytekernels.align import reference
from bytekernels.align.batch import Layout
from bytekernels.extension import array
from tests.bytekernels.align.conftest import Case, assert_same, cases

CANARY = 0xA5
MARGIN = 256  # bytes, before and after each output
EXTREMES = [s * (2**bits + d) for bits in (15, 16, 31, 32, 62, 63) for d in (-1, 0, 1) for s in (1, -1)]
INT64 = st.sampled_from([value for value in EXTREMES if -(2**63) <= value < 2**63])
SMALL = st.integers(-2, 12)


def int32(value):
    return (value + 2**31) % 2**32 - 2**31


@st.composite
def wild_cases(draw):
    """Numbers that fit each other by accident alone."""
    lengths = draw(st.lists(st.integers(1, 4) | SMALL | INT64, max_size=10))
    sequences = draw(st.integers(0, 4))
    row = st.tuples(*[SMALL | INT64] * 4) | st.tuples(*[st.integers(0, 3)] * 4)
    spans = draw(st.lists(row, min_size=sequences, max_size=sequences))
    flags = st.binary(min_size=sequences, max_size=sequences)
    narrow = draw(st.booleans())
    return Case(
        np.arange(draw(st.integers(0, 12)), dtype=np.uint8),
        np.arange(len(lengths), dtype=np.int32),
        np.array([n % 2**16 if narrow else int32(n) for n in lengths], dtype=np.uint16 if narrow else np.int32),
        np.array(spans, dtype=np.int64).reshape(-1, 4),
        draw(st.none() | flags.map(lambda flags: np.frombuffer(flags, dtype=np.uint8).astype(bool))),
    )


@st.composite
def nearly_right_cases(draw):
    """Cases that are right, but for a number or two."""
    case = draw(cases())
    spans, lengths = case.spans.copy(), case.token_lengths.copy()
    for _ in range(draw(st.integers(0, 2))):
        value = draw(SMALL | INT64)
        if len(spans) and draw(st.booleans()):
            spans[draw(st.integers(0, len(spans) - 1)), draw(st.integers(0, 3))] = value
        elif len(lengths):
            value = value % 2**16 if lengths.dtype == np.uint16 else int32(value)
            lengths[draw(st.integers(0, len(lengths) - 1))] = value
    return case.but(spans=spans, token_lengths=lengths)


def guarded(layout):
    """Outputs for the layout, each in an allocation of its own between margins; and the allocations."""
    memory, outputs = [], []
    for begin, end in layout.sections.values():
        memory.append(np.full(end - begin + 2 * MARGIN, CANARY, dtype=np.uint8))
        outputs.append(memory[-1][MARGIN:-MARGIN] if begin < end else memory[-1][:0])
    return memory, outputs


def result_of(call):
    try:
        return call(), None
    except ValueError as error:
        return None, str(error)


def native(case, eos_id, targets, threads):
    corpus = array(case.text), array(case.token_ids)
    chosen = array(case.spans), None if case.ends is None else array(case.ends)
    rows, tokens = _C.align_sizes(*corpus, *chosen, eos_id is not None)
    layout = Layout(rows, tokens, len(case.spans), targets)
    memory, outputs = guarded(layout)
    to = [array(output) for output in outputs] + [None] * (not targets)
    narrow = case.token_lengths.dtype == np.uint16
    try:
        _C.align_pack(narrow, *corpus, array(case.token_lengths), *chosen, 1, eos_id, 0xFE, 0xFF, tuple(to), threads)
    finally:
        for name, block in zip(layout.sections, memory, strict=True):
            assert (block[:MARGIN] == CANARY).all(), f"written before {name}"
            assert (block[-MARGIN:] == CANARY).all(), f"written after {name}"
    arena = torch.empty(layout.size, dtype=torch.uint8)
    for (begin, end), output in zip(layout.sections.values(), outputs, strict=True):
        arena[begin:end] = torch.from_numpy(output)
    return layout.batch(arena)


def assert_agrees(case, eos_id, targets, threads):
    got, refusal = result_of(lambda: native(case, eos_id, targets, threads))
    arguments = case.text, case.token_ids, case.token_lengths, case.spans, case.ends
    expected, expected_refusal = result_of(
        lambda: reference.align_pack(*arguments, 1, eos_id, 0xFE, 0xFF, targets, False, 1)
    )
    assert refusal == expected_refusal
    if refusal is None:
        assert_same(got, expected)


@settings(max_examples=600)
@given(case=wild_cases(), eos_id=st.sampled_from([None, 2]), targets=st.booleans(), threads=st.integers(1, 2))
def test_wild_numbers(case, eos_id, targets, threads):
    assert_agrees(case, eos_id, targets, threads)


@settings(max_examples=400)
@given(case=nearly_right_cases(), eos_id=st.sampled_from([None, 2]), targets=st.booleans(), threads=st.integers(1, 2))
def test_nearly_right_numbers(case, eos_id, targets, threads):
    assert_agrees(case, eos_id, targets, threads)
