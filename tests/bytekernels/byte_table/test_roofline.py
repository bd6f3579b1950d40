"""byte_table's roofline against numbers counted by hand: the tensors that a call takes and gives."""

import torch

from bytekernels.byte_table import roofline
from bytekernels.roofline import Work


def test_work_by_hand():
    assert roofline.byte_table(10, 4, torch.float32) == Work(0, 10 + 4096 + 160)
    assert roofline.byte_table_backward(10, 4, torch.bfloat16) == Work(40, 10 + 80 + 2048)
