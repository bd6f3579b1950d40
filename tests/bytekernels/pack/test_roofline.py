"""The packing ops' rooflines against numbers counted by hand, and against the tensors that a call takes and gives."""

import pytest
import torch

import bytekernels
from bytekernels.pack import roofline
from bytekernels.ragged import cu_seqlens_of
from bytekernels.roofline import Work

BY_HAND = [  # 10 rows in 3 sequences, whose offsets are 16 bytes
    (roofline.pack_bytes(10, 3), 7 + 10 + 16),
    (roofline.pack_bytes(10, 3, bos=False), 10 + 10 + 16),
    (roofline.pack_bytes(10, 3, offsets=True), 7 + 16 + 10 + 16),
    (roofline.unpack(10, 3, 6, 8), 80 + 144 + 16),
    (roofline.pack_padded(10, 3, 8), 80 + 80 + 16),
    (roofline.next_byte_targets(10, 3), 10 + 10 + 80 + 16),
    (roofline.next_byte_targets(10, 3, boundary=False), 10 + 80 + 16),
    (roofline.token_end_mask(10, 4, 3), 16 + 16 + 16 + 10),
    (roofline.row_index(10, 3), 16 + 80),
]


@pytest.mark.parametrize(("work", "expected"), BY_HAND)
def test_work_by_hand(work, expected):
    assert work == Work(0, expected)


def size(*tensors):
    return sum(tensor.nbytes for tensor in tensors)


def test_bytes_of_packing_are_those_of_the_tensors():
    documents = [b"some", b"", b"words and more"]
    flat = torch.tensor(list(b"".join(documents)), dtype=torch.uint8)
    offsets = cu_seqlens_of(torch.tensor([len(document) for document in documents]))
    packed = bytekernels.pack_bytes(documents)
    shape = (len(packed[0]), len(documents))
    assert roofline.pack_bytes(*shape).bytes == size(flat, *packed)
    assert roofline.pack_bytes(*shape, offsets=True).bytes == size(flat, offsets, *packed)
    packed = bytekernels.pack_bytes(documents, bos=None)
    assert roofline.pack_bytes(len(packed[0]), 3, bos=False).bytes == size(flat, *packed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_bytes_of_padding_are_those_of_the_tensors(dtype):
    cu_seqlens = cu_seqlens_of(torch.tensor([5, 0, 7]))
    values = torch.zeros(12, 3, dtype=dtype)
    padded = bytekernels.unpack(values, cu_seqlens, 0)
    row_bytes = 3 * dtype.itemsize
    assert roofline.unpack(12, 3, 7, row_bytes).bytes == size(values, cu_seqlens, padded)
    assert roofline.pack_padded(12, 3, row_bytes).bytes == size(values, cu_seqlens, values)


def test_bytes_of_what_is_made_for_each_row_are_those_of_the_tensors():
    cu_seqlens, token_cu = (cu_seqlens_of(torch.tensor(lengths)) for lengths in ([6, 0, 5], [2, 0, 1]))
    token_lengths = torch.tensor([2, 3, 4], dtype=torch.int32)
    mask = bytekernels.token_end_mask(token_lengths, token_cu, cu_seqlens, True)
    assert roofline.token_end_mask(11, 3, 3).bytes == size(token_lengths, token_cu, cu_seqlens, mask)
    ids = torch.zeros(11, dtype=torch.uint8)
    targets = bytekernels.next_byte_targets(ids, cu_seqlens, mask)
    assert roofline.next_byte_targets(11, 3).bytes == size(ids, mask, cu_seqlens, targets)
    plain = bytekernels.next_byte_targets(ids, cu_seqlens)
    assert roofline.next_byte_targets(11, 3, boundary=False).bytes == size(ids, cu_seqlens, plain)
    assert roofline.row_index(11, 3).bytes == size(cu_seqlens, *bytekernels.row_index(cu_seqlens, 11))
