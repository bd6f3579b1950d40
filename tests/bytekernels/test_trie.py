"""The flat tree of a vocabulary against sets of prefixes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytekernels.trie import ByteTrie

vocabularies = st.lists(st.text("ab\xff", max_size=5).map(lambda text: text.encode("latin-1")), min_size=1).filter(any)


@settings(max_examples=60, deadline=None)
@given(strings=vocabularies)
def test_nodes_are_the_prefixes_in_sorted_order(strings):
    trie = ByteTrie(strings)
    prefixes = sorted({s[:n] for s in strings for n in range(len(s) + 1)}, key=lambda p: (len(p), p))
    number = {prefix: node for node, prefix in enumerate(prefixes)}
    assert trie.edges.shape[0] == len(prefixes)
    assert trie.levels[-1] == len(prefixes)
    assert trie.nodes.tolist() == [number[s] if s else -1 for s in strings]
    for prefix, node in number.items():
        assert trie.ids[node] == (strings.index(prefix) if prefix and prefix in strings else -1)
        below = [p for p in prefixes if len(p) == len(prefix) + 1 and p.startswith(prefix)]
        assert list(range(*trie.children[node : node + 2].tolist())) == [number[p] for p in below]
        assert trie.levels[len(prefix)] <= node < trie.levels[len(prefix) + 1]
        every = torch.arange(256)
        expected = [number.get(prefix + bytes([byte]), -1) for byte in range(256)]
        assert trie.child(torch.full_like(every, node), every.byte()).tolist() == expected
    assert trie.child(torch.full((256,), -1), torch.arange(256)).eq(-1).all()


def test_wrong_vocabularies_are_refused():
    with pytest.raises(TypeError, match="strings must be bytes, got str at index 1"):
        ByteTrie([b"a", "b"])
    for strings in ([], [b"", b""]):
        with pytest.raises(ValueError, match="at least one that is not empty"):
            ByteTrie(strings)
