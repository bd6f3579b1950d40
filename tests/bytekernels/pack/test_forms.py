"""Flat documents, where rows lie, outputs that the caller gives, and sizes that need not be read."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bytekernels
from bytekernels import dispatch
from bytekernels.extension import _chip_refusal
from bytekernels.testing import ragged, ragged_lengths
from tests.bytekernels.pack.conftest import IMPLEMENTATIONS, int32, random_ids, shifted

documents = st.lists(st.binary(max_size=40), max_size=6)
lengths_lists = st.just([]) | ragged_lengths()


def refuses(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(documents=documents, bos=st.none() | st.integers(0, 255), shift=st.integers(0, 17))
def test_flat_documents(impl, documents, bos, shift):
    flat = shifted(torch.frombuffer(bytearray(b"".join(documents) + b" "), dtype=torch.uint8)[:-1], shift)
    offsets, _ = ragged([len(document) for document in documents])
    with dispatch.force(impl):
        ids, cu_seqlens = bytekernels.pack_bytes((flat, offsets), bos=bos)
        expected_ids, expected_cu = bytekernels.pack_bytes(documents, bos=bos)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(cu_seqlens, expected_cu)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(lengths=lengths_lists)
def test_row_index(impl, lengths):
    cu_seqlens, total = ragged(lengths)
    with dispatch.force(impl):
        sequence, position = bytekernels.row_index(cu_seqlens, total)
    assert (sequence.dtype, position.dtype) == (torch.int32, torch.int32)
    assert sequence.tolist() == [s for s, length in enumerate(lengths) for _ in range(length)]
    assert position.tolist() == [t for length in lengths for t in range(length)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(lengths=lengths_lists, slack=st.integers(0, 3), shift=st.integers(0, 5))
def test_out_is_written_into(impl, lengths, slack, shift):
    cu_seqlens, total = ragged(lengths)
    values = torch.arange(total * 3, dtype=torch.int16).reshape(total, 3)
    longest = max(lengths, default=0) + slack
    room = shifted(torch.full((len(lengths), longest, 3), -7, dtype=torch.int16), shift)
    with dispatch.force(impl):
        padded = bytekernels.unpack(values, cu_seqlens, -1, out=room)
        assert padded.data_ptr() == room.data_ptr()
        assert torch.equal(padded, bytekernels.unpack(values, cu_seqlens, -1, length=longest))
        back = shifted(torch.full_like(values, -7), shift)
        assert bytekernels.pack_padded(padded, cu_seqlens, out=back).data_ptr() == back.data_ptr()
        assert torch.equal(bytekernels.pack_padded(padded, cu_seqlens, total=total), values)
    assert torch.equal(back, values)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_documents_into_a_given_output(impl):
    room = torch.empty(8, dtype=torch.uint8)
    with dispatch.force(impl):
        ids, cu_seqlens = bytekernels.pack_bytes([b"ab", b"", b"cde"], out=room)
        assert ids.data_ptr() == room.data_ptr()
        assert bytes(ids.tolist()) == b"\xfeab\xfe\xfecde"
        assert cu_seqlens.tolist() == [0, 3, 4, 8]
        with refuses(ValueError, "out must be contiguous of shape [8], the bytes of the batch, got [7]"):
            bytekernels.pack_bytes([b"ab", b"", b"cde"], out=room[1:])
        with refuses(ValueError, "out must be uint8 [T] on cpu, got torch.int64"):
            bytekernels.pack_bytes([b"ab"], out=room.long())
        with refuses(ValueError, "out is for a list of documents"):
            bytekernels.pack_bytes((random_ids(2), int32([0, 2])), out=room)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sizes_that_are_given_must_be_right(impl):
    cu_seqlens = int32([0, 1, 3])
    values, padded = torch.zeros(3), torch.zeros(2, 2)
    with dispatch.force(impl):
        with refuses(ValueError, "sequence 1 of cu_seqlens has 2 rows, more than the 1 of a padded one"):
            bytekernels.unpack(values, cu_seqlens, 0, length=1)
        with refuses(ValueError, "cu_seqlens must start at 0 and end at 4, the number of rows; got 0 and 3"):
            bytekernels.pack_padded(padded, cu_seqlens, total=4)
        with refuses(ValueError, "cu_seqlens must start at 0 and end at 4, the number of rows; got 0 and 3"):
            bytekernels.row_index(cu_seqlens, 4)
        with refuses(ValueError, "total must be 5, the bytes of all rows with BOS, got 4"):
            bytekernels.pack_bytes((random_ids(4).view(2, 2), torch.tensor([1, 2])), total=4)
        with refuses(ValueError, "total is for padded rows"):
            bytekernels.pack_bytes([b"abc"], total=4)
        with refuses(ValueError, "offsets must not decrease, got 3 > 2 at index 1"):
            bytekernels.pack_bytes((random_ids(4), int32([0, 3, 2, 4])))
        with refuses(ValueError, "out must be contiguous torch.float32 [2, 2] on cpu, got torch.float64 [2, 2]"):
            bytekernels.unpack(values, cu_seqlens, 0, out=torch.zeros(2, 2, dtype=torch.float64))
        with refuses(ValueError, "out takes no gradients"):
            bytekernels.unpack(values.clone().requires_grad_(), cu_seqlens, 0, out=torch.zeros(2, 2))


def test_what_a_build_for_some_chips_runs_on():
    built = ("80", "90", "100")
    assert [
        chip for chip in ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0)) if _chip_refusal(chip, built)
    ] == [(7, 5)]
    assert "build it with BYTEKERNELS_CUDA_ARCHITECTURES=75" in _chip_refusal((7, 5), built)
    assert _chip_refusal((8, 0), ("86", "90")) is not None
