"""Every CUDA kernel compiles for every chip without a warning, and neither spills nor uses a stack."""

import pytest

from tests.compile import cuda_check

NVCC = cuda_check.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def test_every_op_of_the_cuda_half_is_there():
    ops = ["constrain", "pack", "row_index", "suffix", "suffix_step", "targets", "token_ends", "token_prefix", "unpack"]
    assert [source.stem for source in cuda_check.sources()] == ops


@needs_nvcc
@pytest.mark.parametrize("source", cuda_check.sources(), ids=lambda source: source.stem)
def test_no_kernel_spills(source):
    rows = cuda_check.resources(NVCC, source)
    for kernel in {row["kernel"] for row in rows}:
        assert sorted(row["arch"] for row in rows if row["kernel"] == kernel) == [80, 90, 100], kernel
    for row in rows:
        assert (row["stack"], row["spills"]) == (0, 0), row
        assert row["registers"] <= 64, row  # four blocks of 256 threads on a multiprocessor


@needs_nvcc
def test_a_kernel_that_spills_is_seen(tmp_path):
    bad = tmp_path / "bad.cu"
    bad.write_text(
        "__global__ void __launch_bounds__(1024, 2) bad(float* p, int n) {\n"
        "  float a[256];\n"
        "  for (int i = 0; i < 256; ++i) a[i] = p[i + threadIdx.x];\n"
        "  for (int k = 0; k < n; ++k) for (int i = 0; i < 256; ++i) a[i] += a[(i + k) % 256];\n"
        "  for (int i = 0; i < 256; ++i) p[i * threadIdx.x] = a[i];\n"
        "}\n"
    )
    with pytest.raises(RuntimeError, match="bad.cu: .*spilled"):
        cuda_check.resources(NVCC, bad)
