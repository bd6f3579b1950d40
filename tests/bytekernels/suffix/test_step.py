"""Byte by byte the longest suffixes are those of the whole text, in any batch and whoever waits."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import _C, SuffixState
from bytekernels.extension import array
from bytekernels.ragged import BOS
from bytekernels.suffix import op, roofline
from bytekernels.testing import poisoned_memory, ragged
from tests.bytekernels.conftest import NATIVE, assert_repeats
from tests.bytekernels.suffix.conftest import STRINGS, VOCABULARIES, by_search

VOCABULARY = [b"a", b"aa", b"aaaa", b"ba", b"", b"ab", b"\xfea"]


def bytes_of(values):
    return torch.tensor(list(values), dtype=torch.uint8)


def test_steps_are_the_whole_text(each):
    """Sequences begin at different steps with BOS, wait at some, and end at different ones."""

    @settings(max_examples=25)
    @given(vocabulary=VOCABULARIES, documents=st.lists(STRINGS, min_size=2, max_size=4), seed=st.integers(0, 99))
    def agree(vocabulary, documents, seed):
        generator = torch.Generator().manual_seed(seed)
        documents = [bytes([BOS]) + 3 * document for document in documents]
        trie = bytekernels.SuffixTrie(vocabulary)
        state = SuffixState.empty(len(documents), trie)
        found, taken = [[] for _ in documents], [0] * len(documents)
        while any(count < len(document) for count, document in zip(taken, documents, strict=True)):
            draws = torch.rand(len(documents), generator=generator).tolist()
            mask = [n < len(d) and draw < 0.6 for n, d, draw in zip(taken, documents, draws, strict=True)]
            ids = [d[count] if on else 97 for on, count, d in zip(mask, taken, documents, strict=True)]
            before = state.recent.clone(), state.counts.clone()
            active = torch.tensor(mask)
            with poisoned_memory():
                step = bytekernels.longest_suffix_step(bytes_of(ids), state, trie, active=active)
            assert step.dtype == torch.int32
            for was, now in zip(before, (state.recent, state.counts), strict=True):
                assert torch.equal(was[~active], now[~active])
            for s, on in enumerate(mask):
                if on:
                    found[s].append(int(step[s]))
                    taken[s] += 1
                else:
                    assert step[s] == -1
        assert state.counts.tolist() == taken
        assert found == [by_search(document, vocabulary) for document in documents]

    agree()


def test_without_a_mask_all_are_active(each):
    trie = bytekernels.SuffixTrie(VOCABULARY)
    text = torch.randint(97, 99, (3, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    state = SuffixState.empty(3, trie)
    steps = [bytekernels.longest_suffix_step(column, state, trie) for column in text.T]
    expected = bytekernels.longest_suffix(text.flatten(), ragged([40] * 3)[0], trie)
    assert torch.equal(torch.stack(steps, 1).flatten(), expected)


def test_a_count_of_zero_begins_anew(each):
    trie = bytekernels.SuffixTrie(VOCABULARY)
    state = SuffixState.empty(2, trie)
    for _ in range(3):
        bytekernels.longest_suffix_step(bytes_of(b"aa"), state, trie)
    state.counts[1] = 0
    found = bytekernels.longest_suffix_step(bytes_of(b"aa"), state, trie)
    assert found.tolist() == [2, 0]


@settings(max_examples=40)
@given(vocabulary=VOCABULARIES, documents=st.lists(STRINGS.map(lambda s: 2 * s), max_size=4), rest=STRINGS)
def test_steps_continue_a_packed_text(vocabulary, documents, rest):
    trie = bytekernels.SuffixTrie(vocabulary)
    with poisoned_memory():
        state = SuffixState.after(bytes_of(b"".join(documents)), ragged([len(d) for d in documents])[0], trie)
    stepped = SuffixState.empty(len(documents), trie)
    for i in range(max(map(len, documents), default=0)):
        active = torch.tensor([i < len(d) for d in documents])
        ids = bytes_of([d[i] if i < len(d) else 0 for d in documents])
        bytekernels.longest_suffix_step(ids, stepped, trie, active=active)
    assert torch.equal(state.counts, stepped.counts)
    assert torch.equal(state.recent, stepped.recent)
    for i, byte in enumerate(rest):
        found = bytekernels.longest_suffix_step(bytes_of([byte] * len(documents)), state, trie)
        assert found.tolist() == [by_search(d + rest, vocabulary)[len(d) + i] for d in documents]


def test_a_large_batch_on_any_threads():
    trie = bytekernels.SuffixTrie(VOCABULARY)
    text = torch.randint(97, 99, (6, 2000), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    active = torch.arange(2000) % 3 > 0

    def call():
        state = SuffixState.empty(2000, trie)
        steps = [bytekernels.longest_suffix_step(ids, state, trie, active=active) for ids in text]
        return [*steps, state.recent, state.counts]

    assert_repeats(NATIVE, call)


@pytest.mark.parametrize("sequences", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(sequences, masked):
    trie = bytekernels.SuffixTrie(VOCABULARY)
    state = SuffixState.empty(sequences, trie)
    active = torch.arange(sequences) < 2 if masked else None
    arguments = (bytes_of(b"a" * sequences), active, state.recent, state.counts)
    torch.library.opcheck(op.longest_suffix_step_op, (*arguments, trie.edges, trie.children, trie.ids))


def test_compiled_without_a_break():
    trie = bytekernels.SuffixTrie(VOCABULARY)

    def two(ids, state):
        bytekernels.longest_suffix_step(ids, state, trie)
        return bytekernels.longest_suffix_step(ids, state, trie) + 1

    plain, traced = SuffixState.empty(2, trie), SuffixState.empty(2, trie)
    compiled = torch.compile(two, backend="eager", fullgraph=True)
    assert torch.equal(compiled(bytes_of(b"ab"), traced), two(bytes_of(b"ab"), plain))
    assert torch.equal(traced.recent, plain.recent)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(ids=torch.zeros(2)), TypeError, "ids must be uint8, one byte a row, got torch.float32"),
        (dict(ids=bytes_of(b"ab")[None]), ValueError, "ids must have shape [S], got [1, 2]"),
        (dict(ids=bytes_of(b"abc")), ValueError, "state.recent must have shape [3, 4], got [2, 4]"),
        (dict(recent=torch.zeros(2, 4)), TypeError, "state.recent must be torch.uint8, got torch.float32"),
        (dict(recent=bytes_of(b"ab")[:, None]), ValueError, "state.recent must have shape [2, 4], got [2, 1]"),
        (dict(recent=bytes_of(b"ab")[:, None].expand(2, 4)), ValueError, "the state's tensors must be contiguous"),
        (dict(counts=torch.zeros(2).long()), TypeError, "state.counts must be torch.int32, got torch.int64"),
        (dict(active=torch.ones(2)), TypeError, "active must be torch.bool, got torch.float32"),
        (dict(active=torch.ones(1).bool()), ValueError, "active must have shape [2], got [1]"),
    ],
)
def test_arguments_are_checked(change, error, message):
    trie = bytekernels.SuffixTrie(VOCABULARY)
    state = SuffixState.empty(2, trie)
    given = dict(ids=bytes_of(b"ab"), recent=state.recent, counts=state.counts, active=None) | change
    with pytest.raises(error, match=re.escape(message)):
        bytekernels.longest_suffix_step(
            given["ids"], SuffixState(given["recent"], given["counts"]), trie, active=given["active"]
        )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("ids", bytes_of(b"abc"), "ids must have 2 elements, got 3"),
        ("active", torch.ones(3).bool(), "active must have 2 elements, got 3"),
        ("recent", bytes_of(b"abc"), "recent must have as many bytes for each of 2 sequences, at least one, got 3"),
        ("recent", bytes_of(b""), "recent must have as many bytes for each of 2 sequences, at least one, got 0"),
        ("counts", bytes_of(b"abc"), "counts has 3 bytes, not a multiple of 4"),
        ("found", bytes_of(b"abcd"), "found must have 2 elements, got 1"),
    ],
)
def test_what_the_extension_refuses(place, value, message):
    trie = bytekernels.SuffixTrie(VOCABULARY)
    state = SuffixState.empty(2, trie)
    given = dict(ids=bytes_of(b"ab"), active=torch.ones(2).bool(), recent=state.recent, counts=state.counts)
    arrays = tuple(map(array, (trie.edges, trie.children, trie.ids)))
    *inputs, found = map(array, {**given, "found": torch.zeros(2, dtype=torch.int32), place: value}.values())
    for call in (
        lambda: _C.longest_suffix_step(*inputs, arrays, found, 1),
        lambda: _C.cuda.longest_suffix_step(*inputs, arrays, found, -1, 0),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_roofline_counts_the_tensors():
    trie = bytekernels.SuffixTrie(VOCABULARY)
    state, ids = SuffixState.empty(2, trie), bytes_of(b"ab")
    found = bytekernels.longest_suffix_step(ids, state, trie)
    slots = ids.nbytes  # one of each ring
    assert roofline.longest_suffix_step(2).bytes == ids.nbytes + slots + 2 * state.counts.nbytes + found.nbytes
