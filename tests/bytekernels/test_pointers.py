"""What an interpreted kernel touches outside its arguments is an error, and nothing else is."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU")


@triton.jit
def shifted_copy(p_x, p_y, read_at, write_at, count, BLOCK: tl.constexpr):
    o_i = tl.arange(0, BLOCK)
    m_i = o_i < count
    tl.store(p_y + write_at + o_i, tl.load(p_x + read_at + o_i, mask=m_i), mask=m_i)


def copy(read_at: int, write_at: int, count: int) -> torch.Tensor:
    x, y = torch.arange(10.0), torch.zeros(10)
    shifted_copy[(1,)](x, y, read_at, write_at, count, BLOCK=16)
    return y


@pytest.mark.parametrize(
    ("read_at", "write_at", "message"),
    [
        (0, 7, "shifted_copy writes 1 elements outside"),
        (0, -1, "shifted_copy writes 1 elements outside"),
        (8, 0, "shifted_copy reads 2 elements outside"),
        (-4, 0, "shifted_copy reads 4 elements outside"),
    ],
)
def test_what_is_outside_is_named(read_at, write_at, message):
    with pytest.raises(Exception, match=message):
        copy(read_at, write_at, 4)


def test_what_is_inside_or_masked_is_let_through():
    assert copy(6, 0, 4).tolist() == [6, 7, 8, 9, 0, 0, 0, 0, 0, 0]
    assert copy(0, 6, 4).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 2, 3]
    assert not copy(100, -100, 0).any()


def test_a_part_of_a_tensor_may_be_left_as_far_as_its_storage_goes():
    whole = torch.zeros(10)
    shifted_copy[(1,)](torch.arange(10.0)[3:], whole[:4], -3, 2, 4, BLOCK=16)
    assert whole.tolist() == [0, 0, 0, 1, 2, 3, 0, 0, 0, 0]
