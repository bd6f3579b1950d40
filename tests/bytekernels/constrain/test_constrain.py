"""Chunk ends held to a vocabulary, against all ways to cut a text; what the op checks and refuses."""

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


def bytes_of(text):
    return torch.tensor(list(text), dtype=torch.uint8)


def odds_of(text):
    """Log-odds of 1 where a chunk's end is wanted, and -1 elsewhere."""
    return torch.tensor([1.0 if mark == "|" else -1.0 for mark in text])


def drawn(total, seed):
    return 4 * torch.randn(total, generator=torch.Generator().manual_seed(seed)) - 1


def begins_a_string(text, vocabulary):
    return any(string.startswith(text) for string in vocabulary if string)


def may_be_chunk(chunk, following, vocabulary):
    alone = len(chunk) == 1 and not begins_a_string(chunk, vocabulary)
    longest = begins_a_string(chunk, vocabulary) and not begins_a_string(chunk + following, vocabulary)
    return chunk in vocabulary or alone or longest


def ways(document, vocabulary, start=0):
    """All ways to cut a document: lists of (end, is a string)."""
    for end in range(start + 1, len(document) + 1):
        chunk = document[start:end]
        if end == len(document) and (begins_a_string(chunk, vocabulary) or len(chunk) == 1):
            yield [(end, chunk in vocabulary)]
        elif end < len(document) and may_be_chunk(chunk, document[end : end + 1], vocabulary):
            for more in ways(document, vocabulary, end):
                yield [(end, chunk in vocabulary), *more]


def worth(way, log_odds):
    """The last chunk's end is left open."""
    return sum(log_odds[end - 1] for end, _ in way[:-1]) - sum(1e6 for _, is_string in way if not is_string)


def by_definition(document, log_odds, vocabulary, given=0):
    """The ends of one sequence, from all ways to cut it."""

    def best(text, before, first):
        """Of the ways that begin with some ends, and have no others before `first`: all ends but the last chunk's."""
        allowed = [(way, [end for end, _ in way[:-1]]) for way in ways(text, vocabulary)]
        allowed = [(way, ends) for way, ends in allowed if ends[: len(before)] == before]
        allowed = [(way, ends) for way, ends in allowed if all(end >= first for end in ends[len(before) :])]
        return max(allowed, key=lambda both: worth(both[0], log_odds))[1]

    if not document:
        return []
    context = best(document[:given], [], 0) if given > 1 else []
    cut = best(document, context, min(given, len(document)))
    return [end in cut for end in range(1, len(document))] + [log_odds[len(document) - 1] >= 0]


def test_as_defined(each):
    @settings(max_examples=100, deadline=None)
    @given(
        vocabulary=VOCABULARIES, documents=st.lists(STRINGS.map(lambda s: 2 * s), max_size=4), seed=st.integers(0, 99),
        contexts=st.lists(st.integers(0, 13), min_size=4, max_size=4) | st.none(),
    )  # fmt: skip
    def agree(vocabulary, documents, seed, contexts):
        cu, total = ragged([len(d) for d in documents])
        odds = drawn(total, seed)
        context = (contexts or [0] * 4)[: len(documents)]
        with poisoned_memory():
            ends = bytekernels.constrain_ends(
                bytes_of(b"".join(documents)), cu, odds, SortedVocabulary(vocabulary),
                torch.tensor(context, dtype=torch.int64) if contexts else None,
            )  # fmt: skip
        assert ends.dtype == torch.bool
        parts = zip(documents, odds.double().split([len(d) for d in documents]), context, strict=True)
        assert ends.tolist() == [end for d, part, c in parts for end in by_definition(d, part.tolist(), vocabulary, c)]

    agree()


@pytest.mark.parametrize(
    ("text", "wanted", "ends"),
    [
        (b"abab", "....", ".|.."),  # one end has to be, and this one is enough; the last bit is by its own odds
        (b"abab", "|..|", "||.|"),
        (b"abcd", "..|.", "...."),  # "abc" is no string
        (b"abcd", ".|..", "...."),  # "ab|cd" would end "c" that no string begins with
        (b"abcab", ".....", "|.|.."),  # the first bytes are given back: "abc" had to end, and is no string
        (b"xyab", "....", "||.."),  # bytes that begin no string are alone
        (b"xyabcx", "....||", "|||.||"),
        (b"a", "|", "|"),
        (b"abc", "..|", "|.|"),  # the last chunk is a string too
        (b"abcd", "|..|", "...|"),
        (b"da", "..", "|."),
        (b"", "", ""),
    ],
)
def test_examples(each, text, wanted, ends):
    found = bytekernels.constrain_ends(
        bytes_of(text), ragged([len(text)])[0], odds_of(wanted), SortedVocabulary(VOCABULARY)
    )
    assert "".join(".|"[end] for end in found) == ends


