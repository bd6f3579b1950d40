"""The CUDA kernel on a device: as the CPU has it."""

import pytest
import torch

import bytekernels
from bytekernels import dispatch
from bytekernels.testing import merged_strings, ragged

pytestmark = pytest.mark.gpu


def test_as_on_the_cpu():
    tree = bytekernels.SortedVocabulary(merged_strings(5000))
    cu, total = ragged([300, 0, 1, 70_001, 15])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (total,), generator=generator, dtype=torch.uint8)
    wanted = torch.rand(total, generator=generator) < 0.3
    with dispatch.force("native"):
        expected = bytekernels.constrain_ends(ids, cu, wanted, tree)
    with dispatch.force("cuda"):
        found = bytekernels.constrain_ends(ids.cuda(), cu.cuda(), wanted.cuda(), tree.to("cuda"))
    assert torch.equal(found.cpu(), expected)
