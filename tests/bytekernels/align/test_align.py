"""Aligned batches: each implementation against a loop over bytes, what it takes, the arena, and every thread count."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bytekernels
from bytekernels import AlignedBatch, dispatch
from bytekernels.align import roofline
from bytekernels.align.batch import ALIGNMENT, DTYPES
from bytekernels.testing import poisoned_memory
from tests.bytekernels.align.conftest import NAMES, assert_same, byte_by_byte, case_of, cases

IMPLEMENTATIONS = ["native", "reference"]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="module")
def poison():
    with poisoned_memory():
        yield


def assert_is(batch, lists):
    for name, value, expected in zip(NAMES, batch, lists, strict=True):
        if expected is None:
            assert value is None, name
        else:
            assert value.dtype == DTYPES[name], name
            assert value.tolist() == expected, name


def assert_one_arena(batch):
    """All tensors lie in one storage, in order, aligned, without a byte of each other's."""
    tensors = [tensor for tensor in batch if tensor is not None]
    begins = [tensor.storage_offset() * tensor.element_size() for tensor in tensors]
    ends = [begin + tensor.nbytes for begin, tensor in zip(begins, tensors, strict=True)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert tensors[0].untyped_storage().data_ptr() % ALIGNMENT == 0
    assert all(begin % ALIGNMENT == 0 for begin in begins)
    assert all(0 <= begin - end < ALIGNMENT for begin, end in zip(begins[1:], ends[:-1], strict=True))
    assert tensors[0].untyped_storage().nbytes() == ends[-1]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(case=cases(), targets=st.booleans(), threads=st.none() | st.integers(1, 3))
def test_byte_by_byte(impl, case, targets, threads):
    with dispatch.force(impl):
        batch = case.pack(targets=targets, threads=threads)
    assert_is(batch, byte_by_byte(case, targets=targets))
    assert_one_arena(batch)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(case=cases(), bytes_at=st.tuples(*[st.integers(0, 255)] * 2), ids=st.tuples(*[st.integers(0, 2**31 - 1)] * 2))
def test_any_bos_and_eos(impl, case, bytes_at, ids):
    options = dict(bos=bytes_at[0], eos=bytes_at[1], bos_id=ids[0], eos_id=ids[1])
    with dispatch.force(impl):
        assert_is(case.pack(**options), byte_by_byte(case, **options))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_by_hand(impl):
    case = case_of([2, 1, 3], [(1, 3), (0, 0), (0, 1)], ends=[True, False, False])
    case = case.but(text=np.frombuffer(b"abcdef", dtype=np.uint8), token_ids=np.array([7, 8, 9], dtype=np.int32))
    with dispatch.force(impl):
        ids, cu_seqlens, token_end, token_ids, token_cu, targets = case.pack(bos_id=50, eos_id=60)
    assert bytes(ids.tolist()) == b"\xfecdef\xff" + b"\xfe" + b"\xfeab"
    assert cu_seqlens.tolist() == [0, 6, 7, 10]
    assert token_end.int().tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 0, 1]
    assert token_ids.tolist() == [50, 8, 9, 60, 50, 50, 7]
    assert token_cu.tolist() == [0, 4, 5, 7]
    c, d, e, f = b"cdef"
    first, last = [256 + c, d, e, 256 + f, 256 + 255, -100], [ord("a"), 256 + ord("b"), -100]
    assert targets.tolist() == [*first, -100, *last]


