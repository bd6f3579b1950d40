"""byte_table's kernels against the float64 reference, and their bits run again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import dispatch
from bytekernels.byte_table import op
from bytekernels.testing import assert_close, gradients, poisoned_memory


@pytest.fixture
def fast(fast):
    if fast.name == "native":
        pytest.skip("byte_table has no native code")
    return fast


def make(fast, rows, width=5, dtype=torch.float32, values=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, values, (rows,), generator=generator, dtype=torch.uint8) + (256 - values) // 2
    table = torch.randn(256, width, generator=generator, dtype=torch.float64)
    return ids.to(fast.device), table.to(fast.device, dtype).requires_grad_()


def check(fast, ids, table):
    with fast.force(), poisoned_memory():
        out = bytekernels.byte_table(ids, table)
        (dtable,) = gradients(out, [table])
    truth = table.detach().double().requires_grad_()
    with dispatch.force("reference"):
        expected = bytekernels.byte_table(ids, truth)
        (wanted,) = gradients(expected, [truth])
    assert torch.equal(out, expected.to(table.dtype))
    assert_close(dtable, wanted, what="dtable")


def test_agrees_with_the_reference(fast):
    @settings(max_examples=fast.examples // 3)
    @given(
        rows=st.integers(0, 40) | st.just(600),
        width=st.sampled_from([1, 5, 64]),
        values=st.sampled_from([1, 3, 256]),
        seed=st.integers(0, 9),
    )
    def agree(rows, width, values, seed):
        check(fast, *make(fast, rows, width, values=values, seed=seed))

    agree()


def test_bytes_of_many_rows(fast):
    """A byte's rows are summed 512 at a time."""
    for rows, values in ((512, 1), (513, 1), (1700, 2)):
        check(fast, *make(fast, rows, 3, values=values))


def test_rows_wider_than_a_block(fast):
    check(fast, *make(fast, 20, 520))


def test_every_dtype(fast):
    for dtype in fast.dtypes:
        check(fast, *make(fast, 900, 48, dtype=dtype, values=3))


def test_columns_of_wider_rows(fast):
    from bytekernels.byte_table import triton as kernels

    ids, table = make(fast, 30, 20)
    table = table.detach()
    wide = torch.cat([table, table], 1)[:, 20:]
    out = torch.full((30, 60), 7.0, device=fast.device)
    view = kernels.byte_table(ids, wide, out=out[:, 20:40])
    assert view.data_ptr() == out[:, 20:40].data_ptr()
    assert torch.equal(view, kernels.byte_table(ids, table))
    assert (out[:, :20] == 7).all() and (out[:, 40:] == 7).all()
    assert torch.equal(kernels.byte_table_backward(view, ids), kernels.byte_table_backward(view.contiguous(), ids))


def test_runs_are_equal_bit_for_bit(fast):
    ids, table = make(fast, 700, 20, values=3)
    with fast.force():
        runs = [gradients(bytekernels.byte_table(ids, table), [table])[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_rows_more_than_two_billion_elements_apart(fast, tmp_path):
    from bytekernels.byte_table import triton as kernels

    apart, rows = 2**30, 4
    size = (rows - 1) * apart + 20
    if fast.interpreted:  # a file with a hole
        memory = torch.from_file(str(tmp_path / "rows"), shared=True, size=size, dtype=torch.float32)
    else:
        memory = torch.empty(size, device=fast.device)
    ids, table = make(fast, rows, 20)
    table = table.detach()
    far = memory.as_strided((rows, 20), (apart, 1))
    out = kernels.byte_table(ids, table, out=far)
    assert torch.equal(out, table[ids.long()])
    assert torch.equal(kernels.byte_table_backward(far, ids), kernels.byte_table_backward(far.contiguous(), ids))


def test_opcheck(fast):
    ids, table = make(fast, 9)
    with fast.force():
        torch.library.opcheck(op.byte_table_op, (ids, table))
        utilities = ("test_schema", "test_faketensor")  # it has no gradient
        dy = torch.randn(9, 5, device=fast.device)
        torch.library.opcheck(op.byte_table_backward_op, (dy, ids), test_utils=utilities)
