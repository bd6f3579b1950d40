"""Windows are cut at token ends; batches are exact, disjoint between ranks, and resumable."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bytekernels import BOS, EOS, AlignedBatch
from tests.training.conftest import assert_same_batch, texts_of
from training import data
from training.alignment import TokenBytes
from training.corpus import Split
from training.data import Batches, cut_windows, held_out_batches

WINDOW = 48


@pytest.fixture
def corpus(mixed_corpus):
    return mixed_corpus


@pytest.fixture(scope="module")
def tokens(mixed_tokenizer):
    return TokenBytes(mixed_tokenizer)


def rows_of(batch: AlignedBatch) -> list[bytes]:
    """Text of each window, without BOS."""
    return [bytes(batch.ids[a + 1 : b].tolist()) for a, b in pairwise(batch.cu_seqlens.tolist())]


def one_epoch(batches: Batches) -> list[AlignedBatch]:
    epoch, found = batches.epoch, []
    while batches.epoch == epoch:
        found.append(next(batches))
    return found


# ------------------------------------------------------------------------------------------------------ windows


def split_of(lengths: list[list[int]]) -> Split:
    """A split of documents whose tokens have the given lengths in bytes."""
    flat = np.array([n for document in lengths for n in document], dtype=np.uint16)
    sizes = np.array([sum(document) for document in lengths], dtype=np.int64)
    counts = np.array([len(document) for document in lengths], dtype=np.int64)
    return Split(
        text=(np.arange(sizes.sum()) % 128).astype(np.uint8),
        doc_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        token_ids=np.arange(len(flat), dtype=np.int32),
        token_lengths=flat,
        token_offsets=np.concatenate([[0], np.cumsum(counts)]),
    )


def cut_one_by_one(lengths: list[list[int]], max_bytes: int) -> list[tuple[int, int, int, int, bool]]:
    windows, byte, token = [], 0, 0
    for document in lengths:
        if all(n <= max_bytes for n in document):
            first_byte, first_token, size, count = byte, token, 0, 0
            for n in document:
                if size + n > max_bytes:
                    windows.append((first_byte, size, first_token, count, False))
                    first_byte, first_token, size, count = first_byte + size, first_token + count, 0, 0
                size, count = size + n, count + 1
            if count:
                windows.append((first_byte, size, first_token, count, True))
        byte, token = byte + sum(document), token + len(document)
    return windows


DOCUMENTS_OF_TOKENS = st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12)


@given(DOCUMENTS_OF_TOKENS, st.integers(1, 20), st.sampled_from([1, 7, 1000]))
def test_windows_are_those_cut_one_by_one(lengths, max_bytes, tokens_at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CUT_TOKENS", tokens_at_once)
        windows = cut_windows(split_of(lengths), max_bytes)
    found = [windows.first_byte, windows.bytes, windows.first_token, windows.tokens, windows.last]
    assert list(zip(*(column.tolist() for column in found), strict=True)) == cut_one_by_one(lengths, max_bytes)
    assert windows.skipped_documents == sum(max(document, default=0) > max_bytes for document in lengths)


# ------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("eos", [True, False])
def test_a_batch_is_consistent(corpus, tokens, eos):
    batches = Batches(corpus, window=WINDOW, batch_bytes=200, seed=0, eos=eos)
    for batch in one_epoch(batches):
        assert batch.ids.dtype == torch.uint8
        assert batch.cu_seqlens.dtype == batch.token_cu.dtype == torch.int32
        assert batch.token_end.dtype == torch.bool
        assert batch.token_ids.dtype == torch.int64
        assert len(batch.ids) == len(batch.token_end) <= 200
        assert int(batch.token_end.sum()) == len(batch.token_ids) == batch.token_cu[-1]
        starts = batch.cu_seqlens[:-1].long()
        assert (batch.ids[starts] == BOS).all()
        assert (batch.ids == BOS).sum() == len(starts)
        assert batch.token_end[starts].all()
        assert batch.token_end[batch.cu_seqlens[1:].long() - 1].all()
        assert (batch.cu_seqlens.diff() <= WINDOW).all()
        for row, (a, b) in enumerate(pairwise(batch.cu_seqlens.tolist())):
            ids = batch.token_ids[batch.token_cu[row] : batch.token_cu[row + 1]].tolist()
            ends = batch.token_end[a:b].nonzero().flatten().tolist()
            assert len(ids) == len(ends)
            assert (ids[0], ends[0]) == (tokens.bos_id, 0)
            text = bytes(batch.ids[a:b].tolist())
            for token, before, end in zip(ids[1:], ends[:-1], ends[1:], strict=True):
                piece = text[before + 1 : end + 1]
                assert piece == (bytes([EOS]) if token == tokens.eos_id else tokens[token])


def build_one_by_one(corpus, split, windows, chosen: list[int], eos: bool) -> dict[str, list[int]]:
    """A batch's fields, made window by window and token by token."""
    fields = {"ids": [], "cu_seqlens": [0], "token_end": [], "token_ids": [], "token_cu": [0]}
    for window in chosen:
        fields["ids"].append(BOS)
        fields["token_end"].append(True)
        fields["token_ids"].append(corpus.bos_id)
        at = int(windows.first_byte[window])
        for token in range(windows.first_token[window], windows.first_token[window] + windows.tokens[window]):
            size = int(split.token_lengths[token])
            fields["ids"] += split.text[at : at + size].tolist()
            fields["token_end"] += [False] * (size - 1) + [True]
            fields["token_ids"].append(int(split.token_ids[token]))
            at += size
        assert at == windows.first_byte[window] + windows.bytes[window]
        if eos and windows.last[window]:
            fields["ids"].append(EOS)
            fields["token_end"].append(True)
            fields["token_ids"].append(corpus.eos_id)
        fields["cu_seqlens"].append(len(fields["ids"]))
        fields["token_cu"].append(len(fields["token_ids"]))
    return fields


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("side", ["train", "held_out"])
@pytest.mark.parametrize("threads", [None, 1, 3])
def test_a_batch_is_that_built_one_by_one(corpus, eos, side, threads):
    split = getattr(corpus, side)
    windows = cut_windows(split, WINDOW - 2)
    order = np.random.default_rng(1).permutation(len(windows))
    for chosen in (order, order[:1], order[:0]):
        batch = data.build_batch(corpus, split, windows, chosen, eos, threads=threads)
        expected = build_one_by_one(corpus, split, windows, chosen.tolist(), eos)
        assert batch.targets is None
        assert {name: getattr(batch, name).tolist() for name in expected} == expected


