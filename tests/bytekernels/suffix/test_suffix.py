"""Longest suffixes of whole texts against a search through the vocabulary; what the op checks and refuses."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import _C, dispatch
from bytekernels.extension import array
from bytekernels.suffix import op, roofline
from bytekernels.testing import poisoned_memory, ragged, ragged_lengths
from tests.bytekernels.conftest import NATIVE, assert_repeats, wrong_tree
from tests.bytekernels.suffix.conftest import STRINGS, VOCABULARIES, by_search


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def letters(total, seed=0):
    return torch.randint(97, 99, (total,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_suffixes_are_the_longest_within_their_sequence(each):
    @settings(max_examples=60)
    @given(vocabulary=VOCABULARIES, documents=st.lists(STRINGS, max_size=5), data=st.data())
    def agree(vocabulary, documents, data):
        cu, total = ragged([len(d) for d in documents])
        ids = torch.tensor(list(b"".join(documents)), dtype=torch.uint8)
        trie = bytekernels.SuffixTrie(vocabulary)
        rows = data.draw(st.lists(st.integers(0, total - 1))) if total else []
        with poisoned_memory():
            found = bytekernels.longest_suffix(ids, cu, trie)
            asked = bytekernels.longest_suffix(ids, cu, trie, rows=int32(rows))
        assert found.dtype == asked.dtype == torch.int32
        assert found.tolist() == [i for document in documents for i in by_search(document, vocabulary)]
        assert asked.tolist() == found[rows].tolist()

    agree()


def test_packed_is_one_by_one(each):
    @settings(max_examples=20)
    @given(lengths=ragged_lengths())
    def agree(lengths):
        trie = bytekernels.SuffixTrie([b"a", b"aa", b"aaaa", b"ba", b"", b"ab"])
        cu, total = ragged(lengths)
        ids = letters(total)
        packed = bytekernels.longest_suffix(ids, cu, trie)
        alone = [bytekernels.longest_suffix(part, ragged([len(part)])[0], trie) for part in ids.split(lengths)]
        assert torch.equal(packed, torch.cat(alone))

    agree()


@pytest.mark.parametrize("first", [[bytes([byte]) for byte in range(256)], [b"\x00", b"\xff"]], ids=["all", "two"])
def test_a_large_text_on_any_threads(first):
    """More walks than one thread takes, with every byte below the root and with two."""
    generator = torch.Generator().manual_seed(0)
    more = torch.randint(256, (500, 3), generator=generator, dtype=torch.uint8)
    trie = bytekernels.SuffixTrie(
        [*first, *(bytes(row) for row in more.tolist()), *(bytes(row[1:]) for row in more.tolist())]
    )
    cu, total = ragged([0, 1, 2999, 7, 2000])
    ids = more[torch.randint(500, (total,), generator=generator)].flatten()[:total].clone()
    ids[::7] = 0
    rows = torch.randint(total, (3000,), generator=generator, dtype=torch.int32)
    with dispatch.force("reference"):
        expected = bytekernels.longest_suffix(ids, cu, trie)

    def call(name="native"):
        with dispatch.force(name):
            return bytekernels.longest_suffix(ids, cu, trie), bytekernels.longest_suffix(ids, cu, trie, rows=rows)

    assert_repeats(NATIVE, call)
    for name in ("native", "cuda"):
        found, asked = call(name)
        assert torch.equal(found, expected)
        assert torch.equal(asked, expected[rows.long()])


def test_arguments_may_be_slices(each):
    trie = bytekernels.SuffixTrie([b"a", b"ba", b"aba"])
    cu, total = ragged([3, 4])
    ids, rows = letters(total), int32([6, 0])
    expected = bytekernels.longest_suffix(ids, cu, trie, rows=rows)
    ids, cu, rows = (torch.stack([t, torch.zeros_like(t)], -1)[..., 0] for t in (ids, cu, rows))
    assert torch.equal(bytekernels.longest_suffix(ids, cu, trie, rows=rows), expected)


@pytest.mark.parametrize("rows", [None, [], [2, 0]])
@pytest.mark.parametrize("lengths", [[4, 0, 1], []])
def test_opcheck(lengths, rows):
    trie = bytekernels.SuffixTrie([b"a", b"ba"])
    cu, total = ragged(lengths)
    asked = None if rows is None else int32(rows if total else [])
    arguments = (torch.full((total,), 97).byte(), cu, asked, trie.edges, trie.children, trie.ids)
    torch.library.opcheck(op.longest_suffix_op, arguments)


def test_compiled_without_a_break():
    trie = bytekernels.SuffixTrie([b"a", b"ba"])
    cu, total = ragged([3, 2])

    def shifted(ids, rows):
        return bytekernels.longest_suffix(ids, cu, trie) + bytekernels.longest_suffix(ids, cu, trie, rows=rows)

    compiled = torch.compile(shifted, backend="eager", fullgraph=True)
    arguments = letters(total), int32([4, 3, 2, 1, 0])
    assert torch.equal(compiled(*arguments), shifted(*arguments))


def test_arguments_are_checked():
    trie = bytekernels.SuffixTrie([b"a"])
    cu, _ = ragged([2])
    ids = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"ids must be uint8, one byte a row, got torch\.int64"):
        bytekernels.longest_suffix(ids.long(), cu, trie)
    with pytest.raises(ValueError, match=r"ids must have shape \[T\], got \[1, 2\]"):
        bytekernels.longest_suffix(ids[None], cu, trie)
    with pytest.raises(ValueError, match="end at 1"):
        bytekernels.longest_suffix(ids[:1], cu, trie)
    with pytest.raises(TypeError, match=r"rows must be int32, got torch\.int64: use rows\.to"):
        bytekernels.longest_suffix(ids, cu, trie, rows=int32([0]).long())
    with pytest.raises(ValueError, match=r"rows must have shape \[R\], got \[\]"):
        bytekernels.longest_suffix(ids, cu, trie, rows=int32(0))
    for wrong in (-1, 2):
        with pytest.raises(
            ValueError, match=rf"rows must be in \[0, 2\), as there are 2 bytes, got {wrong} at index 1"
        ):
            bytekernels.longest_suffix(ids, cu, trie, rows=int32([0, wrong]))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("cu", int32([0, 3]), "cu_seqlens must end at 2, the number of rows, got 3"),
        ("rows", int32([0, 2]), "rows[1] is 2, but there are 2 rows"),
        ("rows", int32([-1]), "rows[0] is -1, but there are 2 rows"),
        ("edges", int32([]), "edges must have at least one element, the root's, got none"),
        ("children", int32([1, 2]), "children must have 3 elements, got 2"),
        ("string_ids", int32([1]), "string_ids must have 2 elements, got 1"),
        ("found", int32([0]), "found must have 2 elements, got 1"),
    ],
)
def test_what_the_extension_refuses(place, value, message):
    trie = bytekernels.SuffixTrie([b"a"])
    ids, cu = torch.zeros(2, dtype=torch.uint8), ragged([2])[0]
    given = dict(ids=ids, cu=cu, rows=int32([0, 1]), edges=trie.edges, children=trie.children, string_ids=trie.ids)
    ids, cu, rows, *arrays, found = map(array, {**given, "found": int32([0, 0]), place: value}.values())
    with pytest.raises(ValueError, match=re.escape(message)):
        _C.longest_suffix(ids, cu, rows, tuple(arrays), found, 1)


@pytest.mark.parametrize("run", [lambda *a: _C.longest_suffix(*a, 1), lambda *a: _C.cuda.longest_suffix(*a, -1, 0)])
def test_a_tree_of_wrong_numbers_is_walked_within_its_arrays(run):
    """Numbers that fit each other by accident alone: nothing outside is read, and each walk ends."""
    generator = torch.Generator().manual_seed(0)
    ids, cu = letters(50), ragged([50])[0]
    for _ in range(200):
        nodes = int(torch.randint(1, 9, (), generator=generator))
        found = torch.full((50,), -7, dtype=torch.int32)
        run(array(ids), array(cu), None, tuple(map(array, wrong_tree(nodes, generator))), array(found))
        assert bool((found != -7).all())


def test_rows_of_no_text_have_nothing_on_a_device():
    """There the values of rows are not read before the launch."""
    trie = bytekernels.SuffixTrie([b"a", b"b"])
    found, arrays = int32([7] * 4), tuple(map(array, (trie.edges, trie.children, trie.ids)))
    rows = int32([-1, 2, 1, 2**31 - 1])
    _C.cuda.longest_suffix(array(letters(2)), array(ragged([2])[0]), array(rows), arrays, array(found), -1, 0)
    assert found.tolist() == [-1, -1, by_search(bytes(letters(2).tolist()), [b"a", b"b"])[1], -1]


def test_roofline_counts_the_tensors():
    cu, total = ragged([5, 0, 12])
    ids, rows = letters(total), int32([3, 4])
    found = bytekernels.longest_suffix(ids, cu, bytekernels.SuffixTrie([b"a"]))
    assert roofline.longest_suffix(total, 3).bytes == ids.nbytes + cu.nbytes + found.nbytes
    assert roofline.longest_suffix(total, 3, 2).bytes == ids.nbytes + cu.nbytes + 2 * rows.nbytes
