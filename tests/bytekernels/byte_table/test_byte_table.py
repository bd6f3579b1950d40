"""byte_table against plain indexing, its gradient against a sum by byte value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels.byte_table import op, reference
from bytekernels.testing import assert_close, gradients, poisoned_memory


def make(rows, width=5, dtype=torch.float64, values=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, values, (rows,), generator=generator, dtype=torch.uint8)
    return ids, torch.randn(256, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@settings(max_examples=25, deadline=None)
@given(ids=st.binary(max_size=40))
def test_gathers_rows_and_sums_their_gradients_by_byte(ids):
    tensor = torch.tensor(list(ids), dtype=torch.uint8)
    table = make(0)[1]
    with poisoned_memory():
        out = bytekernels.byte_table(tensor, table)
        dy = torch.arange(out.numel(), dtype=torch.float64).view(out.shape)
        (grad,) = torch.autograd.grad(out, table, dy)
    expected = torch.zeros(256, 5, dtype=torch.float64)
    for row, byte in enumerate(ids):
        assert torch.equal(out[row], table[byte])
        expected[byte] += dy[row]
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_long_sums_stay_within_tolerance_and_repeat_bit_for_bit(dtype):
    ids, table = make(4000, dtype=dtype, values=3)  # more than a thousand rows a bin: too many for a bf16 accumulator
    truth = table.detach().double().requires_grad_()
    out = bytekernels.byte_table(ids, table)
    assert out.dtype == dtype
    (grad,) = gradients(out, [table])
    (expected,) = gradients(bytekernels.byte_table(ids, truth), [truth])
    assert_close(grad, expected, what="dtable")
    assert torch.equal(grad, gradients(bytekernels.byte_table(ids, table), [table])[0])


def test_reference_gradcheck():
    ids, table = make(12, width=2, values=5)
    assert torch.autograd.gradcheck(lambda t: reference.byte_table(ids, t), (table,))
    assert torch.autograd.gradcheck(lambda t: bytekernels.byte_table(ids, t), (table,))


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_opcheck(rows):
    ids, table = make(rows, dtype=torch.float32)
    torch.library.opcheck(op.byte_table_op, (ids, table))
    torch.library.opcheck(op.byte_table_backward_op, (torch.randn(rows, 5), ids))


def test_arguments_are_checked():
    ids, table = make(4)
    with pytest.raises(TypeError, match=r"ids must be uint8, one byte a row, got torch\.int64"):
        bytekernels.byte_table(ids.long(), table)
    with pytest.raises(ValueError, match=r"ids must have shape \[T\], got \[1, 4\]"):
        bytekernels.byte_table(ids[None], table)
    with pytest.raises(TypeError, match=r"table must have a floating dtype, got torch\.int32"):
        bytekernels.byte_table(ids, table.int())
    with pytest.raises(ValueError, match=r"table must have shape \[256, C\].*got \[255, 5\]"):
        bytekernels.byte_table(ids, table[:255])
