"""A prepared corpus gives back its documents; batches are exact, disjoint between ranks, and resumable."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bytekernels import BOS, EOS
from training import data
from training.alignment import TokenBytes
from training.data import Batches, Corpus, Split, cut_windows, held_out_batches, prepare
from training.errors import UserError
from training.teacher import train_tokenizer
from training.text import Document, Skipped, is_held_out

WINDOW = 48


def make_documents(n: int = 200) -> list[Document]:
    rng = np.random.default_rng(0)
    words = ["the", "kernel", "byte", "日本語", "👍🏽", "naïve", "returns", "\r\n", "x = 1"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 60))) for _ in range(n)]
    return [Document(f"file-{i}", text.encode()) for i, text in enumerate(["x", *texts[1:]])]


@pytest.fixture(scope="module")
def documents():
    return make_documents()


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, vocab_size=300)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return TokenBytes(tokenizer)


@pytest.fixture(scope="module")
def corpus(documents, tokenizer, tmp_path_factory):
    return prepare(documents, tokenizer, tmp_path_factory.mktemp("corpus"))


def texts_of(split: Split) -> list[bytes]:
    return [split.text[a:b].tobytes() for a, b in pairwise(split.doc_offsets)]


def rows_of(batch: data.Batch) -> list[bytes]:
    """Text of each window, without BOS."""
    return [bytes(batch.ids[a + 1 : b].tolist()) for a, b in pairwise(batch.cu_seqlens.tolist())]


def one_epoch(batches: Batches) -> list[data.Batch]:
    epoch, found = batches.epoch, []
    while batches.epoch == epoch:
        found.append(next(batches))
    return found


def same(a: data.Batch, b: data.Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


# ------------------------------------------------------------------------------------------------------ corpus


def test_a_corpus_holds_the_documents(corpus, documents, tokens):
    expected = {side: sorted(d.text for d in documents if is_held_out(d.source) is side) for side in (False, True)}
    assert expected[True]
    assert sorted(texts_of(corpus.train)) == expected[False]
    assert sorted(texts_of(corpus.held_out)) == expected[True]
    for split in (corpus.train, corpus.held_out):
        assert tokens.join(split.token_ids).tobytes() == split.text.tobytes()
        assert np.array_equal(split.token_lengths, tokens.sizes[split.token_ids])
        ends = np.concatenate([[0], np.cumsum(split.token_lengths, dtype=np.int64)])
        assert np.array_equal(ends[split.token_offsets], split.doc_offsets)


def test_the_manifest_tells_what_is_there(corpus, documents, tokens):
    manifest = corpus.manifest
    assert manifest["train"]["documents"] + manifest["held_out"]["documents"] == len(documents)
    assert manifest["train"]["bytes"] == len(corpus.train.text)
    assert manifest["train"]["tokens"] == len(corpus.train.token_ids)
    assert manifest["tokenizer"] == tokens.fingerprint
    assert manifest["skipped"] == {}
    assert (corpus.bos_id, corpus.eos_id) == (tokens.bos_id, tokens.eos_id)


def test_preparing_does_not_depend_on_how_it_is_chunked(corpus, documents, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ENCODE_BYTES", 100)
    again = prepare(documents, tokenizer, tmp_path)
    assert again.manifest == corpus.manifest
    assert np.array_equal(again.train.token_ids, corpus.train.token_ids)


def test_what_cannot_be_aligned_is_counted(documents, tokenizer, tmp_path, monkeypatch):
    encode = TokenBytes.encode

    def refuse_no(self, texts):
        return [None if text == "no" else found for text, found in zip(texts, encode(self, texts), strict=True)]

    monkeypatch.setattr(TokenBytes, "encode", refuse_no)
    skipped = Skipped()
    extra = [Document("inexact", b"no"), Document("empty", b"")]
    corpus = prepare([*documents, *extra], tokenizer, tmp_path, skipped=skipped)
    assert skipped.counts == {"token ends not exact": 1, "no text": 1}
    assert corpus.manifest["skipped"]["token ends not exact"] == {"count": 1, "first": ["inexact"]}
    assert corpus.train.documents + corpus.held_out.documents == len(documents)


def test_limit_bytes(documents, tokenizer, tmp_path):
    corpus = prepare(documents, tokenizer, tmp_path, limit_bytes=2000)
    assert 1000 < len(corpus.train.text) + len(corpus.held_out.text) <= 2000


def test_a_few_documents_still_give_a_held_out_one(tokenizer, tmp_path):
    few = [Document(name, name.encode()) for name in ("a", "b", "c")]
    assert not any(is_held_out(d.source) for d in few)
    corpus = prepare(few, tokenizer, tmp_path / "one")
    assert (corpus.train.documents, corpus.held_out.documents) == (2, 1)
    backwards = prepare(few[::-1], tokenizer, tmp_path / "two")
    assert texts_of(backwards.held_out) == texts_of(corpus.held_out)
    with pytest.raises(UserError, match=r"1 usable documents .* give more"):
        prepare(few[:1], tokenizer, tmp_path / "three")


def test_a_folder_without_a_manifest_is_no_corpus(documents, tokenizer, tmp_path):
    def interrupted():
        yield from documents
        raise KeyboardInterrupt

    prepare(documents, tokenizer, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prepare(interrupted(), tokenizer, tmp_path)
    with pytest.raises(UserError, match="holds no prepared corpus"):
        Corpus.open(tmp_path)
    prepare(documents, tokenizer, tmp_path)
    assert Corpus.open(tmp_path).train.documents


def test_preparing_again_leaves_a_mapped_corpus_alone(documents, tokenizer, tmp_path):
    corpus = prepare(documents, tokenizer, tmp_path)
    before = corpus.train.text.tobytes()
    prepare(documents[::2], tokenizer, tmp_path)
    assert corpus.train.text.tobytes() == before


def test_a_damaged_corpus_is_refused(documents, tokenizer, tmp_path):
    prepare(documents, tokenizer, tmp_path)
    path = tmp_path / "train" / "token_ids.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"token_ids\.bin is not the file"):
        Corpus.open(tmp_path)
    manifest = tmp_path / data.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 0}))
    with pytest.raises(UserError, match="format 0"):
        Corpus.open(tmp_path)


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
    assert all(same(a, b) for a, b in zip(epoch, one_epoch(second), strict=True))
    assert not same(epoch[0], next(first))
    assert not same(epoch[0], next(other))


def test_ranks_share_nothing_and_lose_nothing(corpus):
    alone = Batches(corpus, window=WINDOW, batch_bytes=200, seed=0)
    ranks = [Batches(corpus, window=WINDOW, batch_bytes=200, seed=0, rank=r, world_size=2) for r in range(2)]
    epoch = len(one_epoch(Batches(corpus, window=WINDOW, batch_bytes=200, seed=0)))
    for _ in range(epoch + 1):  # past two epochs
        for rank in ranks:
            assert same(next(alone), next(rank))
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
    assert all(same(a, next(resumed)) for a in expected)


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
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
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
    assert all(tensor.is_meta for tensor in vars(batch).values())
