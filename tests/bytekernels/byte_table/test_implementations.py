"""byte_table's kernels against the float64 reference, and their bits run again."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import dispatch
from bytekernels.byte_table import op
from bytekernels.testing import assert_close, gradients, poisoned_memory
from tests.bytekernels.conftest import assert_repeats, far_apart


def make(in_triton, rows, width=5, dtype=torch.float32, values=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, values, (rows,), generator=generator, dtype=torch.uint8) + (256 - values) // 2
    table = torch.randn(256, width, generator=generator, dtype=torch.float64)
    return ids.to(in_triton.device), table.to(in_triton.device, dtype).requires_grad_()


def check(in_triton, ids, table):
    with in_triton.force(), poisoned_memory():
        out = bytekernels.byte_table(ids, table)
        (dtable,) = gradients(out, [table])
    truth = table.detach().double().requires_grad_()
    with dispatch.force("reference"):
        expected = bytekernels.byte_table(ids, truth)
        (wanted,) = gradients(expected, [truth])
    assert torch.equal(out, expected.to(table.dtype))
    assert_close(dtable, wanted, what="dtable")


def test_agrees_with_the_reference(in_triton):
    @settings(max_examples=2 if in_triton.interpreted else 20)  # each gradient takes 512 programs
    @given(
        rows=st.integers(0, 40) | st.just(600),
        width=st.sampled_from([1, 5, 64]),
        values=st.sampled_from([1, 3, 256]),
        seed=st.integers(0, 9),
    )
    def agree(rows, width, values, seed):
        check(in_triton, *make(in_triton, rows, width, values=values, seed=seed))

    agree()


def test_no_rows(in_triton):
    check(in_triton, *make(in_triton, 0))


def test_many_rows_of_a_byte_wider_than_a_block(in_triton):
    """A byte's rows are summed 512 at a time, 512 columns at a time."""
    counts = torch.tensor([511, 512, 0, 513, 1100])
    for dtype in in_triton.dtypes:
        ids, table = make(in_triton, int(counts.sum()), 520, dtype=dtype)
        values = torch.tensor([0, 7, 8, 9, 255], dtype=torch.uint8).repeat_interleave(counts)
        ids.copy_(values[torch.randperm(len(values), generator=torch.Generator().manual_seed(3))])
        check(in_triton, ids, table)


def test_columns_of_wider_rows(in_triton):
    from bytekernels.byte_table import triton as kernels

    ids, table = make(in_triton, 30, 20)
    table = table.detach()
    rows = kernels.byte_table(ids, torch.cat([torch.zeros_like(table), table], 1)[:, 20:])
    assert torch.equal(rows, table[ids.long()])


def test_rows_more_than_two_billion_elements_apart(in_triton, tmp_path):
    from bytekernels.byte_table import triton as kernels

    ids, table = make(in_triton, 3, 20)
    rows = table.detach()[ids.long()]
    far = far_apart(rows, tmp_path / "rows")
    assert torch.equal(kernels.byte_table_backward(far, ids), kernels.byte_table_backward(rows, ids))


def test_runs_are_equal_bit_for_bit(in_triton):
    ids, table = make(in_triton, 700, 20, values=3)
    with in_triton.force():
        assert_repeats(in_triton, lambda: gradients(bytekernels.byte_table(ids, table), [table]))


def test_opcheck(in_triton):
    ids, table = make(in_triton, 9)
    forward_alone = dict(test_utils=("test_schema", "test_faketensor"))
    with in_triton.force():
        torch.library.opcheck(op.byte_table_op, (ids, table), **(forward_alone if in_triton.interpreted else {}))
        dy = torch.randn(9, 5, device=in_triton.device)
        torch.library.opcheck(op.byte_table_backward_op, (dy, ids), **forward_alone)  # it has no gradient
