"""Each implementation of byte marginals: sums, products along tokens, bits, rows that say nothing."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import _C, dispatch, extension
from bytekernels.marginals import op, roofline
from bytekernels.testing import merged_strings, poisoned_memory, ragged
from tests.bytekernels.conftest import INTERPRETED, NATIVE, assert_repeats, wrong_tree
from tests.bytekernels.marginals.conftest import (
    REFERENCE,
    SMALL,
    VOCABULARIES,
    marginals,
    nodes_of,
    products_along,
    spread_logits,
    vocabulary_of,
)

strings = st.text("abc\xff", max_size=4).map(lambda text: text.encode("latin-1"))


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def assert_agrees(fast, logits, vocabulary, chunk_of, prefix):
    """With the float64 reference: the same rows and entries are -inf, the others are right to 1e-6."""
    with poisoned_memory():
        out = marginals(fast, logits, vocabulary, chunk_of, prefix)
    truth = marginals(REFERENCE, logits.double(), vocabulary, chunk_of, prefix)
    assert out.dtype == torch.float32
    assert out.shape == truth.shape
    assert torch.equal(out.isinf(), truth.isinf())
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-6)


def test_agrees_with_the_reference(each):
    @settings(max_examples=min(each.examples, 40))
    @given(
        vocabulary=st.lists(strings, min_size=1, max_size=12).filter(any),
        chunks=st.integers(0, 3),
        rows=st.integers(0, 4 if each.interpreted else 20),
        seed=st.integers(0, 99),
    )
    def agree(vocabulary, chunks, rows, seed):
        tree = bytekernels.SortedVocabulary(vocabulary)
        generator = torch.Generator().manual_seed(seed)
        logits = 5 * torch.randn(chunks, len(vocabulary), generator=generator)
        chunk_of = torch.randint(-1, chunks, (rows,), generator=generator, dtype=torch.int32)
        prefix = torch.randint(-1, tree.levels[-1], (rows,), generator=generator, dtype=torch.int32)
        assert_agrees(each, logits, tree, chunk_of, prefix)

    agree()


@pytest.mark.parametrize("name", VOCABULARIES)
def test_rows_of_text(each, name):
    """A text of tokens, one chunk each, at every byte."""
    strings, tree = vocabulary_of(name)
    generator = torch.Generator().manual_seed(1)
    drawn = [s for s in (strings[i] for i in torch.randint(len(strings), (9,), generator=generator)) if s]
    drawn = drawn[: 4 if each.interpreted else 9]
    ids = torch.tensor(list(bytes([bytekernels.BOS]) + b"".join(drawn)), dtype=torch.uint8)
    boundary = torch.zeros(len(ids), dtype=torch.bool)
    boundary[torch.tensor([0, *(len(s) for s in drawn)]).cumsum(0)] = True
    cu, _ = ragged([len(ids)])
    chunk_of, index, _ = bytekernels.chunk_layout(boundary, cu)
    prefix = bytekernels.token_prefix(ids, cu, boundary, tree)
    for dtype in each.dtypes:
        if dtype != torch.float64:
            assert_agrees(each, spread_logits(len(index), len(strings), dtype), tree, chunk_of, prefix)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_product_along_a_token_is_its_probability(each, name):
    strings, tree = vocabulary_of(name)
    logits = spread_logits(1, len(strings))
    tokens = tree.order.long()
    if each.interpreted:
        tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:20]]
    assert_telescopes(each, logits, tree, tokens)


def assert_telescopes(fast, logits, tree, tokens):
    """Equal strings share their probability."""
    wide = logits[0].double().clone()
    wide[tree.nodes < 0] = -torch.inf
    shares = torch.zeros(tree.levels[-1], dtype=torch.float64)
    kept = tree.order.long()
    shares.index_add_(0, tree.nodes[kept].long(), wide.softmax(0)[kept])
    truth = shares[tree.nodes[tokens].long()].log()
    got = products_along(fast, logits, tree, tokens)
    torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_of_a_large_vocabulary(dtype):
    strings = merged_strings(50_000)
    tree = bytekernels.SortedVocabulary(strings)
    assert_telescopes(NATIVE, spread_logits(1, len(strings), dtype), tree, tree.order.long())


def test_tokens_of_a_large_vocabulary_in_triton(in_triton):
    """Intervals of coarse blocks, fine ones and single tokens."""
    strings = merged_strings(50_000)
    tree = bytekernels.SortedVocabulary(strings)
    tokens = torch.tensor([0, 7, 300, 7143, 21_429, 49_999]) if in_triton.interpreted else tree.order.long()
    assert_telescopes(in_triton, spread_logits(1, len(strings)), tree, tokens)


def test_rows_without_a_distribution_are_minus_infinity(each):
    tree = bytekernels.SortedVocabulary(SMALL)
    logits = torch.zeros(1, len(SMALL))
    logits[0, 7] = -300.0  # "bcab", the only token longer than "b", underflows
    prefixes = nodes_of([b"", b"abc", b"b", b"x", b""], tree)
    chunk_of = int32([0, 0, 0, 0, -1])
    with poisoned_memory():
        out = marginals(each, logits, tree, chunk_of, prefixes)
    assert not torch.isnan(out).any()
    assert bool((out[1:] == -torch.inf).all())
    assert out[0].exp().sum().item() == pytest.approx(1)
    assert out[0, 256 + 0xFF].exp().item() == pytest.approx(1 / 8)  # the end of text by its byte, among 8 likely tokens


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, pytest.param(-math.inf, id="all -inf")], ids=lambda value: str(value)
)
def test_chunks_of_no_numbers_have_no_distribution(each, value):
    """Of a NaN or an infinity in a column, or -inf in all; another chunk does not notice."""
    tree = bytekernels.SortedVocabulary(SMALL)
    logits = spread_logits(2, len(SMALL), spread=1.0)
    logits[0, slice(None) if value == -math.inf else 4] = value
    rows = nodes_of([b"", b"b"], tree).repeat(2)
    with poisoned_memory():
        out = marginals(each, logits, tree, int32([0, 0, 1, 1]), rows)
    assert bool((out[:2] == -torch.inf).all())
    assert out[2:].exp().sum(1).tolist() == pytest.approx([1, 1])


def test_masked_tokens_have_no_probability(each):
    tree = bytekernels.SortedVocabulary(SMALL)
    logits = spread_logits(1, len(SMALL), spread=1.0)
    logits[0, [0, 3]] = -math.inf  # "a" and "abc"
    logits[0, 1] = 70.0  # the empty entry counts for nothing
    rows = nodes_of([b"", b"a", b"ab"], tree)
    assert_agrees(each, logits, tree, torch.zeros_like(rows), rows)


def test_bits_alone_are_those_among_others(each):
    """A chunk among others, its rows in any order, a row by itself; strided arguments; again, on any threads."""
    strings, tree = vocabulary_of("byte-level")
    generator = torch.Generator().manual_seed(0)
    rows = 10 if each.interpreted else 200
    logits = spread_logits(5, len(strings))
    chunk_of = torch.randint(-1, 5, (rows,), generator=generator, dtype=torch.int32)
    prefix = torch.randint(-1, 60, (rows,), generator=generator, dtype=torch.int32)
    whole = marginals(each, logits, tree, chunk_of, prefix)
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(marginals(each, logits, tree, chunk_of[order], prefix[order]), whole[order])
    for m in range(5):
        mine = chunk_of == m
        alone = marginals(each, logits[m : m + 1], tree, torch.zeros_like(chunk_of[mine]), prefix[mine])
        assert torch.equal(alone, whole[mine])
    assert torch.equal(marginals(each, logits, tree, chunk_of[:1], prefix[:1]), whole[:1])
    wide = torch.cat([logits, logits], 1)[:, : len(strings)]
    paired = [torch.stack([t, torch.zeros_like(t)], -1)[..., 0] for t in (chunk_of, prefix)]
    assert torch.equal(marginals(each, wide, tree, *paired), whole)
    assert torch.equal(marginals(each, logits.T.contiguous().T, tree, chunk_of, prefix), whole)
    assert_repeats(each, lambda: [marginals(each, logits, tree, chunk_of, prefix)])


def test_many_chunks_on_any_threads():
    strings, tree = vocabulary_of("merged")
    logits = spread_logits(40, len(strings))
    chunk_of = torch.arange(-1, 40, dtype=torch.int32).repeat_interleave(3)[torch.randperm(123)]
    prefix = torch.randint(-1, 300, chunk_of.shape, dtype=torch.int32)
    assert_repeats(NATIVE, lambda: [marginals(NATIVE, logits, tree, chunk_of, prefix)])


@pytest.mark.parametrize("implementation", ["native", "cuda", "reference"])  # cuda: its kernel's body, on the host
def test_prefixes_of_a_long_text(implementation):
    """More bytes than one thread takes, chunks longer than every string, sequences that begin inside a chunk."""
    strings, tree = vocabulary_of("byte-level")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(strings), (4000,), generator=generator)
    ids = torch.tensor(list(b"".join(strings[i] for i in drawn)), dtype=torch.uint8)
    cu, total = ragged([0, 1, 2999, 0, len(ids) - 3000])
    boundary = torch.rand(total, generator=generator) < 0.2
    boundary[3000:5000] = False
    chunk_of, index, _ = bytekernels.chunk_layout(boundary, cu)
    with dispatch.force(implementation):
        found = bytekernels.token_prefix(ids, cu, boundary, tree)
    assert bool((found[3000:5000] == -1).all())
    known = chunk_of >= 0
    assert bool((found[~known] == -1).all())
    for t in torch.randint(total, (300,), generator=generator).tolist():
        if known[t]:
            begun = int(index[chunk_of[t]]) + 1
            assert found[t] == nodes_of([bytes(ids[begun : t + 1].tolist())], tree)
    if implementation == "native":
        with NATIVE.force():
            assert_repeats(NATIVE, lambda: [bytekernels.token_prefix(ids, cu, boundary, tree)])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("cu_seqlens", int32([0, 3]), "cu_seqlens must end at 2"),
        ("boundary", torch.ones(3).bool(), "boundary must have 2 elements, got 3"),
        ("children", int32([1]), "children must have 9 elements, got 1"),
        ("prefix", int32([0]), "prefix must have 2 elements, got 1"),
    ],
)
def test_what_the_extension_refuses_of_prefixes(place, value, message):
    tree = bytekernels.SortedVocabulary([b"a", b"abcd", b"bc", b"d"])
    given = dict(ids=torch.tensor([97, 98]).byte(), cu_seqlens=ragged([2])[0], boundary=torch.ones(2).bool())
    given |= dict(edges=tree.edges, children=tree.children, prefix=int32([-1, -1])) | {place: value}
    arrays = [*map(extension.array, given.values())]
    for call in (lambda: _C.token_prefix(*arrays, 1), lambda: _C.cuda.token_prefix(*arrays, -1, 0)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_prefixes_by_a_tree_of_wrong_numbers_are_within_it():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        nodes, total = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
        edges, children, _ = wrong_tree(nodes, generator)
        ids, (cu, _) = torch.full((total,), 97).byte(), ragged([total])
        given = [*map(extension.array, (ids, cu, torch.arange(total) % 3 == 0, edges, children))]
        found = [torch.full((total,), value, dtype=torch.int32) for value in (7, -1)]
        _C.token_prefix(*given, extension.array(found[0]), 1)
        _C.cuda.token_prefix(*given, extension.array(found[1]), -1, 0)
        assert torch.equal(*found) and int(found[0].min()) >= -1 and int(found[0].max()) < nodes


def test_which_implementation_serves_what():
    narrow, wide = torch.zeros(1, 3), torch.zeros(1, 3).double()
    assert op._byte_marginals.choose("cpu", (narrow,)) == "native"
    assert op._byte_marginals.choose("cpu", (wide,)) == "reference"
    assert op._token_prefix.choose("cpu", (narrow,)) == "native"
    for fast, message in (
        (NATIVE, "logits must be float32, bfloat16 or float16, got torch.float64"),
        (INTERPRETED, "takes float32, float16 and bfloat16, got float64"),
    ):
        with fast.force(), pytest.raises(RuntimeError, match=message):
            op._byte_marginals.choose("cpu", (wide,))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("sizes", (-1, 2), "logits must have shape [M, V], got -1, 2"),
        ("logits", torch.zeros(1, 3), "logits must have 2 elements, got 3"),
        ("edges", int32([]), "edges must have at least one element, the root's, got none"),
        ("children", int32([1]), "children must have 3 elements, got 1"),
        ("order", int32([0, 2]), "order[1] is 2, not in [0, 2)"),
        ("spans", int32([0, 1]), "spans must have 6 elements, got 2"),
        ("spans", int32([0, 0, 1, 0, 1, 3]), "spans[5] is 3, not in [0, 3)"),
        ("chunk_of", int32([1, 0]), "chunk_of[0] is 1, not in [-1, 1)"),
        ("chunk_of", int32([-2, 0]), "chunk_of[0] is -2, not in [-1, 1)"),
        ("prefix", int32([0]), "prefix must have 2 elements, got 1"),
        ("prefix", int32([0, 2]), "prefix[1] is 2, not in [-1, 2)"),
        ("out", torch.zeros(2, 511), "out must have 1024 elements, got 1022"),
    ],
)
def test_what_the_extension_refuses(place, value, message):
    tree = bytekernels.SortedVocabulary([b"a", b"a"])
    vocabulary = {name: getattr(tree, name) for name in ("edges", "children", "order", "spans")}
    rows = dict(sizes=(1, 2), logits=torch.zeros(1, 2), chunk_of=int32([0, 0]), prefix=int32([0, 0]))
    given = {**vocabulary, **rows, "out": torch.zeros(2, 512), place: value}
    arrays = tuple(extension.array(given[name]) for name in vocabulary)
    logits, *others = (given[name] for name in ("logits", "chunk_of", "prefix", "out"))
    with pytest.raises(ValueError, match=re.escape(message)):
        _C.byte_marginals(False, given["sizes"], extension.rows(logits), arrays, *map(extension.array, others), 1)


def test_a_vocabulary_of_wrong_numbers_is_read_within_its_arrays():
    """Numbers in range that fit each other by accident alone."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        nodes, tokens = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
        edges, children, _ = wrong_tree(nodes, generator)
        order = torch.randint(0, tokens, (tokens,), generator=generator, dtype=torch.int32)
        spans = torch.randint(0, tokens + 1, (nodes, 3), generator=generator, dtype=torch.int32)
        out = torch.full((nodes, 512), math.nan)
        logits, every = torch.zeros(1, tokens), torch.arange(nodes, dtype=torch.int32)
        arrays = tuple(map(extension.array, (edges, children, order, spans)))
        rest = map(extension.array, (torch.zeros_like(every), every, out))
        _C.byte_marginals(False, (1, tokens), extension.rows(logits), arrays, *rest, 1)
        assert not bool(out.isnan().any())


def test_rooflines_count_the_tensors():
    tree = bytekernels.SortedVocabulary(SMALL)
    ids, boundary, (cu, _) = torch.full((5,), 97).byte(), torch.arange(5) % 3 == 0, ragged([5])
    chunk_of, index, _ = bytekernels.chunk_layout(boundary, cu)
    prefix = bytekernels.token_prefix(ids, cu, boundary, tree)
    assert roofline.token_prefix(5, 1).bytes == sum(t.nbytes for t in (ids, boundary, cu, prefix))
    logits = torch.zeros(len(index), len(SMALL), dtype=torch.bfloat16)
    out = bytekernels.byte_marginals(logits, tree, chunk_of, prefix)
    work = roofline.byte_marginals(5, len(index), len(SMALL), torch.bfloat16)
    assert work.bytes == sum(t.nbytes for t in (logits, chunk_of, prefix, out))
    assert work.flops == 2 * len(index) * len(SMALL)
