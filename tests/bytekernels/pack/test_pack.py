"""Packing: each implementation against a loop over bytes, in every ragged shape, and what it refuses."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bytekernels
from bytekernels import dispatch
from bytekernels.pack import bytes as packed_bytes
from bytekernels.pack import op
from bytekernels.ragged import cu_seqlens_of
from bytekernels.testing import ragged, ragged_lengths
from tests.bytekernels.pack.conftest import IMPLEMENTATIONS, int32, random_ids

DTYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex128]  # 1 to 16 bytes
documents = st.lists(st.binary(max_size=40), max_size=6)
lengths_lists = st.just([]) | ragged_lengths()


def random_cuts(draw_from, length):
    """Token lengths that cover `length` bytes."""
    cuts = []
    while length:
        cuts.append(draw_from.randint(1, min(length, 5)))
        length -= cuts[-1]
    return cuts


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(documents=documents, bos=st.none() | st.integers(0, 255))
def test_pack_bytes(impl, documents, bos):
    kinds = [bytes, bytearray, memoryview]
    given = [kinds[i % 3](document) for i, document in enumerate(documents)]
    with dispatch.force(impl):
        ids, cu_seqlens = bytekernels.pack_bytes(given, bos=bos)
    flat, offsets = [], [0]
    for document in documents:
        flat += ([] if bos is None else [bos]) + list(document)
        offsets.append(len(flat))
    assert ids.dtype == torch.uint8
    assert ids.tolist() == flat
    assert torch.equal(cu_seqlens, int32(offsets))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(documents=documents, bos=st.none() | st.integers(0, 255), slack=st.integers(0, 3))
def test_pack_bytes_of_padded_rows(impl, documents, bos, slack):
    width = max(map(len, documents), default=0) + slack
    rows = [list(document) + [7] * (width - len(document)) for document in documents]
    padded = torch.tensor(rows, dtype=torch.uint8).reshape(len(documents), width)
    lengths = torch.tensor([len(document) for document in documents], dtype=torch.int64)
    with dispatch.force(impl):
        ids, cu_seqlens = bytekernels.pack_bytes((padded, lengths), bos=bos)
        expected_ids, expected_cu = bytekernels.pack_bytes(documents, bos=bos)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(cu_seqlens, expected_cu)


def test_pack_bytes_defaults_to_the_bos_byte():
    ids, cu_seqlens = bytekernels.pack_bytes([b"ab", b""])
    assert ids.tolist() == [bytekernels.BOS, 97, 98, bytekernels.BOS]
    assert cu_seqlens.tolist() == [0, 3, 4]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(lengths=lengths_lists, trailing=st.sampled_from([(), (3,), (2, 5), (0,)]), pad=st.sampled_from([0, 1, 3]))
def test_unpack_and_back(impl, dtype, lengths, trailing, pad):
    cu_seqlens, total = ragged(lengths)
    count = total * int(np.prod(trailing, dtype=int))
    values = torch.arange(count).remainder(251).reshape(total, *trailing).to(dtype)
    with dispatch.force(impl):
        padded = bytekernels.unpack(values, cu_seqlens, pad)
        back = bytekernels.pack_padded(padded, cu_seqlens)
    assert padded.dtype == dtype
    assert padded.shape == (len(lengths), max(lengths, default=0), *trailing)
    element = torch.tensor(pad).to(dtype)
    for s, length in enumerate(lengths):
        assert torch.equal(padded[s, :length], values[cu_seqlens[s] : cu_seqlens[s + 1]])
        assert (padded[s, length:] == element).all()
    assert torch.equal(back, values)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_padding_takes_any_value_of_the_dtype(impl):
    cu_seqlens = int32([0, 1, 3])
    with dispatch.force(impl):
        padded = bytekernels.unpack(torch.tensor([5, 6, 7]), cu_seqlens, bytekernels.IGNORE)
        assert padded.tolist() == [[5, -100], [6, 7]]
        padded = bytekernels.unpack(torch.tensor([5.0, 6.0, 7.0]), cu_seqlens, float("-inf"))
        assert padded.tolist() == [[5.0, float("-inf")], [6.0, 7.0]]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(lengths=lengths_lists, with_boundary=st.booleans())
def test_next_byte_targets(impl, lengths, with_boundary):
    cu_seqlens, total = ragged(lengths)
    ids = random_ids(total)
    boundary = random_ids(total, seed=1) < 100 if with_boundary else None
    with dispatch.force(impl):
        targets = bytekernels.next_byte_targets(ids, cu_seqlens, boundary)
    expected = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for t in range(start, end):
            ends_chunk = boundary is not None and t + 1 < end and bool(boundary[t + 1])
            expected.append(-100 if t + 1 == end else int(ids[t + 1]) + 256 * ends_chunk)
    assert targets.dtype == torch.int64
    assert targets.tolist() == expected


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(lengths=lengths_lists, bos=st.booleans(), random=st.randoms(use_true_random=False))
def test_token_end_mask(impl, lengths, bos, random):
    cu_seqlens, total = ragged(lengths)
    tokens = [random_cuts(random, length - (bos and length > 0)) for length in lengths]
    token_cu = cu_seqlens_of(int32([len(t) for t in tokens]))
    flat = int32([length for t in tokens for length in t])
    with dispatch.force(impl):
        mask = bytekernels.token_end_mask(flat, token_cu, cu_seqlens, bos)
    expected = [False] * total
    for start, length, cuts in zip(cu_seqlens.tolist(), lengths, tokens, strict=False):
        at = start
        if bos and length:
            expected[at] = True
            at += 1
        for cut in cuts:
            at += cut
            expected[at - 1] = True
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected


def big_batch():
    """Documents of very uneven lengths, large enough that every thread gets a share that begins inside one."""
    generator = np.random.default_rng(0)
    lengths = [0, 1, 300_000, 0, 70_001, *generator.integers(0, 60, 5_000).tolist(), 200_000, 0]
    return [generator.bytes(length) for length in lengths]


def test_any_number_of_threads_gives_the_same():
    batch = big_batch()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ids, cu_seqlens = bytekernels.pack_bytes(batch)
            boundary = ids < 64
            padded_cu = cu_seqlens[4:60] - cu_seqlens[4]
            values = ids[cu_seqlens[4] : cu_seqlens[59]]
            padded = bytekernels.unpack(values, padded_cu, 9)
            ones = torch.ones(len(ids), dtype=torch.int32)
            results.append(
                (
                    ids,
                    cu_seqlens,
                    bytekernels.next_byte_targets(ids, cu_seqlens, boundary),
                    padded,
                    bytekernels.pack_padded(padded, padded_cu),
                    bytekernels.token_end_mask(ones, cu_seqlens, cu_seqlens, False),
                )
            )
            assert torch.equal(results[-1][4], values)
            assert bool(results[-1][5].all())
    finally:
        torch.set_num_threads(before)
    with dispatch.force("reference"):
        ids, cu_seqlens = bytekernels.pack_bytes(batch)
        expected = ids, cu_seqlens, bytekernels.next_byte_targets(ids, cu_seqlens, ids < 64)
    for result in results:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))
        assert all(torch.equal(got, want) for got, want in zip(result[:3], expected, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_unpack_and_pack_padded_gradients(impl):
    cu_seqlens, total = ragged([2, 0, 3, 1])
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(total, 2, dtype=torch.float64, generator=generator).requires_grad_()
    padded = torch.randn(4, 5, 2, dtype=torch.float64, generator=generator).requires_grad_()
    with dispatch.force(impl):
        assert torch.autograd.gradcheck(lambda v: bytekernels.unpack(v, cu_seqlens, 0.5), (values,))
        assert torch.autograd.gradcheck(lambda p: bytekernels.pack_padded(p, cu_seqlens), (padded,))
        assert torch.autograd.gradgradcheck(lambda v: bytekernels.unpack(v, cu_seqlens, 0.5) ** 2, (values,))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl):
    cu_seqlens, total = ragged([2, 0, 3, 1])
    ids = random_ids(total)
    values = torch.randn(total, 2).requires_grad_()
    padded = torch.randn(4, 5, 2).requires_grad_()
    with dispatch.force(impl):
        torch.library.opcheck(packed_bytes.pack_rows_op, (random_ids(8).reshape(2, 4), torch.tensor([3, 0]), 254))
        for length in (None, 4):
            torch.library.opcheck(op.unpack_op, (values, cu_seqlens, 0.5, length))
        for rows in (None, total):
            torch.library.opcheck(op.pack_padded_op, (padded, cu_seqlens, rows))
        for boundary in (None, ids < 100):
            torch.library.opcheck(op.next_byte_targets_op, (ids, cu_seqlens, boundary))
        torch.library.opcheck(op.token_end_mask_op, (int32([2, 1, 1, 1, 1]), int32([0, 1, 1, 4, 5]), cu_seqlens, False))
        torch.library.opcheck(op.row_index_op, (cu_seqlens, total))
        torch.library.opcheck(packed_bytes.pack_flat_op, (random_ids(total), cu_seqlens, 254))
        torch.library.opcheck(op.unpack_out_op, (values.detach(), cu_seqlens, 0.5, torch.empty(4, 4, 2)))
        torch.library.opcheck(op.pack_padded_out_op, (padded.detach(), cu_seqlens, torch.empty(total, 2)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_arguments(impl):
    cu_seqlens = torch.stack([int32([0, 1, 3]), int32([9, 9, 9])], dim=1)[:, 0]
    values = torch.arange(12).reshape(4, 3).T
    with dispatch.force(impl):
        padded = bytekernels.unpack(values, cu_seqlens, -1)
        assert padded.tolist() == [[[0, 3, 6, 9], [-1] * 4], [[1, 4, 7, 10], [2, 5, 8, 11]]]
        assert torch.equal(bytekernels.pack_padded(padded.mT.contiguous().mT, cu_seqlens), values)


def refuses(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pack_bytes_refuses(impl):
    with dispatch.force(impl):
        with refuses(TypeError, "sequences[1] must be bytes, bytearray or a contiguous memoryview of bytes, got str"):
            bytekernels.pack_bytes([b"a", "b"])
        with refuses(TypeError, "use .encode()"):
            bytekernels.pack_bytes(["b"])
        for view in (memoryview(b"abcd")[::2], memoryview(b"abcd").cast("h")):
            with refuses(TypeError, "sequences[0] must be bytes, bytearray or a contiguous memoryview of bytes"):
                bytekernels.pack_bytes([view])
        with refuses(TypeError, "put it in []"):
            bytekernels.pack_bytes(b"abc")
        with refuses(ValueError, "bos must be a byte in [0, 255], or None for none, got 256"):
            bytekernels.pack_bytes([b"abc"], bos=256)
        rows = torch.zeros(2, 3, dtype=torch.uint8)
        with refuses(ValueError, "lengths must lie in [0, 3], padded's width, got 4 at 1"):
            bytekernels.pack_bytes((rows, torch.tensor([0, 4])))
        with refuses(ValueError, "lengths must lie in [0, 3], padded's width, got -1 at 0"):
            bytekernels.pack_bytes((rows, torch.tensor([-1, 2])))
        with refuses(ValueError, "got [2, 3] and [3]"):
            bytekernels.pack_bytes((rows, torch.tensor([1, 2, 3])))
        with refuses(TypeError, "got torch.float32 and torch.int64"):
            bytekernels.pack_bytes((rows.float(), torch.tensor([1, 2])))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_offsets_are_checked(impl):
    values, padded = torch.zeros(9), torch.zeros(3, 7)
    falling = int32([0, 7, 5, 9])
    with dispatch.force(impl):
        with refuses(ValueError, "cu_seqlens must not decrease, got 7 > 5 at index 1"):
            bytekernels.unpack(values, falling, 0)
        with refuses(ValueError, "cu_seqlens must not decrease, got 7 > 5 at index 1"):
            bytekernels.pack_padded(padded, falling)
        with refuses(ValueError, "cu_seqlens must not decrease, got 7 > 5 at index 1"):
            bytekernels.next_byte_targets(random_ids(9), falling)
        with refuses(ValueError, "end at 9, the number of rows; got 0 and 8"):
            bytekernels.unpack(values, int32([0, 8]), 0)
        with refuses(TypeError, "cu_seqlens must be int32, got torch.int64"):
            bytekernels.unpack(values, torch.tensor([0, 9]), 0)
        with refuses(ValueError, "sequence 1 of cu_seqlens has 8 rows, more than the 7 of a padded one"):
            bytekernels.pack_padded(padded, int32([0, 1, 9, 9]))
        with refuses(ValueError, "padded must have shape [2, L, ...]"):
            bytekernels.pack_padded(padded, int32([0, 1, 9]))
        with refuses(TypeError, "pad must be an integer for values of torch.int64, got 0.5"):
            bytekernels.unpack(values.long(), int32([0, 9]), 0.5)
        with refuses(TypeError, "ids must be uint8"):
            bytekernels.next_byte_targets(values, int32([0, 9]))
        with refuses(TypeError, "boundary must be bool"):
            bytekernels.next_byte_targets(random_ids(9), int32([0, 9]), values)
        with refuses(ValueError, "boundary must have ids' shape [9], got [8]"):
            bytekernels.next_byte_targets(random_ids(9), int32([0, 9]), values[:8].bool())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_token_lengths_are_checked(impl):
    cu_seqlens, token_cu = int32([0, 3, 3, 7]), int32([0, 2, 2, 4])
    with dispatch.force(impl):
        for lengths in ([1, 2, 2, 1], [1, 2, 4, 1], [1, 2, 2**31 - 1, 2**31 - 1]):
            message = f"token_lengths of sequence 2 sum to {sum(lengths[2:])}, but it has 4 bytes"
            with refuses(ValueError, message):
                bytekernels.token_end_mask(int32(lengths), token_cu, cu_seqlens, False)
        with refuses(ValueError, "token_lengths of sequence 0 sum to 3, but it has 2 bytes after BOS"):
            bytekernels.token_end_mask(int32([1, 2, 2, 1]), token_cu, cu_seqlens, True)
        for bad in (0, -1):
            with refuses(ValueError, f"token_lengths[2] is {bad} (sequence 2): every token covers at least one byte"):
                bytekernels.token_end_mask(int32([1, 2, bad, 4 - bad]), token_cu, cu_seqlens, False)
        with refuses(ValueError, "token_lengths of sequence 1 sum to 1, but it has 0 bytes"):
            bytekernels.token_end_mask(int32([3, 1, 4]), int32([0, 1, 2, 3]), cu_seqlens, False)
        with refuses(ValueError, "token_cu must start at 0 and end at 5"):
            bytekernels.token_end_mask(int32([1] * 5), token_cu, cu_seqlens, False)
        with refuses(ValueError, "token_cu must have cu_seqlens' shape [4], got [3]"):
            bytekernels.token_end_mask(int32([3, 4]), int32([0, 1, 2]), cu_seqlens, False)


def test_compiles_without_a_graph_break():
    cu_seqlens, total = ragged([2, 0, 3, 1])
    ids = random_ids(total)

    def targets_as_rows(ids, cu_seqlens):
        return bytekernels.unpack(bytekernels.next_byte_targets(ids, cu_seqlens), cu_seqlens, -100) + 1

    compiled = torch.compile(targets_as_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, cu_seqlens), targets_as_rows(ids, cu_seqlens))
