"""The norms' rooflines against numbers counted by hand, and against the tensors that a call takes and gives."""

import pytest
import torch

import bytekernels
from bytekernels.norm import roofline
from bytekernels.roofline import Work

BY_HAND = {  # 10 rows of 4 bfloat16: 80 bytes a tensor, 160 of float32, 16 a vector
    roofline.rms_norm: Work(160, 80 + 80 + 16),
    roofline.rms_norm_backward: Work(440, 3 * 80 + 32),
    roofline.add_rms_norm: Work(200, 2 * 80 + 2 * 160 + 16),
    roofline.add_rms_norm_backward: Work(520, 3 * 80 + 3 * 160 + 32),
    roofline.gated_rms_norm: Work(360, 3 * 80 + 16),
    roofline.gated_rms_norm_backward: Work(880, 5 * 80 + 32),
}


@pytest.mark.parametrize("function", BY_HAND, ids=lambda function: function.__name__)
def test_work_by_hand(function):
    assert function(10, 4, torch.bfloat16) == BY_HAND[function]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(dtype):
    x, z = torch.randn(2, 7, 12).to(dtype).unbind()
    residual, weight = torch.randn(7, 12), torch.randn(12)
    shape = (7, 12, dtype)

    def size(*tensors):
        return sum(tensor.nbytes for tensor in tensors)

    y, total = bytekernels.rms_norm(x, weight, residual)
    assert roofline.add_rms_norm(*shape).bytes == size(x, residual, weight, y, total)
    assert roofline.add_rms_norm_backward(*shape).bytes == size(y, total, x, residual, weight) + size(
        x, residual, weight
    )
    y, _ = bytekernels.rms_norm(x, weight)
    assert roofline.rms_norm(*shape).bytes == size(x, weight, y)
    assert roofline.rms_norm_backward(*shape).bytes == size(y, x, weight) + size(x, weight)
    out = bytekernels.gated_rms_norm(x, z, weight)
    assert roofline.gated_rms_norm(*shape).bytes == size(x, z, weight, out)
    assert roofline.gated_rms_norm_backward(*shape).bytes == size(out, x, z, weight) + size(x, z, weight)