def test_an_epoch_is_the_documents(corpus):
    batches = Batches(corpus, window=WINDOW, batch_bytes=200, seed=0)
    rows = [row for batch in one_epoch(batches) for row in rows_of(batch)]
    assert sum(row.endswith(bytes([EOS])) for row in rows) == corpus.train.documents
    assert sum(len(row.rstrip(bytes([EOS]))) for row in rows) == len(corpus.train.text)
    in_order = [
        corpus.train.text[a : a + n].tobytes() + bytes([EOS]) * int(last)
        for a, n, last in zip(batches.windows.first_byte, batches.windows.bytes, batches.windows.last, strict=True)
    ]
    assert b"".join(in_order).split(bytes([EOS]))[:-1] == texts_of(corpus.train)
    assert sorted(rows) == sorted(in_order)
    assert rows != in_order


def test_epochs_and_seeds_differ_and_repeat(corpus):
    first, second = (Batches(corpus, window=WINDOW, batch_bytes=200, seed=3) for _ in range(2))
    other = Batches(corpus, window=WINDOW, batch_bytes=200, seed=4)
    epoch = one_epoch(first)
    for found, expected in zip(one_epoch(second), epoch, strict=True):
        assert_same_batch(found, expected)
    assert rows_of(epoch[0]) != rows_of(next(first))
    assert rows_of(epoch[0]) != rows_of(next(other))


def test_a_sample_is_the_same_windows_every_epoch(corpus):
    whole = Batches(corpus, window=WINDOW, batch_bytes=200, seed=3)
    sample = Batches(corpus, window=WINDOW, batch_bytes=200, seed=3, limit_bytes=300)
    epochs = [sorted(row for batch in one_epoch(sample) for row in rows_of(batch)) for _ in range(3)]
    assert epochs[0] == epochs[1] == epochs[2] and set(epochs[0]) < {
        row for batch in one_epoch(whole) for row in rows_of(batch)
    }
    text = sum(len(row.rstrip(bytes([EOS]))) for row in epochs[0])
    assert 300 - WINDOW < text <= 300 == sample.limit_bytes
    other = Batches(corpus, window=WINDOW, batch_bytes=200, seed=4, limit_bytes=300)
    assert epochs[0] != sorted(row for batch in one_epoch(other) for row in rows_of(batch))
    tiny = Batches(corpus, window=WINDOW, batch_bytes=200, seed=3, limit_bytes=1)
    assert len(tiny.windows) == 1