@pytest.mark.parametrize(("odds", "ends"), [(0.0, "|..|"), (-0.5, "|..|"), (0.5, "||||")])
def test_ties_go_to_the_longest_chunk_from_the_last_one_back(each, odds, ends):
    tree = SortedVocabulary([b"a", b"aa", b"aaa", b"b"])
    found = bytekernels.constrain_ends(bytes_of(b"aaaab"), ragged([5])[0], torch.full((5,), odds), tree)
    assert "".join(".|"[end] for end in found[:4]) == ends


def test_odds_beyond_all_and_none(each):
    odds = torch.tensor([torch.inf, torch.nan, -torch.inf, 1e30])
    found = bytekernels.constrain_ends(bytes_of(b"abab"), ragged([4])[0], odds, SortedVocabulary(VOCABULARY))
    limited = torch.tensor([1000.0, 0, -1000, 1000])
    assert torch.equal(
        found, bytekernels.constrain_ends(bytes_of(b"abab"), ragged([4])[0], limited, SortedVocabulary(VOCABULARY))
    )
    assert found.tolist() == [True, True, False, True]


def test_what_is_given_ends_in_a_string_that_may_be_lengthened(each):
    single, cu, odds, context = [bytes([i]) for i in range(256)], ragged([6])[0], -torch.ones(6), torch.tensor([3])
    for strings, text, ends in (
        ([b"hello"], b"hellox", "|||||."),
        ([b"hel", b"hello"], b"helorx", "..|||."),
        ([b"hel", b"hello"], b"hellox", "....|."),
    ):
        found = bytekernels.constrain_ends(bytes_of(text), cu, odds, SortedVocabulary([*strings, *single]), context)
        assert "".join(".|"[end] for end in found) == ends


def test_the_last_bit_is_by_its_own_odds(each):
    for odds, end in ((0.0, True), (torch.nan, True), (-1e-30, False), (torch.inf, True)):
        arguments = bytes_of(b"ab"), ragged([2])[0], torch.tensor([1.0, odds]), SortedVocabulary(VOCABULARY)
        assert bool(bytekernels.constrain_ends(*arguments)[1]) == end


def test_no_chunk_is_longer_than_63_bytes(each):
    for length in (62, 63, 64, 200):
        tree = SortedVocabulary([b"a" * length, b"a"])
        ids = bytes_of(b"a" * 300)
        ends = bytekernels.constrain_ends(ids, ragged([300])[0], torch.full((300,), -1.0), tree)
        lengths = torch.cat([torch.tensor([-1]), ends.nonzero().flatten()]).diff()
        assert set(lengths.tolist()) == ({length, 1} if length <= 63 else {1})


def test_tokens_stay_as_they_are(each):
    """Where all chunks are strings, and surely wanted, nothing changes."""
    strings = merged_strings(400)
    generator = torch.Generator().manual_seed(0)
    tokens = [strings[i] for i in torch.randint(len(strings), (300,), generator=generator)]
    ids = bytes_of(b"".join(tokens))
    wanted = torch.zeros(len(ids), dtype=torch.bool)
    wanted[torch.tensor([len(s) for s in tokens]).cumsum(0) - 1] = True
    odds = torch.where(wanted, 10.0, -10.0)
    ends = bytekernels.constrain_ends(ids, ragged([len(ids)])[0], odds, SortedVocabulary(strings))
    assert torch.equal(ends, wanted)


