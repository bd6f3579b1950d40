"""Chunk ends held to a vocabulary, against the definition on strings; what the op checks and refuses."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import _C, SortedVocabulary, dispatch
from bytekernels.constrain import op, roofline
from bytekernels.extension import array
from bytekernels.testing import merged_strings, poisoned_memory, ragged, ragged_lengths
from tests.bytekernels.conftest import NATIVE, assert_repeats, wrong_tree
from tests.bytekernels.suffix.conftest import STRINGS, VOCABULARIES

VOCABULARY = [b"a", b"ab", b"abcd", b"b", b"bc", b"", b"d"]


def flags(text):
    return torch.tensor([mark == "|" for mark in text])


def bytes_of(text):
    return torch.tensor(list(text), dtype=torch.uint8)


def by_definition(document, wanted, vocabulary):
    """The ends of one sequence, from the bytes of each open chunk."""
    ends, chunk = [], b""
    for t, byte in enumerate(document):
        chunk += bytes([byte])
        if t + 1 == len(document):
            ends.append(wanted[t])
        else:
            goes_on = any(string.startswith(chunk + document[t + 1 : t + 2]) for string in vocabulary)
            ends.append(not goes_on or (wanted[t] and chunk in vocabulary))
        if ends[-1]:
            chunk = b""
    return ends


def test_as_defined(each):
    @settings(max_examples=100)
    @given(
        vocabulary=VOCABULARIES, documents=st.lists(STRINGS.map(lambda s: 2 * s), max_size=4), seed=st.integers(0, 99)
    )
    def agree(vocabulary, documents, seed):
        cu, total = ragged([len(d) for d in documents])
        wanted = torch.rand(total, generator=torch.Generator().manual_seed(seed)) < 0.4
        with poisoned_memory():
            ends = bytekernels.constrain_ends(bytes_of(b"".join(documents)), cu, wanted, SortedVocabulary(vocabulary))
        assert ends.dtype == torch.bool
        parts = wanted.split([len(d) for d in documents])
        pairs = zip(documents, parts, strict=True)
        assert ends.tolist() == [end for d, part in pairs for end in by_definition(d, part.tolist(), vocabulary)]

    agree()


@pytest.mark.parametrize(
    ("text", "wanted", "ends"),
    [
        (b"abab", "....", ".|.."),  # "aba" begins no string; the last bit is the one that was given
        (b"abab", "|..|", "||.|"),  # "a" is a string, and may end
        (b"abcd", "..|.", "...."),  # "abc" is none, and "abcd" goes on
        (b"abcab", ".....", "..|.."),  # "abc" had to end
        (b"xyab", "....", "||.."),  # bytes that begin no string are alone
        (b"a", "|", "|"),
        (b"abc", "..|", "..|"),  # no string, but nothing more is known
    ],
)
def test_examples(each, text, wanted, ends):
    found = bytekernels.constrain_ends(
        bytes_of(text), ragged([len(text)])[0], flags(wanted), SortedVocabulary(VOCABULARY)
    )
    assert torch.equal(found, flags(ends))


def test_tokens_stay_as_they_are(each):
    """Where all chunks are strings nothing changes."""
    strings = merged_strings(400)
    generator = torch.Generator().manual_seed(0)
    drawn = [strings[i] for i in torch.randint(len(strings), (300,), generator=generator)]
    ids = bytes_of(b"".join(drawn))
    wanted = torch.zeros(len(ids), dtype=torch.bool)
    wanted[torch.tensor([len(s) for s in drawn]).cumsum(0) - 1] = True
    ends = bytekernels.constrain_ends(ids, ragged([len(ids)])[0], wanted, SortedVocabulary(strings))
    assert torch.equal(ends, wanted)


def test_no_byte_after_the_next_tells(each):
    """Ends depend on the bytes up to the next one, and on the bits up to their own."""
    generator = torch.Generator().manual_seed(0)
    tree = SortedVocabulary(VOCABULARY)
    ids = torch.randint(97, 101, (60,), generator=generator, dtype=torch.uint8)
    wanted = torch.rand(60, generator=generator) < 0.5
    cu = ragged([60])[0]
    whole = bytekernels.constrain_ends(ids, cu, wanted, tree)
    for t in range(58):
        other, bits = ids.clone(), wanted.clone()
        other[t + 2 :] = 97 + (other[t + 2 :] - 96) % 4
        bits[t + 1 :] ^= True
        changed = bytekernels.constrain_ends(other, cu, bits, tree)
        assert torch.equal(changed[: t + 1], whole[: t + 1])


def test_packed_is_one_by_one(each):
    @settings(max_examples=20)
    @given(lengths=ragged_lengths())
    def agree(lengths):
        tree = SortedVocabulary(VOCABULARY)
        cu, total = ragged(lengths)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(97, 101, (total,), generator=generator, dtype=torch.uint8)
        wanted = torch.rand(total, generator=generator) < 0.5
        packed = bytekernels.constrain_ends(ids, cu, wanted, tree)
        parts = zip(ids.split(lengths), wanted.split(lengths), strict=True)
        alone = [bytekernels.constrain_ends(text, ragged([len(text)])[0], bits, tree) for text, bits in parts]
        assert torch.equal(packed, torch.cat(alone))

    agree()


def test_a_large_batch_on_any_threads():
    strings = merged_strings(5000)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(strings), (10_000,), generator=generator)
    cu, total = ragged([0, 1, 9000, 0, 30, 12_000, 5])
    ids = bytes_of(b"".join(strings[i] for i in drawn)[:total])
    wanted, tree = torch.rand(total, generator=generator) < 0.1, SortedVocabulary(strings)
    assert_repeats(NATIVE, lambda: [bytekernels.constrain_ends(ids, cu, wanted, tree)])
    strided = [torch.stack([x, x], 1)[:, 0] for x in (ids, wanted)]
    expected = bytekernels.constrain_ends(ids, cu, wanted, tree)
    assert total / int(expected.sum()) > 2 and not torch.equal(expected, wanted)
    assert torch.equal(bytekernels.constrain_ends(strided[0], cu, strided[1], tree), expected)
    with dispatch.force("reference"):
        assert torch.equal(bytekernels.constrain_ends(ids, cu, wanted, tree), expected)


def test_a_tree_of_wrong_numbers_is_walked_within_its_arrays():
    """Whatever its arrays hold; all of ends is written."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        nodes, total = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
        ids, cu, boundary = bytes_of(b"a" * total), ragged([total])[0], torch.arange(total) % 2 == 0
        found = [torch.full((total,), 7, dtype=torch.uint8), torch.zeros(total, dtype=torch.uint8)]
        given = [*map(array, (ids, cu, boundary)), tuple(map(array, wrong_tree(nodes, generator)))]
        _C.constrain_ends(*given, array(found[0]), 1)
        _C.cuda.constrain_ends(*given, array(torch.zeros(total).int()), array(found[1]), -1, 0)
        assert torch.equal(*found) and int(found[0].max()) <= 1


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 4]])
def test_opcheck(lengths):
    cu, total = ragged(lengths)
    tree = SortedVocabulary(VOCABULARY)
    arguments = (bytes_of(b"a" * total), cu, torch.zeros(total, dtype=torch.bool))
    torch.library.opcheck(op.constrain_ends_op, (*arguments, tree.edges, tree.children, tree.ids))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(ids=torch.zeros(2)), TypeError, "ids must be uint8, one byte a row, got torch.float32"),
        (dict(boundary=torch.ones(2)), TypeError, "boundary must be bool, got torch.float32: compare it"),
        (dict(boundary=flags("|")), ValueError, "ids and boundary must have one shape [T], got [2] and [1]"),
        (dict(ids=bytes_of(b"ab")[None]), ValueError, "ids and boundary must have one shape [T], got [1, 2] and [2]"),
        (dict(cu_seqlens=torch.tensor([0, 2])), TypeError, "cu_seqlens must be int32"),
        (dict(cu_seqlens=torch.tensor([0, 3]).int()), ValueError, "cu_seqlens must start at 0 and end at 2"),
    ],
)
def test_arguments_are_checked(change, error, message):
    given = dict(ids=bytes_of(b"ab"), cu_seqlens=ragged([2])[0], boundary=flags("||")) | change
    with pytest.raises(error, match=re.escape(message)):
        bytekernels.constrain_ends(**given, vocabulary=SortedVocabulary(VOCABULARY))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("boundary", bytes_of(b"abc"), "boundary must have 2 elements, got 3"),
        ("cu_seqlens", torch.tensor([0, 3]).int(), "cu_seqlens must end at 2"),
        ("string_ids", torch.zeros(1).int(), "string_ids must have 8 elements, got 1"),
        ("ends", flags("|||"), "ends must have 2 elements, got 3"),
        ("scratch", torch.zeros(1).int(), "scratch must have 2 elements, got 1"),
    ],
)
def test_what_the_extension_refuses(place, value, message):
    tree = SortedVocabulary(VOCABULARY)
    given = dict(ids=bytes_of(b"ab"), cu_seqlens=ragged([2])[0], boundary=flags("||"))
    given |= dict(edges=tree.edges, children=tree.children, string_ids=tree.ids, ends=flags(".."))
    given |= dict(scratch=torch.zeros(2).int()) | {place: value}
    ids, cu, boundary, edges, children, string_ids, ends, scratch = map(array, given.values())
    calls = [lambda: _C.cuda.constrain_ends(ids, cu, boundary, (edges, children, string_ids), scratch, ends, -1, 0)]
    if place != "scratch":
        calls.append(lambda: _C.constrain_ends(ids, cu, boundary, (edges, children, string_ids), ends, 1))
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_roofline_counts_the_tensors():
    ids, cu, wanted = bytes_of(b"abcd"), ragged([4])[0], flags("..|.")
    ends = bytekernels.constrain_ends(ids, cu, wanted, SortedVocabulary(VOCABULARY))
    assert roofline.constrain_ends(4, 1).bytes == sum(t.nbytes for t in (ids, cu, wanted, ends))
