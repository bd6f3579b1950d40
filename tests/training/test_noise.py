"""Noise on batches: its rule by examples and properties, its draws, and that batches around it are as they were."""

from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytekernels import BOS, EOS, AlignedBatch
from training.changed import ChangedBatches
from training.data import Batches
from training.noise import Noise, noise_sequence
from training.stage_recipe import NOISE_KINDS


def sequence(tokens: list[bytes], eos: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """BOS and the tokens' bytes: uint8 [C], and their ends: bool [C]."""
    pieces = [bytes([BOS]), *tokens, *([bytes([EOS])] if eos else [])]
    ends = np.zeros(sum(map(len, pieces)), bool)
    ends[np.cumsum([len(piece) for piece in pieces]) - 1] = True
    return np.frombuffer(b"".join(pieces), np.uint8), ends


def marked(ids: np.ndarray, ends: np.ndarray) -> str:
    """Text with a bar behind each end, without BOS's."""
    pieces = np.split(ids, np.flatnonzero(ends) + 1)
    return "|".join(piece.tobytes().decode() for piece in pieces[1:] if len(piece))


def noised(tokens: list[bytes], kind: str) -> str:
    """What noise makes of the tokens, where as many more bytes follow that it need not be cut; those are left out."""
    ids, ends = sequence([*tokens, b"\n" * 40])
    found = noise_sequence(ids, ends, kind, 1.0, np.random.default_rng(0))
    assert found.ids.dtype == np.uint8
    text = marked(found.ids, (found.twin >= 0) & ends[found.twin])
    return "|".join(text.split("|")[: len(tokens)])


@pytest.mark.parametrize(
    ("tokens", "kind", "expected"),
    [
        ([b"Hello", b" the", "ré".encode()], "upper", "HELLO| THE|Ré"),
        ([b"a", b" the", b" ", b"  b"], "no_spaces", "a|the| |b"),
        ([b"ab", b" cd"], "repeat", "aabb|  ccdd"),
        (["日".encode(), b"b"], "repeat", "日日|bb"),
        ([b"ant", b"speak", b" x"], "antspeak", "A N T| S P E A K|   X"),
        ([b"ab", b"c"], "spaces", "a b| c"),
        ([b"abc", b" d"], "drop", "c|d"),  # of every token its last character stays
    ],
)
def test_the_rule_by_example(tokens, kind, expected):
    assert noised(tokens, kind) == expected


def test_a_dropped_end_moves_to_the_last_character_that_is_left():
    ids, ends = sequence([b"the", b" dog"])

    class Draw:
        def random(self, count):
            assert count == 8
            return np.array([1, 1, 1, 0, 1, 1, 0, 0])  # e, o and g are dropped

    found = noise_sequence(ids, ends, "drop", 0.5, Draw())
    assert marked(found.ids, (found.twin >= 0) & ends[found.twin]) == "th| d"
    assert found.origin.tolist() == [0, 1, 2, 4, 5]
    assert found.twin.tolist() == [0, 1, 3, 4, 7]


def test_twins_of_copies_and_inserted_spaces():
    ids, ends = sequence([b"ab", b"\n\n\n\n\n\n"])
    draw = np.random.default_rng(0)
    spaced = noise_sequence(ids, ends, "antspeak", 1.0, draw)
    assert spaced.ids[:4].tobytes() == b"\xfeA B" and spaced.twin[:4].tolist() == [0, 1, -1, 2]
    assert spaced.origin[:4].tolist() == [0, 1, -1, 2]
    doubled = noise_sequence(ids, ends, "repeat", 1.0, draw)
    assert doubled.ids[:5].tobytes() == b"\xfeaabb" and doubled.twin[:5].tolist() == [0, -1, 1, -1, 2]


def test_a_character_that_is_cut_is_left_alone():
    face = "😀".encode()
    ids, ends = sequence([face[2:], b"a", face[:2], face[2:], b"b", b"c" * 9, face[:1]])
    found = noise_sequence(ids, ends, "drop", 1.0, np.random.default_rng(0))
    assert found.ids.tobytes() == bytes([BOS]) + face[2:] + b"a" + face + b"bc" + face[:1]


def test_a_sequence_never_grows_and_ends_with_a_whole_token():
    ids, ends = sequence([b"abcd", b"efgh"], eos=True)
    found = noise_sequence(ids, ends, "repeat", 1.0, np.random.default_rng(0))
    assert found.ids.tobytes() == b"\xfeaabbccdd"
    ids, ends = sequence([b"abcdefgh"])
    assert noise_sequence(ids, ends, "antspeak", 1.0, np.random.default_rng(0)) is None


TOKENS = st.lists(st.text("aBz é日😀\n", min_size=1, max_size=6).map(str.encode), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(TOKENS, st.sampled_from(NOISE_KINDS), st.floats(0.05, 1.0), st.booleans(), st.integers(0, 2**31))
def test_tokens_keep_one_end_each_and_the_noise_can_be_taken_back(tokens, kind, rate, eos, seed):
    ids, ends = sequence(tokens, eos)
    found = noise_sequence(ids, ends, kind, rate, np.random.default_rng(seed))
    if found is None:
        return
    assert 1 < len(found.ids) <= len(ids)
    body = found.ids[1:]
    body[body != EOS].tobytes().decode()  # valid UTF-8
    carried = (found.twin >= 0) & ends[found.twin]
    whole = [token for token in np.split(found.origin, np.flatnonzero(carried) + 1) if len(token)]
    clean = np.split(np.arange(len(ids)), np.flatnonzero(ends) + 1)
    assert carried[-1] and len(whole) == int(carried.sum()) <= len(tokens) + 1 + eos
    for mine, theirs in zip(whole, clean, strict=False):
        kept = mine[mine >= 0]
        assert set(kept) <= set(theirs) and len(kept)
        if kind != "repeat":
            assert (np.diff(kept) > 0).all()
        if kind not in ("drop", "no_spaces"):
            assert set(kept) == set(theirs)
    inserted = found.origin < 0
    assert (found.ids[inserted] == 0x20).all() and (found.twin[inserted] == -1).all()
    copied = found.ids[~inserted] ^ ids[found.origin[~inserted]]
    assert set(np.unique(copied)) <= {0, 0x20}
    assert (copied == 0).all() or kind in ("upper", "random_case", "antspeak")
    answers = found.twin[found.twin >= 0]
    assert (np.diff(answers) > 0).all()  # no clean byte answers twice


@pytest.fixture
def batch(corpus) -> AlignedBatch:
    return next(Batches(corpus, window=64, batch_bytes=600, seed=1))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_batch_keeps_its_tokens_and_never_grows(batch, share):
    found = Noise(share, NOISE_KINDS, 0.2, seed=3).apply(batch)
    assert len(found.ids) <= len(batch.ids) and torch.equal(found.clean_ids, batch.ids)
    assert found.cu_seqlens[-1] == len(found.ids) == len(found.token_end) == len(found.twin)
    assert int(found.token_end.sum()) == len(found.token_ids) == found.token_cu[-1]
    for s in range(len(batch.cu_seqlens) - 1):
        mine = found.token_ids[found.token_cu[s] : found.token_cu[s + 1]]
        theirs = batch.token_ids[batch.token_cu[s] : batch.token_cu[s + 1]]
        assert torch.equal(mine, theirs[: len(mine)])
    clean = torch.equal(found.ids, batch.ids)
    assert clean == (share == 0)
    assert bool((found.twin >= 0).any()) == (share > 0)
    assert not (found.twin < 0).all() or torch.equal(found.token_end, batch.token_end)


def test_a_sequence_is_noised_alike_in_any_batch(corpus):
    noise = Noise(0.5, NOISE_KINDS, 0.2, seed=3)

    def sequences(batch_bytes):
        found = {}
        batches = Batches(corpus, window=64, batch_bytes=batch_bytes, seed=1)
        for one in islice(batches, 6400 // batch_bytes):
            noised = noise.apply(one)
            for clean, other in zip(pairwise(one.cu_seqlens), pairwise(noised.cu_seqlens), strict=True):
                found[one.ids[slice(*clean)].numpy().tobytes()] = noised.ids[slice(*other)].numpy().tobytes()
        return found

    small, large = sequences(128), sequences(640)
    common = small.keys() & large.keys()
    assert len(common) > 50
    assert all(small[text] == large[text] for text in common)
    assert len({text for text in common if small[text] != text}) > 10


def test_draws_depend_on_the_batch_and_the_seed_alone(corpus, batch):
    noise = Noise(0.5, NOISE_KINDS, 0.2, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(noise.apply(batch), noise.apply(batch), strict=True) if a is not None)
    other = Noise(0.5, NOISE_KINDS, 0.2, seed=4).apply(batch)
    assert not torch.equal(other.twin, noise.apply(batch).twin)
    shares = []
    for one, _ in zip(Batches(corpus, window=64, batch_bytes=600, seed=1), range(40), strict=False):
        found = noise.apply(one)
        shares += [bool((found.twin[a:b] >= 0).any()) for a, b in pairwise(found.cu_seqlens)]
    assert 0.4 < np.mean(shares) < 0.6


def test_a_noised_source_resumes_where_its_own_does(corpus):
    def source():
        return ChangedBatches(Batches(corpus, window=64, batch_bytes=300, seed=1), Noise(0.5, NOISE_KINDS, 0.2, seed=3))

    through, first, again = source(), source(), source()
    wanted = [next(through) for _ in range(4)]
    for _ in range(2):
        next(first)
    again.load_state_dict(again.merge_states([first.state_dict()]))
    for expected in wanted[2:]:
        assert all(torch.equal(a, b) for a, b in zip(next(again), expected, strict=True) if a is not None)