def test_ends_on_what_is_given_do_not_depend_on_what_follows(each):
    tree = SortedVocabulary(VOCABULARY)
    ids = torch.randint(97, 101, (40,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    odds, cu = drawn(40, 0), ragged([40])[0]
    free = bytekernels.constrain_ends(ids, cu, odds, tree)
    for given_rows in range(1, 41):
        context = torch.tensor([given_rows])
        found = bytekernels.constrain_ends(ids, cu, odds, tree, context)
        alone = bytekernels.constrain_ends(ids[:given_rows], ragged([given_rows])[0], odds[:given_rows], tree)
        assert torch.equal(found[: given_rows - 1], alone[:-1])
        other, bits = ids.clone(), odds.clone()
        other[given_rows:] = 97 + (other[given_rows:] - 96) % 4
        bits[given_rows - 1 :] *= -1
        changed = bytekernels.constrain_ends(other, cu, bits, tree, context)
        assert torch.equal(changed[: given_rows - 1], found[: given_rows - 1])
    for none in (1, 0, -(2**32) + 3):
        assert torch.equal(bytekernels.constrain_ends(ids, cu, odds, tree, torch.tensor([none])), free)
    assert torch.equal(
        bytekernels.constrain_ends(ids, cu, odds, tree, torch.tensor([2**40])),
        bytekernels.constrain_ends(ids, cu, odds, tree, torch.tensor([40])),
    )


def test_packed_is_one_by_one(each):
    @settings(max_examples=20, deadline=None)
    @given(lengths=ragged_lengths())
    def agree(lengths):
        tree = SortedVocabulary(VOCABULARY)
        cu, total = ragged(lengths)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(97, 101, (total,), generator=generator, dtype=torch.uint8)
        odds = drawn(total, 1)
        packed = bytekernels.constrain_ends(ids, cu, odds, tree)
        parts = zip(ids.split(lengths), odds.split(lengths), strict=True)
        alone = [bytekernels.constrain_ends(text, ragged([len(text)])[0], bits, tree) for text, bits in parts]
        assert torch.equal(packed, torch.cat(alone))

    agree()


def test_a_large_batch_on_any_threads():
    strings = merged_strings(5000)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(strings), (10_000,), generator=generator)
    cu, total = ragged([0, 1, 9000, 0, 30, 12_000, 5])
    ids = bytes_of(b"".join(strings[i] for i in tokens)[:total])
    odds, tree = drawn(total, 0) - 4, SortedVocabulary(strings)
    context = torch.tensor([0, 1, 5000, 3, 7, 0, 5])
    assert_repeats(NATIVE, lambda: [bytekernels.constrain_ends(ids, cu, odds, tree, context)])
    strided = [torch.stack([x, x], 1)[:, 0] for x in (ids, odds)]
    expected = bytekernels.constrain_ends(ids, cu, odds, tree, context)
    assert total / int(expected.sum()) > 2 and not torch.equal(expected, odds >= 0)
    assert torch.equal(bytekernels.constrain_ends(strided[0], cu, strided[1], tree, context), expected)
    for other in ("reference", "cuda"):
        with dispatch.force(other):
            assert torch.equal(bytekernels.constrain_ends(ids, cu, odds, tree, context), expected)


def test_a_tree_of_wrong_numbers_is_walked_within_its_arrays():
    """Whatever its arrays hold; all of ends is written."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        nodes, total = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
        ids, cu, odds, context = (
            bytes_of(b"a" * total),
            ragged([total])[0],
            drawn(total, 0),
            torch.tensor([nodes]).int(),
        )
        found = [torch.full((total,), 7, dtype=torch.uint8), torch.zeros(total, dtype=torch.uint8)]
        arguments = [*map(array, (ids, cu, odds, context)), tuple(map(array, wrong_tree(nodes, generator)))]
        _C.constrain_ends(*arguments, array(found[0]), 1)
        _C.cuda.constrain_ends(*arguments, *map(array, scratch(total)), array(found[1]), -1, 0)
        assert torch.equal(*found) and int(found[0].max()) <= 1


def scratch(total):
    """choices, best and before."""
    return torch.zeros(total).long(), torch.zeros(total).double(), torch.zeros(total, dtype=torch.uint8)


def test_it_is_traced_whole():
    """Nothing reads a tensor's values while torch.compile looks: what is checked of them is checked in the op."""
    tree = SortedVocabulary(VOCABULARY)
    arguments = bytes_of(b"abab"), ragged([4])[0], odds_of("|..|")

    @torch.compile(fullgraph=True, backend="eager")
    def ends(ids, cu, odds, context):
        return bytekernels.constrain_ends(ids, cu, odds, tree, context)

    context = torch.tensor([2])
    assert torch.equal(ends(*arguments, context), bytekernels.constrain_ends(*arguments, tree, context))


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 4]])
def test_opcheck(lengths):
    cu, total = ragged(lengths)
    tree = SortedVocabulary(VOCABULARY)
    arguments = (bytes_of(b"a" * total), cu, torch.zeros(total), torch.zeros(len(lengths)).int())
    torch.library.opcheck(op.constrain_ends_op, (*arguments, tree.edges, tree.children, tree.ids))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(ids=torch.zeros(2)), TypeError, "ids must be uint8, one byte a row, got torch.float32"),
        (
            dict(log_odds=torch.ones(2).bool()),
            TypeError,
            "log_odds must be floating, got torch.bool: of probabilities they are p.logit()",
        ),
        (dict(log_odds=odds_of("|")), ValueError, "ids and log_odds must have one shape [T], got [2] and [1]"),
        (dict(ids=bytes_of(b"ab")[None]), ValueError, "ids and log_odds must have one shape [T], got [1, 2] and [2]"),
        (dict(given=torch.ones(1)), TypeError, "given must be int64 or int32, got torch.float32"),
        (dict(cu_seqlens=torch.tensor(2).int()), ValueError, "cu_seqlens must have shape [S+1]"),
        (dict(given=torch.ones(2).int()), ValueError, "given must have 1 elements, one a sequence, got [2]"),
        (dict(cu_seqlens=torch.tensor([0, 2])), TypeError, "cu_seqlens must be int32"),
        (dict(cu_seqlens=torch.tensor([0, 3]).int()), ValueError, "cu_seqlens must start at 0 and end at 2"),
    ],
)
def test_arguments_are_checked(change, error, message):
    arguments = dict(ids=bytes_of(b"ab"), cu_seqlens=ragged([2])[0], log_odds=odds_of("||")) | change
    with pytest.raises(error, match=re.escape(message)):
        bytekernels.constrain_ends(**arguments, vocabulary=SortedVocabulary(VOCABULARY))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("log_odds", odds_of("|||"), "log_odds must have 2 elements, got 3"),
        ("cu_seqlens", torch.tensor([0, 3]).int(), "cu_seqlens must end at 2"),
        ("given", torch.zeros(2).int(), "given must have 1 elements, got 2"),
        ("string_ids", torch.zeros(1).int(), "string_ids must have 8 elements, got 1"),
        ("ends", torch.zeros(3, dtype=torch.bool), "ends must have 2 elements, got 3"),
        ("choices", torch.zeros(1).long(), "choices must have 2 elements, got 1"),
        ("best", torch.zeros(1).double(), "best must have 2 elements, got 1"),
        ("before", bytes_of(b"a"), "before must have 2 elements, got 1"),
    ],
)
def test_what_the_extension_refuses(place, value, message):
    tree = SortedVocabulary(VOCABULARY)
    arguments = dict(ids=bytes_of(b"ab"), cu_seqlens=ragged([2])[0], log_odds=odds_of("||"), given=torch.zeros(1).int())
    trie = dict(edges=tree.edges, children=tree.children, string_ids=tree.ids)
    memory = dict(zip(("choices", "best", "before"), scratch(2), strict=True))
    ends = dict(ends=torch.zeros(2, dtype=torch.bool))
    for part in (arguments, trie, memory, ends):
        if place in part:
            part[place] = value
    first, nodes, scratched, last = ([array(x) for x in part.values()] for part in (arguments, trie, memory, ends))
    calls = [lambda: _C.cuda.constrain_ends(*first, tuple(nodes), *scratched, *last, -1, 0)]
    if place not in memory:
        calls.append(lambda: _C.constrain_ends(*first, tuple(nodes), *last, 1))
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_roofline_counts_the_tensors():
    ids, cu, odds, context = bytes_of(b"abcd"), ragged([4])[0], odds_of("..|."), torch.zeros(1).int()
    ends = bytekernels.constrain_ends(ids, cu, odds, SortedVocabulary(VOCABULARY), context)
    assert roofline.constrain_ends(4, 1).bytes == sum(t.nbytes for t in (ids, cu, odds, context, ends))
