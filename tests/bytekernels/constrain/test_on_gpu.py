"""The CUDA kernel on a device: as the CPU has it."""

import pytest
import torch

import bytekernels
from bytekernels import dispatch
from bytekernels.testing import merged_strings, ragged

pytestmark = pytest.mark.gpu


def test_as_on_the_cpu():
    strings = merged_strings(5000)
    tree = bytekernels.SortedVocabulary(strings)
    cu, total = ragged([300, 0, 1, 70_001, 15])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(strings), (40_000,), generator=generator)
    ids = torch.tensor(list(b"".join(strings[i] for i in drawn)[:total]), dtype=torch.uint8)
    odds = torch.randn(total, generator=generator) - 1
    context = torch.tensor([0, 0, 1, 30_000, 5])
    with dispatch.force("native"):
        expected = bytekernels.constrain_ends(ids, cu, odds, tree, context)
    with dispatch.force("cuda"):
        found = bytekernels.constrain_ends(ids.cuda(), cu.cuda(), odds.cuda(), tree.to("cuda"), context.cuda())
    assert torch.equal(found.cpu(), expected)
