"""The CUDA kernels' grid, their bodies on the host at every address, and outputs past 2^31 bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bytekernels
from bytekernels import _C, dispatch
from bytekernels.extension import array
from bytekernels.ragged import cu_seqlens_of
from bytekernels.testing import ragged, ragged_lengths
from tests.bytekernels.pack.conftest import int32, random_ids, shifted

TILE = 1024  # items of a block at a time: csrc/ragged.h


def visits(items, most_blocks):
    counts = torch.zeros(items, dtype=torch.uint8)
    _C.cuda.visit(items, most_blocks, array(counts))
    return counts


@pytest.mark.parametrize("most_blocks", [1, 2, 3, 7, 2**31 - 1])
@pytest.mark.parametrize("items", [0, 1, 255, 256, TILE - 1, TILE, TILE + 1, 5 * TILE + 300, 21 * TILE, 100_000])
def test_every_item_is_visited_once(items, most_blocks):
    assert bool((visits(items, most_blocks) == 1).all())


def test_every_vector_of_a_gigabyte_is_visited_once():
    vectors = 10**9 // 16 + 2
    for most_blocks in (2**31 - 1, 132 * 8):
        assert bool((visits(vectors, most_blocks) == 1).all())


def assert_as_native(call):
    with dispatch.force("native"):
        expected = call()
    with dispatch.force("cuda"):
        got = call()
    for value, wanted in zip(got, expected, strict=True):
        assert torch.equal(value, wanted)


@given(lengths=ragged_lengths(), source=st.integers(0, 16), target=st.integers(0, 16), row=st.integers(1, 5))
def test_any_address(lengths, source, target, row):
    cu_seqlens, total = ragged(lengths)
    values = shifted(random_ids(total * row).view(total, row), source)
    padded = shifted(random_ids(len(lengths) * max(lengths) * row).view(len(lengths), -1, row), source)
    boundary = shifted(random_ids(total, seed=1) < 90, source)

    def call():
        room, back = shifted(torch.zeros_like(padded), target), shifted(torch.zeros_like(values), target)
        return (
            bytekernels.unpack(values, cu_seqlens, 3, out=room),
            bytekernels.pack_padded(padded, cu_seqlens, out=back),
            bytekernels.next_byte_targets(values[:, 0].contiguous(), cu_seqlens, boundary),
        )

    assert_as_native(call)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.int64, torch.complex128])
@pytest.mark.parametrize("target", range(4))
def test_padding_of_wide_elements_at_any_address(dtype, target):
    cu_seqlens, total = ragged([3, 0, 5, 1])
    values = torch.arange(total * 3).reshape(total, 3).to(dtype)

    def call():
        return (bytekernels.unpack(values, cu_seqlens, 77, out=shifted(torch.zeros(4, 5, 3, dtype=dtype), target)),)

    assert_as_native(call)


def test_a_million_sequences():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 9, (10**6,), generator=generator)
    cu_seqlens = cu_seqlens_of(lengths)
    total = int(cu_seqlens[-1])
    ids = random_ids(total)
    ones = torch.ones(total, dtype=torch.int32)
    assert_as_native(
        lambda: (
            *bytekernels.pack_bytes((ids, cu_seqlens)),
            *bytekernels.row_index(cu_seqlens, total),
            bytekernels.next_byte_targets(ids, cu_seqlens, ids < 99),
            bytekernels.token_end_mask(ones, cu_seqlens, cu_seqlens, False),
            bytekernels.unpack(ids, cu_seqlens, 0),
        )
    )


def test_offsets_past_2_to_the_31():
    """The last of the padded sequences lies past byte 2^31, in both directions."""
    length, sequences = 2**20 + 5, 2050
    cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32)
    cu_seqlens[-1] = 9
    padded = torch.zeros(sequences, length, dtype=torch.uint8)
    padded[-1, :9] = torch.arange(1, 10)
    with dispatch.force("cuda"):
        assert bytekernels.pack_padded(padded, cu_seqlens).tolist() == list(range(1, 10))
        values = torch.arange(11, 20, dtype=torch.uint8)
        bytekernels.unpack(values, cu_seqlens, 5, out=padded)
    assert padded[-1, :10].tolist() == [*range(11, 20), 5]
    assert bool((padded[:-1] == 5).all())


def test_a_host_has_no_device_to_launch_on():
    if _C.cuda_architectures and torch.cuda.is_available():
        pytest.skip("there is a device")
    cu, rows = int32([0, 2]), int32([0, 0])
    with pytest.raises(RuntimeError, match=r"CUDA"):
        _C.cuda.row_index(array(cu), array(rows), array(rows.clone()), 0, 0)
