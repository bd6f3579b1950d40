"""The CUDA kernels on a device: as the CPU has it, on the current stream, without a wait, at any address."""

import pytest
import torch

import bytekernels
from bytekernels import dispatch
from bytekernels.ragged import cu_seqlens_of
from bytekernels.testing import ragged
from tests.bytekernels.pack.conftest import int32, random_ids

pytestmark = pytest.mark.gpu
LENGTHS = [300, 0, 1, 70_001, 15, 16, 17, 0]


@pytest.fixture(autouse=True)
def on_cuda():
    with dispatch.force("cuda"):
        yield


def results(device, row=3, shift=0):
    """Every op on one batch; arguments begin ``shift`` elements after an aligned address."""

    def moved(tensor):
        memory = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device=device)
        return memory[shift:].view(tensor.shape).copy_(tensor)

    cu_seqlens, total = ragged(LENGTHS)
    cu_seqlens, ids = cu_seqlens.to(device), moved(random_ids(total))
    values = moved(random_ids(total * row).view(total, row))
    lengths = int32(LENGTHS).to(device)
    rows = moved(random_ids(len(LENGTHS) * max(LENGTHS)).view(len(LENGTHS), -1))
    padded = bytekernels.unpack(values, cu_seqlens, 7, length=max(LENGTHS))
    ones = torch.ones(total, dtype=torch.int32, device=device)
    return [
        padded,
        bytekernels.pack_padded(padded, cu_seqlens, total=total),
        bytekernels.next_byte_targets(ids, cu_seqlens, ids < 90),
        bytekernels.token_end_mask(ones, cu_seqlens, cu_seqlens, False, total=total),
        *bytekernels.row_index(cu_seqlens, total),
        *bytekernels.pack_bytes((ids, cu_seqlens), device=device),
        *bytekernels.pack_bytes((rows, lengths), device=device, total=total + len(LENGTHS)),
    ]


@pytest.mark.parametrize("shift", [0, 1, 3, 8, 15])
@pytest.mark.parametrize("row", [1, 3, 16])
def test_as_on_the_cpu(row, shift):
    for got, expected in zip(results("cuda", row, shift), results("cpu", row), strict=True):
        assert torch.equal(got.cpu(), expected)


def test_no_call_waits_and_all_follow_the_stream(monkeypatch):
    monkeypatch.setenv("BYTEKERNELS_VALIDATE", "0")
    expected = results("cpu")
    results("cuda")
    stream = torch.cuda.Stream()
    cu_seqlens, total = ragged(LENGTHS)
    late = torch.zeros(total, dtype=torch.uint8, device="cuda")
    ids, cuts = random_ids(total).cuda(), cu_seqlens.cuda()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(ids)  # after the sleep, and before the call that reads it
            packed = bytekernels.pack_bytes((late, cuts), device="cuda")[0]
        stream.synchronize()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(packed.cpu(), expected[6])


def test_malformed_offsets_are_told_on_request(monkeypatch):
    monkeypatch.setenv("BYTEKERNELS_VALIDATE", "0")
    values, falling = torch.zeros(9, device="cuda"), int32([0, 7, 5, 9]).cuda()
    with pytest.raises(ValueError, match="cu_seqlens must not decrease, got 7 > 5 at index 1"):
        bytekernels.unpack(values, falling, 0, length=9, validate=True)
    with pytest.raises(ValueError, match=r"token_lengths\[1\] is 0"):
        bytekernels.token_end_mask(
            int32([1, 0, 2]).cuda(), int32([0, 3]).cuda(), int32([0, 3]).cuda(), False, validate=True
        )
    bytekernels.unpack(values, falling, 0, length=9)  # wrong, and within bounds: compute-sanitizer looks on
    torch.cuda.synchronize()


def test_documents_are_uploaded():
    ids, cu_seqlens = bytekernels.pack_bytes([b"ab", b"", b"cde"], device="cuda")
    assert bytes(ids.tolist()) == b"\xfeab\xfe\xfecde"
    assert cu_seqlens.tolist() == [0, 3, 4, 8]


def test_a_gigabyte_and_a_million_sequences():
    lengths = torch.randint(0, 2000, (10**6,), device="cuda")
    cu_seqlens = cu_seqlens_of(lengths)
    total = int(cu_seqlens[-1])
    sequence, position = bytekernels.row_index(cu_seqlens, total)
    assert bool((position == torch.arange(total, device="cuda") - cu_seqlens[sequence.long()]).all())
    assert bool((torch.bincount(sequence, minlength=10**6) == lengths).all())
