"""Longest suffixes against a search through the vocabulary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels.suffix import op
from bytekernels.testing import poisoned_memory, ragged, ragged_lengths

strings = st.text("ab\xe9", max_size=6).map(lambda text: text.encode("latin-1"))
vocabularies = st.lists(strings, min_size=1, max_size=12).filter(any)


def by_search(document, vocabulary):
    found = []
    for end in range(1, len(document) + 1):
        matches = [(-len(s), i) for i, s in enumerate(vocabulary) if s and document[:end].endswith(s)]
        found.append(min(matches)[1] if matches else -1)
    return found


@settings(max_examples=60, deadline=None)
@given(vocabulary=vocabularies, documents=st.lists(strings, max_size=5))
def test_suffixes_are_the_longest_within_their_sequence(vocabulary, documents):
    cu, _ = ragged([len(d) for d in documents])
    ids = torch.tensor(list(b"".join(documents)), dtype=torch.uint8)
    with poisoned_memory():
        found = bytekernels.longest_suffix(ids, cu, bytekernels.SuffixTrie(vocabulary))
    assert found.dtype == torch.int32
    assert found.tolist() == [i for document in documents for i in by_search(document, vocabulary)]


@settings(max_examples=20, deadline=None)
@given(lengths=ragged_lengths())
def test_packed_is_one_by_one(lengths):
    trie = bytekernels.SuffixTrie([b"a", b"aa", b"aaaa", b"ba", b"", b"ab"])
    cu, total = ragged(lengths)
    ids = torch.randint(97, 99, (total,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = bytekernels.longest_suffix(ids, cu, trie)
    alone = [bytekernels.longest_suffix(part, ragged([len(part)])[0], trie) for part in ids.split(lengths)]
    assert torch.equal(packed, torch.cat(alone))


@pytest.mark.parametrize("lengths", [[4, 0, 1], []])
def test_opcheck(lengths):
    trie = bytekernels.SuffixTrie([b"a", b"ba"])
    cu, total = ragged(lengths)
    torch.library.opcheck(op.longest_suffix_op, (torch.full((total,), 97).byte(), cu, trie.edges, trie.ids))


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
