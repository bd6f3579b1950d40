"""The CUDA kernels on a device: as the CPU has it, and in a graph."""

import pytest
import torch

import bytekernels
from bytekernels import SuffixState, dispatch
from bytekernels.testing import merged_strings, ragged

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_cuda():
    with dispatch.force("cuda"):
        yield


@pytest.fixture(scope="module")
def trie():
    return bytekernels.SuffixTrie(merged_strings(5000))


def text(total):
    return torch.randint(256, (total,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_as_on_the_cpu(trie):
    cu, total = ragged([300, 0, 1, 70_001, 15])
    ids, rows = text(total), torch.randint(total, (1000,), dtype=torch.int32)
    on_gpu = trie.to("cuda")
    found = bytekernels.longest_suffix(ids.cuda(), cu.cuda(), on_gpu)
    asked = bytekernels.longest_suffix(ids.cuda(), cu.cuda(), on_gpu, rows=rows.cuda())
    with dispatch.force("native"):
        expected = bytekernels.longest_suffix(ids, cu, trie)
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(asked.cpu(), expected[rows.long()])


def test_steps_in_a_graph(trie):
    sequences, on_gpu = 300, trie.to("cuda")
    columns = text(20 * sequences).view(20, sequences)
    active = columns % 3 > 0
    state, expected = SuffixState.empty(sequences, on_gpu), SuffixState.empty(sequences, trie)
    ids, mask = columns[0].cuda(), active[0].cuda()
    bytekernels.longest_suffix_step(ids, SuffixState.empty(sequences, on_gpu), on_gpu)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = bytekernels.longest_suffix_step(ids, state, on_gpu, active=mask)
    for column, on in zip(columns, active, strict=True):
        ids.copy_(column)
        mask.copy_(on)
        graph.replay()
        with dispatch.force("native"):
            wanted = bytekernels.longest_suffix_step(column, expected, trie, active=on)
        assert torch.equal(found.cpu(), wanted)
    assert torch.equal(state.recent.cpu(), expected.recent)
