"""Byte marginals against sums over the vocabulary: every prefix by brute force, and the product along each token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import dispatch
from bytekernels.marginals import op, reference
from bytekernels.testing import poisoned_memory, ragged, ragged_lengths
from tests.bytekernels.marginals.conftest import SMALL, nodes_of

strings = st.text("abc", max_size=4).map(str.encode)


def by_sums(logits, strings, prefix):
    """The 512 probabilities after prefix, from their definition; zeros where no token is longer."""
    kept = [(p, s) for p, s in zip(logits.double().exp().tolist(), strings, strict=True) if s]
    out = torch.zeros(512, dtype=torch.float64)
    for p, s in kept:
        if len(s) > len(prefix) and s.startswith(prefix):
            ends = len(s) == len(prefix) + 1
            out[256 * ends + s[len(prefix)]] += p
    return out / out.sum() if out.sum() > 0 else out


@settings(max_examples=30, deadline=None)
@given(vocabulary=st.lists(strings, min_size=1, max_size=12).filter(any), seed=st.integers(0, 99))
def test_marginals_are_sums_over_the_vocabulary(vocabulary, seed):
    tree = bytekernels.SortedVocabulary(vocabulary)
    logits = 3 * torch.randn(2, len(vocabulary), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    prefixes = [*sorted({s[:n] for s in vocabulary for n in range(len(s) + 1)}), b"abca", b"d"]
    node = nodes_of(prefixes, tree)
    with poisoned_memory():
        out = torch.stack([bytekernels.byte_marginals(logits, tree, torch.full_like(node, m), node) for m in range(2)])
    for m in range(2):
        for row, prefix in enumerate(prefixes):
            expected = by_sums(logits[m], vocabulary, prefix)
            torch.testing.assert_close(out[m, row].exp(), expected, rtol=1e-12, atol=0)
            assert out[m, row].exp().sum().item() == pytest.approx(1 if expected.any() else 0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_product_along_a_token_is_its_probability(dtype):
    generator = torch.Generator().manual_seed(0)
    strings = list(
        {bytes(torch.randint(97, 101, (n,), generator=generator).tolist()) for n in range(1, 7) for _ in range(40)}
    )
    tree = bytekernels.SortedVocabulary(strings)
    logits = (6 * torch.randn(1, len(strings), generator=generator)).to(dtype)
    logits[0, :5] = -40.0  # a branch whose probability a difference of cumulative sums would lose
    ids = torch.tensor(list(b"".join(bytes([254]) + s for s in strings)), dtype=torch.uint8)
    cu, total = ragged([1 + len(s) for s in strings])
    boundary = torch.zeros(total, dtype=torch.bool)
    boundary[cu[:-1].long()] = True  # each token after a chunk end of its own, all with one distribution
    prefix = bytekernels.token_prefix(ids, cu, boundary, tree)
    out = bytekernels.byte_marginals(logits, tree, torch.zeros_like(prefix), prefix)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = logits[0].double().log_softmax(0)
    accuracy = 1e-12 if dtype == torch.float64 else 1e-6
    for i, (start, stop) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        targets = ids[start + 1 : stop].long()
        targets[-1] += 256
        got = out[start : stop - 1].double().gather(1, targets[:, None]).sum()
        assert got.item() == pytest.approx(truth[i].item(), rel=accuracy, abs=accuracy)


@pytest.mark.parametrize("implementation", ["native", "reference"])
@settings(max_examples=40, deadline=None)
@given(lengths=ragged_lengths(), data=st.data())
def test_prefixes_are_the_bytes_since_the_chunk_end(implementation, lengths, data):
    tree = bytekernels.SortedVocabulary(SMALL)
    cu, total = ragged(lengths)
    ids = torch.tensor(data.draw(st.lists(st.sampled_from(b"abcd"), min_size=total, max_size=total)), dtype=torch.uint8)
    boundary = torch.rand(total, generator=torch.Generator().manual_seed(total)) < 0.4
    with poisoned_memory(), dispatch.force(implementation):
        got = bytekernels.token_prefix(ids, cu, boundary, tree)
    chunk_of, index, _ = bytekernels.chunk_layout(boundary, cu)
    expected = [
        nodes_of([bytes(ids[index[m] + 1 : t + 1].tolist())], tree).item() if m >= 0 else -1
        for t, m in enumerate(chunk_of.tolist())
    ]
    assert got.tolist() == expected


def test_the_references_chunks_go_through_in_blocks(monkeypatch):
    tree = bytekernels.SortedVocabulary(SMALL)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, len(SMALL), generator=generator)
    chunk_of = torch.arange(-1, 7, dtype=torch.int32).repeat_interleave(3)
    prefix = torch.randint(-1, tree.levels[-1], chunk_of.shape, generator=generator, dtype=torch.int32)
    with dispatch.force("reference"):
        whole = bytekernels.byte_marginals(logits, tree, chunk_of, prefix)
        monkeypatch.setattr(reference, "BLOCK", 2 * tree.levels[-1])
        assert torch.equal(bytekernels.byte_marginals(logits, tree, chunk_of, prefix), whole)


@pytest.mark.parametrize("rows", [0, 6])
def test_opcheck(rows):
    tree = bytekernels.SortedVocabulary(SMALL)
    ids, boundary = torch.full((rows,), 97).byte(), torch.arange(rows) % 3 == 0
    cu, _ = ragged([rows])
    chunk_of, index, _ = bytekernels.chunk_layout(boundary, cu)
    prefix = bytekernels.token_prefix(ids, cu, boundary, tree)
    torch.library.opcheck(op.token_prefix_op, (ids, cu, boundary, tree.edges, tree.children))
    logits = torch.randn(len(index), len(SMALL))
    layout = (tree.edges, tree.children, tree.nodes, tree.levels, tree.order, tree.spans)
    torch.library.opcheck(op.byte_marginals_op, (logits, chunk_of, prefix, *layout))


def test_compiled_without_a_break():
    tree = bytekernels.SortedVocabulary(SMALL)
    cu, total = ragged([4])
    ids, boundary = torch.full((total,), 97).byte(), torch.arange(total) % 2 == 0

    def probabilities(logits, chunk_of):
        prefix = bytekernels.token_prefix(ids, cu, boundary, tree)
        return bytekernels.byte_marginals(logits, tree, chunk_of, prefix).exp()

    compiled = torch.compile(probabilities, backend="eager", fullgraph=True)
    arguments = torch.randn(2, len(SMALL)), torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    assert torch.equal(compiled(*arguments), probabilities(*arguments))


def test_arguments_are_checked():
    tree = bytekernels.SortedVocabulary(SMALL)
    cu, total = ragged([3])
    ids, boundary = torch.zeros(total, dtype=torch.uint8), torch.ones(total, dtype=torch.bool)
    prefix = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="ids must be uint8"):
        bytekernels.token_prefix(ids.int(), cu, boundary, tree)
    with pytest.raises(TypeError, match="boundary must be bool"):
        bytekernels.token_prefix(ids, cu, boundary.int(), tree)
    with pytest.raises(ValueError, match=r"ids and boundary must have one shape \[T\], got \[3\] and \[2\]"):
        bytekernels.token_prefix(ids, cu, boundary[:2], tree)
    with pytest.raises(ValueError, match=r"logits must have shape \[M, 10\].*got \[1, 12\]: pad the vocabulary"):
        bytekernels.byte_marginals(torch.zeros(1, 12), tree, prefix, prefix)
    with pytest.raises(ValueError, match=r"chunk_of and prefix must have one shape \[T\], got \[3\] and \[2\]"):
        bytekernels.byte_marginals(torch.zeros(1, 10), tree, prefix, prefix[:2])
    with pytest.raises(TypeError, match=r"logits must have a floating dtype, got torch\.int64"):
        bytekernels.byte_marginals(torch.zeros(1, 10).long(), tree, prefix, prefix)
    with pytest.raises(TypeError, match=r"chunk_of must be int32, got torch\.int64: use chunk_of\.to"):
        bytekernels.byte_marginals(torch.zeros(1, 10), tree, prefix.long(), prefix)
    for wrong in (-2, 1):
        with pytest.raises(ValueError, match=rf"chunk_of must be in \[-1, 1\), as there are 1 chunks, got {wrong} at"):
            bytekernels.byte_marginals(torch.zeros(1, 10), tree, prefix + wrong, prefix)
    nodes = tree.levels[-1]
    with pytest.raises(
        ValueError, match=rf"prefix must be in \[-1, {nodes}\), as there are {nodes} nodes, got {nodes}"
    ):
        bytekernels.byte_marginals(torch.zeros(1, 10), tree, prefix, prefix + nodes)