@given(case=cases())
def test_the_pack_room_says_the_same(case):
    batch = case.pack()
    targets = bytekernels.next_byte_targets(batch.ids, batch.cu_seqlens, batch.token_end)
    assert torch.equal(batch.targets, targets)
    documents = [case.text[first : first + count].tobytes() for first, count in case.spans[:, :2].tolist()]
    if case.ends is not None:
        documents = [text + b"\xff" * end for text, end in zip(documents, case.ends.tolist(), strict=True)]
    ids, cu_seqlens = bytekernels.pack_bytes(documents)
    assert torch.equal(batch.ids, ids)
    assert torch.equal(batch.cu_seqlens, cu_seqlens)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_arrays_memory_maps_and_tensors(impl, dtype, tmp_path):
    case = case_of([3, 1, 2, 9, 70], [(3, 5), (0, 3), (2, 2)], ends=[True, False, True], dtype=dtype)
    arrays = {name: getattr(case, name) for name in ("text", "token_ids", "token_lengths", "spans", "ends")}
    maps, tensors = {}, {}
    for name, values in arrays.items():
        values.tofile(tmp_path / name)
        maps[name] = np.memmap(tmp_path / name, dtype=values.dtype, mode="r", shape=values.shape)
        tensors[name] = torch.from_numpy(values)
    with dispatch.force(impl):
        expected = case.pack()
        assert_is(expected, byte_by_byte(case))
        assert_same(case.but(**maps).pack(), expected)
        assert_same(case.but(**tensors).pack(), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("targets", [True, False])
def test_empty_batches(impl, targets):
    nothing = case_of([], [])
    with dispatch.force(impl):
        for case in (nothing, nothing.but(ends=np.empty(0, dtype=bool)), case_of([4, 2], [])):
            batch = case.pack(targets=targets)
            assert_is(batch, ([], [0], [], [], [0], [] if targets else None))
            assert_one_arena(batch)
        batch = case_of([], [(0, 0)] * 3, ends=[False, True, False]).pack(targets=targets)
    wanted = [-100, 511, -100, -100] if targets else None
    assert_is(batch, ([0xFE, 0xFE, 0xFF, 0xFE], [0, 1, 3, 4], [True] * 4, [1, 1, 2, 1], [0, 1, 3, 4], wanted))


def big_case(dtype=np.uint16):
    """Spans of very uneven lengths, so that every thread gets a share and pieces end within tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 9, 90_000)
    lengths[1000], lengths[80_000] = 60_000, 20_000
    sizes = [0, 1, 50_000, 0, 20_000, *generator.integers(0, 12, 1_500).tolist(), 9_000]
    stops = np.cumsum(sizes)
    assert stops[-1] < len(lengths)
    cuts = np.stack([stops - sizes, stops], axis=1)
    return case_of(lengths, cuts, ends=np.arange(len(cuts)) % 3 == 0, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_any_number_of_threads_gives_the_same(dtype):
    case = big_case(dtype)
    with dispatch.force("reference"):
        expected = case.pack()
    with dispatch.force("native"):
        for threads in (None, 1, 2, 3, 7, 64):
            assert_same(case.pack(threads=threads), expected)


def test_one_thread_starts_no_other():
    code = """
        import os, numpy as np, bytekernels
        text = np.zeros(1 << 20, dtype=np.uint8)
        ones = np.ones(1 << 20, dtype=np.int32)
        spans = np.array([[s << 16, 1 << 16, s << 16, 1 << 16] for s in range(16)])
        started = []
        for threads in (1, 4):
            before = len(os.listdir("/proc/self/task"))
            bytekernels.align_pack(text, ones, ones, spans, bos_id=1, threads=threads)
            started.append(len(os.listdir("/proc/self/task")) - before)
        print(started[0], started[1] > 0)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.stdout.split() == ["0", "True"], out.stderr


@pytest.mark.parametrize("targets", [True, False])
def test_to_another_device_is_one_arena(targets):
    batch = case_of([3, 1, 2], [(0, 2), (2, 3)], ends=[True, False]).pack(targets=targets)
    there = batch.to("meta")
    assert isinstance(there, AlignedBatch)
    for name, value, moved in zip(NAMES, batch, there, strict=True):
        assert (value is None) == (moved is None), name
        if value is not None:
            assert moved.device.type == "meta", name
            assert (moved.shape, moved.dtype, moved.storage_offset()) == (
                value.shape,
                value.dtype,
                value.storage_offset(),
            ), name
            assert moved.untyped_storage().nbytes() == batch.ids.untyped_storage().nbytes()
    assert there.to("meta") is there


def test_to_the_same_device_is_the_batch_itself():
    batch = case_of([3, 1, 2], [(0, 2)]).pack()
    for device in ("cpu", torch.device("cpu")):
        assert batch.to(device) is batch
        assert batch.to(device, non_blocking=True) is batch


def test_to_moves_what_lies_elsewhere_too():
    batch = case_of([3, 1, 2], [(0, 2)]).pack()
    without = batch._replace(targets=None)
    assert without.to("meta").targets is None
    assert without.to("meta").ids.untyped_storage().nbytes() < batch.ids.untyped_storage().nbytes()
    for other in (batch._replace(ids=batch.ids.clone()), AlignedBatch(*(tensor.clone() for tensor in batch))):
        assert_same(other.to("cpu"), batch)
        moved = other.to("meta")
        for value, expected in zip(moved, batch, strict=True):
            assert (value.device.type, value.shape, value.dtype) == ("meta", expected.shape, expected.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pinned_batch_on_a_gpu(impl):
    case = big_case()
    with dispatch.force(impl):
        batch = case.pack(pin=True)
    assert all(tensor.is_pinned() for tensor in batch)
    assert_one_arena(batch)
    there = batch.to("cuda", non_blocking=True)
    assert_one_arena(there)
    assert there.to("cuda") is there
    torch.cuda.synchronize()
    assert_same(there.to("cpu"), case.pack())


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("targets", [True, False])
def test_roofline_counts_the_arrays(dtype, targets):
    case = case_of([3, 1, 2, 4], [(1, 3), (3, 4), (0, 1)], ends=[True, False, True], dtype=dtype)
    batch = case.pack(targets=targets)  # each part of the corpus once
    taken = (case.text, case.token_ids, case.token_lengths, case.spans, case.ends)
    given = [tensor for tensor in batch if tensor is not None]
    work = roofline.align_pack(
        len(batch.ids), len(batch.token_ids), 3, ended=2, targets=targets, length_bytes=np.dtype(dtype).itemsize
    )
    assert work.bytes == sum(values.nbytes for values in (*taken, *given))
    assert work.flops == 0
