"""The extension by itself: no torch, torch's threads, exceptions from threads, bounds, and what happens without it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import bytekernels
from bytekernels import _C, dispatch
from bytekernels.extension import array, fresh

ROOT = Path(__file__).parents[2]


def run(code, **environment):
    """What Python prints for this code in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_and_runs_without_torch():
    out = run(
        """
        import array, sys
        sys.modules["torch"] = None  # `import torch` now fails
        from bytekernels import _C

        def pair(values):
            address, count = values.buffer_info()
            return address, count * values.itemsize

        cu, ids = array.array("i", [0] * 3), array.array("B", [0] * 7)
        assert _C.document_offsets([b"abc", b"de"], 254, pair(cu)) == 7
        _C.pack_documents([b"abc", b"de"], 254, pair(cu), pair(ids), 3)
        assert bytes(ids) == b"\\xfeabc\\xfede", bytes(ids)
        assert len(set(_C.parallel_probe(4, 4))) == 4
        print(_C.parallel_runtime())
        """
    )
    assert out == "std::thread"


def test_runs_on_torchs_threads():
    out = run(
        """
        import os, torch
        from bytekernels import _C
        torch.set_num_threads(2)
        torch.randn(1 << 20).exp().sum()  # starts torch's team
        before = set(os.listdir("/proc/self/task"))
        ids = _C.parallel_probe(8, 2)
        assert set(os.listdir("/proc/self/task")) == before, "started threads of its own"
        assert len(set(ids)) == 2, ids
        assert set(map(str, ids)) <= before
        print("std::thread" if _C.parallel_runtime() == "std::thread" else "team")
        """,
        OMP_NUM_THREADS="2",
    )
    assert out == "team"


@pytest.mark.parametrize("fail_at", [0, 5, 9])
def test_a_threads_exception_reaches_the_caller(fail_at):
    with pytest.raises(RuntimeError, match=f"element {fail_at} failed as asked"):
        _C.parallel_probe(10, 3, fail_at)
    ids = _C.parallel_probe(10, 3)
    assert len(ids) == 10
    assert all(ids)


def test_shares_are_contiguous():
    ids = _C.parallel_probe(10, 3)
    changes = [i for i in range(1, 10) if ids[i] != ids[i - 1]]
    assert changes in ([4, 7], []), ids
    assert _C.parallel_probe(0, 3) == []


def test_sizes_and_offsets_are_checked_before_memory_is_touched():
    ids, targets = torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="targets must have 4 elements, got 3"):
        _C.next_byte_targets(array(ids), None, array(cu), array(targets[:3]), 1)
    with pytest.raises(ValueError, match="targets has 7 bytes, not a multiple of 8"):
        _C.next_byte_targets(array(ids), None, array(cu), (targets.data_ptr(), 7), 1)
    with pytest.raises(ValueError, match="targets is not aligned to 8 bytes"):
        _C.next_byte_targets(array(ids), None, array(cu), (targets.data_ptr() + 1, 32), 1)
    with pytest.raises(ValueError, match="ids is a null pointer to 4 bytes"):
        _C.next_byte_targets((0, 4), None, array(cu), array(targets), 1)
    for offsets, message in (
        ([1, 4], "cu_seqlens must start at 0, got 1"),
        ([0, 5], "cu_seqlens must end at 4, the number of rows, got 5"),
        ([0, 9, 4], "cu_seqlens must not decrease, got 9 > 4 at index 1"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.next_byte_targets(array(ids), None, array(torch.tensor(offsets, dtype=torch.int32)), array(targets), 1)
    cu = torch.tensor([0, 4, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="their product passes"):
        _C.unpack(array(ids), array(cu), array(ids[:1]), 1, 4, 2**62, array(ids), 1)


def test_array_takes_contiguous_cpu_tensors():
    tensor = torch.zeros(3, 4, dtype=torch.int32)
    address, size, owner = array(tensor)
    assert (address, size) == (tensor.data_ptr(), 48)
    assert owner is tensor
    with pytest.raises(ValueError, match=r"use \.cpu\(\)\.contiguous\(\)"):
        array(tensor.T)


def test_without_the_extension_the_reference_serves_and_native_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "bytekernels._C", None)
    with pytest.warns(UserWarning, match="bytekernels._C is not built .* run `pip install -e .` in the checkout"):
        ids, cu_seqlens = bytekernels.pack_bytes([b"ab", b"c"], bos=None)
    assert (ids.tolist(), cu_seqlens.tolist()) == ([97, 98, 99], [0, 2, 3])
    with (
        dispatch.force("native"),
        pytest.warns(UserWarning, match="not built"),
        pytest.raises(RuntimeError, match="next_byte_targets can't run: native: the extension .* `pip install -e .`"),
    ):
        bytekernels.next_byte_targets(ids, cu_seqlens)


def test_large_memory_is_whole_and_asks_for_huge_pages(monkeypatch):
    asked = []
    advise = _C.advise_huge_pages
    monkeypatch.setattr(_C, "advise_huge_pages", lambda memory: (asked.append(memory[1]), advise(memory)))
    like = torch.zeros(3, dtype=torch.bfloat16)
    small, large = fresh(like), fresh(like, (33, 1 << 20), torch.int8)
    assert (small.shape, small.dtype) == ((3,), torch.bfloat16)
    assert (large.shape, large.dtype) == ((33, 1 << 20), torch.int8)
    assert asked == [33 << 20]
    large.fill_(7)
    assert bool((large == 7).all())