@pytest.mark.parametrize(("saved", "resumed"), [(None, 300), (300, None), (300, 200)])
def test_a_sample_is_resumed_as_that_sample(corpus, saved, resumed):
    common = {"window": WINDOW, "batch_bytes": 200, "seed": 3}
    state = Batches(corpus, **common, limit_bytes=saved).state_dict()
    with pytest.raises(ValueError, match="limit_bytes"):
        Batches(corpus, **common, limit_bytes=resumed).load_state_dict(state)
    Batches(corpus, **common, limit_bytes=saved).load_state_dict(state)


def test_ranks_share_nothing_and_lose_nothing(corpus):
    alone = Batches(corpus, window=WINDOW, batch_bytes=200, seed=0)
    ranks = [Batches(corpus, window=WINDOW, batch_bytes=200, seed=0, rank=r, world_size=2) for r in range(2)]
    epoch = len(one_epoch(Batches(corpus, window=WINDOW, batch_bytes=200, seed=0)))
    for _ in range(epoch + 1):  # past two epochs
        for rank in ranks:
            assert_same_batch(next(rank), next(alone))
        assert alone.state_dict() == ranks[0].state_dict() == ranks[1].state_dict()


def test_resuming_continues_exactly(corpus):
    batches = Batches(corpus, window=WINDOW, batch_bytes=200, seed=5, rank=1, world_size=2)
    for _ in range(len(one_epoch(Batches(corpus, window=WINDOW, batch_bytes=200, seed=5))) // 2 + 2):
        next(batches)
    assert batches.epoch == 1
    state = json.loads(json.dumps(batches.state_dict()))
    expected = [next(batches) for _ in range(5)]
    resumed = Batches(corpus, window=WINDOW, batch_bytes=200, seed=5, rank=1, world_size=2)
    resumed.load_state_dict(state)
    assert resumed.epoch == 1
    for batch in expected:
        assert_same_batch(next(resumed), batch)


def test_resuming_something_else_is_refused(corpus):
    state = Batches(corpus, window=WINDOW, batch_bytes=200, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"window = 64: they were saved with 48"):
        Batches(corpus, window=64, batch_bytes=200, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"seed = 1: they were saved with 0"):
        Batches(corpus, window=WINDOW, batch_bytes=200, seed=1).load_state_dict(state)


def test_wrong_sizes_are_refused(corpus):
    with pytest.raises(ValueError, match="batch_bytes 40 is smaller than a window of 48"):
        Batches(corpus, window=48, batch_bytes=40, seed=0)
    with pytest.raises(ValueError, match="at least 3 bytes, got 2"):
        Batches(corpus, window=2, batch_bytes=40, seed=0)
    with pytest.raises(ValueError, match=r"rank must be in 0 … 1 .*, got 2"):
        Batches(corpus, window=48, batch_bytes=48, seed=0, rank=2, world_size=2)


def test_held_out_batches(corpus):
    batches = held_out_batches(corpus, window=WINDOW, batch_bytes=100, limit_bytes=10**9)
    again = held_out_batches(corpus, window=WINDOW, batch_bytes=100, limit_bytes=10**9)
    for one, other in zip(again, batches, strict=True):
        assert_same_batch(one, other)
    rows = [row for batch in batches for row in rows_of(batch)]
    assert sum(len(row) for row in rows) == len(corpus.held_out.text)
    assert not any(EOS in row for row in rows)
    assert all(len(batch.ids) <= 100 for batch in batches)
    fewer = held_out_batches(corpus, window=WINDOW, batch_bytes=100, limit_bytes=150)
    some = [row for batch in fewer for row in rows_of(batch)]
    assert 150 - WINDOW < sum(len(row) for row in some) <= 150
    assert some == rows[: len(some)]


def test_a_batch_moves_to_a_device(corpus):
    batch = next(Batches(corpus, window=WINDOW, batch_bytes=200, seed=0)).to("meta")
    assert all(tensor.is_meta for tensor in batch if tensor is not None)
