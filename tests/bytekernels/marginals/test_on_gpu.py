"""The CUDA kernel on a device: as the CPU has it. (The Triton kernels' tests run there too.)"""

import pytest
import torch

import bytekernels
from bytekernels import dispatch
from bytekernels.testing import merged_strings, ragged

pytestmark = pytest.mark.gpu


def test_prefixes_as_on_the_cpu():
    strings = merged_strings(5000)
    tree, generator = bytekernels.SortedVocabulary(strings), torch.Generator().manual_seed(0)
    drawn = torch.randint(len(strings), (20_000,), generator=generator)
    ids = torch.tensor(list(b"".join(strings[i] for i in drawn)), dtype=torch.uint8)
    cu, total = ragged([0, 300, 1, len(ids) - 301])
    boundary = torch.rand(total, generator=generator) < 0.2
    with dispatch.force("native"):
        expected = bytekernels.token_prefix(ids, cu, boundary, tree)
    with dispatch.force("cuda"):
        found = bytekernels.token_prefix(ids.cuda(), cu.cuda(), boundary.cuda(), tree.to("cuda"))
    assert torch.equal(found.cpu(), expected)
