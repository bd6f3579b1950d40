"""What this room's tests share."""

import pytest
import torch

from bytekernels.testing import poisoned_memory

IMPLEMENTATIONS = ["native", "cuda", "reference"]  # cuda: its kernels' bodies, on the host


@pytest.fixture(autouse=True, scope="module")
def poison():
    with poisoned_memory():
        yield


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def random_ids(total, seed=0):
    return torch.randint(0, 256, (total,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def shifted(tensor, by):
    """A copy of the tensor that begins ``by`` elements after an address that is aligned to 64 bytes."""
    memory = torch.empty(tensor.numel() + by + 64, dtype=tensor.dtype)
    first = -memory.data_ptr() % 64 // memory.element_size() + by
    return memory[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)
