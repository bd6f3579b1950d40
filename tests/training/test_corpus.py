"""A prepared corpus gives back its documents; what is damaged, unfinished or cannot be aligned is told."""

import json

import numpy as np
import pytest

from tests.training.conftest import texts_of
from training import corpus as module
from training.alignment import TokenBytes
from training.corpus import Corpus, prepare
from training.errors import UserError
from training.text import Document, Skipped, is_held_out


@pytest.fixture
def documents(mixed_documents):
    return mixed_documents


@pytest.fixture
def tokenizer(mixed_tokenizer):
    return mixed_tokenizer


@pytest.fixture
def corpus(mixed_corpus):
    return mixed_corpus


@pytest.fixture(scope="module")
def tokens(mixed_tokenizer):
    return TokenBytes(mixed_tokenizer)


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
    monkeypatch.setattr(module, "ENCODE_BYTES", 100)
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
    manifest = tmp_path / module.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 0}))
    with pytest.raises(UserError, match="format 0"):
        Corpus.open(tmp_path)
