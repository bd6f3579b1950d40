"""The convolution's roofline against numbers counted by hand, and against the tensors of a call."""

import torch

from bytekernels.conv import roofline
from bytekernels.roofline import Work
from bytekernels.testing import ragged

SHAPE = (10, 4, 3, 2, torch.float32)  # T, C, K, S


def test_work_by_hand():
    parameters, table = 64 + 12, 4096
    assert roofline.causal_conv1d(*SHAPE) == Work(6 * 40, 2 * 160 + parameters)
    assert roofline.causal_conv1d_backward(*SHAPE) == Work(19 * 40, 3 * 160 + parameters + 64)
    assert roofline.byte_conv1d(*SHAPE) == Work(6 * 40, 10 + table + parameters + 160)
    assert roofline.byte_conv1d_backward(*SHAPE) == Work(20 * 40, 160 + 10 + 2 * table + parameters + 64)


def test_bytes_are_those_of_the_tensors():
    cu, total = ragged([5, 0, 17])
    x, table, weight, bias = torch.randn(total, 8), torch.randn(256, 8), torch.randn(8, 4), torch.randn(8)
    shape = (total, 8, 4, 3)
    ids = torch.zeros(total, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        x, table = x.to(dtype), table.to(dtype)
        parameters = weight.nbytes + bias.nbytes
        assert roofline.causal_conv1d(*shape, dtype).bytes == 2 * x.nbytes + parameters + cu.nbytes
        assert roofline.causal_conv1d_backward(*shape, dtype).bytes == 3 * x.nbytes + 2 * parameters + cu.nbytes
        taken = ids.nbytes + table.nbytes + parameters + cu.nbytes
        assert roofline.byte_conv1d(*shape, dtype).bytes == x.nbytes + taken
        assert roofline.byte_conv1d_backward(*shape, dtype).bytes == x.nbytes + taken + table.nbytes + parameters
