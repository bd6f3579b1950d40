"""Arbitrary offsets straight into the native functions: refused in words, or right; never out of bounds.

Outputs lie between margins that must stay as they were, and `make sanitize` runs this under AddressSanitizer.
"""

import contextlib
from itertools import accumulate, pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytekernels import _C
from bytekernels.extension import array
from bytekernels.pack import reference
from tests.bytekernels.pack.conftest import int32, random_ids

MARGIN, CANARY = 64, 0xA5
INT32 = st.integers(-(2**31), 2**31 - 1)
NEAR = st.integers(-2, 12)
SIZE = st.one_of(NEAR, st.integers(-(2**63), 2**63 - 1))


def offsets_of(lengths):
    return list(accumulate(lengths, initial=0))


@st.composite
def spoiled(draw, values):
    """The values, with none, one or two of them changed to anything."""
    values = list(values)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        if values:
            values[draw(st.integers(0, len(values) - 1))] = draw(NEAR | INT32)
    return values


@st.composite
def cut_rows(draw):
    """Offsets and a number of rows that they cut, or nearly; or that have nothing to do with each other."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.lists(NEAR | INT32, min_size=1, max_size=8)), draw(st.integers(0, 12))
    cu = offsets_of(draw(st.lists(st.integers(0, 4), max_size=6)))
    return draw(spoiled(cu)), cu[-1]


@st.composite
def tokens_of_rows(draw):
    """(offsets of rows, their number, token lengths, offsets of tokens, whether there is BOS), right or nearly."""
    bos = draw(st.booleans())
    tokens = draw(st.lists(st.lists(st.integers(1, 4), max_size=4), max_size=4))
    rows = offsets_of(sum(own) + bos for own in tokens)
    lengths = [length for own in tokens for length in own]
    cu, token_cu = draw(spoiled(rows)), draw(spoiled(offsets_of(map(len, tokens))))
    return cu, rows[-1], draw(spoiled(lengths)), token_cu, bos


class Guarded:
    """An output between margins."""

    def __init__(self, count, dtype):
        size = count * dtype.itemsize
        self.memory = torch.full((size + 2 * MARGIN,), CANARY, dtype=torch.uint8)
        self.values = self.memory[MARGIN : MARGIN + size].view(dtype)

    def assert_margins(self):
        assert bool((self.memory[:MARGIN] == CANARY).all())
        assert bool((self.memory[len(self.memory) - MARGIN :] == CANARY).all())


def is_well_formed(cu, total):
    return cu[0] == 0 and cu[-1] == total and all(a <= b for a, b in pairwise(cu))


def assert_refused_or_right(call, guarded, expected, *, legal):
    """``call`` succeeds just where the arguments are legal, and then gives what ``expected`` does."""
    if legal:
        call()
        for output, value in zip(guarded, expected(), strict=True):
            assert torch.equal(output.values, value.flatten())
    else:
        with pytest.raises(ValueError, match=r"\w+ .* \w+"):
            call()
    for output in guarded:
        output.assert_margins()


def on_both(function, *arguments):
    """The CPU's function and the CUDA kernel's body on the host."""
    return (
        lambda: getattr(_C, function)(*arguments, 2),
        lambda: getattr(_C.cuda, function)(*arguments, -1, 0),
    )


@settings(max_examples=200)
@given(rows=cut_rows(), with_boundary=st.booleans())
def test_targets_and_row_index(rows, with_boundary):
    cu, total = rows
    ids, cut = random_ids(total), int32(cu)
    boundary = ids < 100 if with_boundary else None
    legal = is_well_formed(cu, total)
    targets = Guarded(total, torch.int64)
    ends = None if boundary is None else array(boundary)
    for call in on_both("next_byte_targets", array(ids), ends, array(cut), array(targets.values)):
        assert_refused_or_right(call, [targets], lambda: [reference.next_byte_targets(ids, cut, boundary)], legal=legal)
    indices = [Guarded(total, torch.int32) for _ in range(2)]
    for call in on_both("row_index", array(cut), *(array(index.values) for index in indices)):
        assert_refused_or_right(call, indices, lambda: reference.row_index(cut, total), legal=legal)


@settings(max_examples=300)
@given(rows=cut_rows(), row_bytes=st.integers(-1, 5), wild=st.booleans(), size=SIZE, other=st.integers(0, 9))
def test_pack_padded_and_unpack(rows, row_bytes, wild, size, other):
    cu, total = rows
    length = size if wild else max((end - begin for begin, end in pairwise(cu)), default=0)
    sequences = len(cu) - 1 if other else 3
    cut, element = int32(cu), torch.tensor([9], dtype=torch.uint8)
    is_small = 0 <= length <= 12  # of larger ones no padded row is made here: most are refused for its size
    width = max(row_bytes, 0)
    padded = random_ids(sequences * (length if is_small else 3) * width)
    values = random_ids(total * width, seed=1)
    shape = (len(cu) - 1, length, width)
    fits = row_bytes >= 0 and is_well_formed(cu, total) and prod(shape) == len(padded)
    legal = fits and is_small and all(end - begin <= length for begin, end in pairwise(cu))
    packed, room = Guarded(len(values), torch.uint8), Guarded(len(padded), torch.uint8)

    def pack():
        _C.pack_padded(array(padded), array(cut), row_bytes, total, length, array(packed.values), 2)

    def unpack():
        _C.unpack(array(values), array(cut), array(element), row_bytes, total, length, array(room.values), 2)

    def pack_on_grid():
        _C.cuda.pack_padded(array(padded), array(cut), row_bytes, length, -1, array(packed.values), -1, 0)

    def unpack_on_grid():
        _C.cuda.unpack(array(values), array(cut), b"\x09", row_bytes, total, length, array(room.values), -1, 0)

    if not is_small:
        for call in (pack, unpack, pack_on_grid, unpack_on_grid):
            with contextlib.suppress(ValueError):
                call()
        for output in (packed, room):
            output.assert_margins()
        return
    assert_refused_or_right(
        pack, [packed], lambda: [reference.pack_padded(padded.view(shape), cut, total)], legal=legal
    )
    assert_refused_or_right(
        unpack, [room], lambda: [reference.unpack(values.view(total, width), cut, 9, length)], legal=legal
    )


@settings(max_examples=300)
@given(batch=tokens_of_rows())
def test_token_ends(batch):
    cu, total, tokens, cuts, bos = batch
    lengths, token_cu, cut = int32(tokens), int32(cuts), int32(cu)
    legal = is_well_formed(cu, total) and is_well_formed(cuts, len(tokens)) and len(cu) == len(cuts)
    if legal:
        for s in range(len(cu) - 1):
            own = tokens[cuts[s] : cuts[s + 1]]
            covered = cu[s + 1] - cu[s] - (1 if bos and cu[s + 1] > cu[s] else 0)
            legal = legal and min(own, default=1) >= 1 and sum(own) == covered
    mask = Guarded(total, torch.bool)
    arguments = array(lengths), array(token_cu), array(cut), bos, array(mask.values)
    assert_refused_or_right(
        lambda: _C.token_end_mask(*arguments, 2),
        [mask],
        lambda: [reference.token_end_mask(lengths, token_cu, cut, bos, total)],
        legal=legal,
    )


@settings(max_examples=200)
@given(
    rows=cut_rows(),
    data=st.data(),
    bos=st.sampled_from([-1, -1, 0, 254, 255, -2, 256]),
    more=st.sampled_from([0, 0, 1]),
)
def test_pack_flat(rows, data, bos, more):
    flat_cu, count = rows
    shift = 0 if bos == -1 else 1
    right = [n + s * shift for s, n in enumerate(flat_cu)]
    cu = data.draw(spoiled(int32([n % 2**31 for n in right]).tolist()))
    total = count + (len(flat_cu) - 1) * shift + more
    flat, cut, documents = random_ids(count), int32(cu), int32(flat_cu)
    legal = -1 <= bos <= 255 and is_well_formed(flat_cu, count) and total == count + (len(flat_cu) - 1) * shift
    ids = Guarded(total, torch.uint8)
    first = None if bos == -1 else bos
    assert_refused_or_right(
        lambda: _C.pack_flat(array(flat), array(documents), bos, array(cut), array(ids.values), 2),
        [ids],
        lambda: [reference.pack_flat(flat, documents, first)[0]],
        legal=legal and cu == right,
    )
    starts = Guarded(len(flat_cu), torch.int32)
    arguments = array(flat), array(documents), bos, array(starts.values), array(ids.values)
    assert_refused_or_right(
        lambda: _C.cuda.pack_flat(*arguments, -1, 0),
        [ids, starts],
        lambda: reference.pack_flat(flat, documents, first),
        legal=legal,
    )
