"""Tokens replaced by draws from the vocabulary: what is written, which ends are kept, and how often each is drawn."""

import copy
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import BOS, AlignedBatch
from training.alignment import TokenBytes
from training.data import Batches
from training.vocabulary import Replaced, VocabularyDraw, vocabulary_of


@pytest.fixture(scope="module")
def tokens(tokenizer) -> TokenBytes:
    return TokenBytes(tokenizer)


def draw_of(tokens, corpus, *, share=1.0, rate=1.0, power=0.5, seed=3) -> VocabularyDraw:
    return VocabularyDraw.by_frequency(tokens, corpus.train.token_ids, power=power, share=share, rate=rate, seed=seed)


@pytest.fixture
def batch(corpus) -> AlignedBatch:
    return next(Batches(corpus, window=64, batch_bytes=600, seed=1))


def sequences(batch: AlignedBatch) -> list[Replaced]:
    """The batch's sequences, with the sizes of the tokens that end."""
    found = []
    ends = batch.token_end.nonzero().flatten().numpy()
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        mine = ends[(ends >= start) & (ends < stop)]
        token_ids = batch.token_ids[len(ends[ends < start]) :][: len(mine)].numpy()
        found.append(Replaced(batch.ids[start:stop].numpy(), np.diff(mine - start, prepend=-1), token_ids))
    return found


@settings(max_examples=60, deadline=None)
@given(rate=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 2**31 - 1))
def test_what_is_written_are_the_tokens(tokens, corpus, rate, seed):
    draw = draw_of(tokens, corpus, rate=rate, seed=seed)
    for clean in sequences(next(Batches(corpus, window=64, batch_bytes=600, seed=1))):
        found = draw.replaced(clean)
        assert found.ids[0] == BOS and found.token_ids[0] == tokens.bos_id
        assert found.sizes.sum() == len(found.ids) <= len(clean.ids)
        pieces = np.split(found.ids, np.cumsum(found.sizes)[:-1])
        plain = [piece.tobytes() for piece in pieces if piece[0] < BOS]
        ids = [i for i, piece in zip(found.token_ids, pieces, strict=True) if piece[0] < BOS]
        assert plain == [tokens[i] for i in ids]
        if rate == 0:
            assert np.array_equal(found.ids, clean.ids) and np.array_equal(found.token_ids, clean.token_ids)


@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_an_end_is_kept_where_the_token_is_the_longest_string_that_ends_there(tokens, corpus, batch, rate):
    found = draw_of(tokens, corpus, rate=rate).apply(batch)
    assert len(found.token_ids) == int(found.token_end.sum()) == found.token_cu[-1]
    assert found.cu_seqlens[-1] == len(found.ids) <= len(batch.ids)
    assert not torch.equal(found.ids[: len(batch.ids)], batch.ids[: len(found.ids)])
    dropped = 0
    for clean, start, stop, first, last in zip(
        sequences(batch), found.cu_seqlens, found.cu_seqlens[1:], found.token_cu, found.token_cu[1:], strict=False
    ):
        written = draw_of(tokens, corpus, rate=rate).replaced(clean)
        assert np.array_equal(found.ids[start:stop].numpy(), written.ids)
        expected = []
        for end, token in zip(np.cumsum(written.sizes), written.token_ids, strict=True):
            text = written.ids[:end].tobytes()
            longer = [len(tokens[i]) for i in range(len(tokens)) if not tokens.special[i] and text.endswith(tokens[i])]
            if text[-1] >= BOS or max(longer) == len(tokens[token]):
                expected.append((end - 1, token))
        dropped += len(written.sizes) - len(expected)
        places = found.token_end[start:stop].nonzero().flatten().tolist()
        assert list(zip(places, found.token_ids[first:last].tolist(), strict=True)) == expected
    assert dropped > 0


def test_sequences_that_are_left_alone_keep_every_end(tokens, corpus, batch):
    same = draw_of(tokens, corpus, share=0.0).apply(batch)
    assert all(torch.equal(a, b) for a, b in zip(same[:5], batch[:5], strict=True))
    mixed = draw_of(tokens, corpus, share=0.5).apply(batch)
    alike = [
        torch.equal(mixed.ids[a:b], batch.ids[c:d]) and torch.equal(mixed.token_end[a:b], batch.token_end[c:d])
        for (a, b), (c, d) in zip(pairwise(mixed.cu_seqlens), pairwise(batch.cu_seqlens), strict=True)
    ]
    assert 0 < sum(alike) < len(alike)


def test_targets_follow_the_new_text(tokens, corpus, batch):
    aimed = batch._replace(targets=bytekernels.next_byte_targets(batch.ids, batch.cu_seqlens, batch.token_end))
    found = draw_of(tokens, corpus).apply(aimed)
    expected = bytekernels.next_byte_targets(found.ids, found.cu_seqlens, found.token_end)
    assert torch.equal(found.targets, expected)


def test_a_sequence_is_drawn_alike_in_any_batch(tokens, corpus):
    draw = draw_of(tokens, corpus, share=0.7, rate=0.5)

    def texts(batch_bytes):
        found = {}
        for one in islice(Batches(corpus, window=64, batch_bytes=batch_bytes, seed=1), 6400 // batch_bytes):
            changed = draw.apply(one)
            for clean, other in zip(pairwise(one.cu_seqlens), pairwise(changed.cu_seqlens), strict=True):
                found[one.ids[slice(*clean)].numpy().tobytes()] = changed.ids[slice(*other)].numpy().tobytes()
        return found

    small, large = texts(128), texts(640)
    common = small.keys() & large.keys()
    assert len(common) > 50
    assert all(small[text] == large[text] for text in common)


def test_tokens_are_drawn_by_their_frequency(tokens, corpus):
    counts = np.bincount(corpus.train.token_ids, minlength=len(tokens))
    draw = draw_of(tokens, corpus)
    usable = draw.weights > 0
    assert not usable[tokens.special].any() and not usable[tokens.sizes == 0].any()
    assert not any(draw.weights[i] for i in range(len(tokens)) if {0xFE, 0xFF} & {*tokens[i]})
    np.testing.assert_allclose(draw.weights[usable], np.sqrt(counts[usable] + 1))
    found = np.zeros(len(tokens))
    for one in islice(Batches(corpus, window=64, batch_bytes=600, seed=1), 60):
        for clean in sequences(one):
            written = draw.replaced(clean)
            np.add.at(found, written.token_ids[1:-1], 1)  # but for BOS and a last one, which may be EOS
    assert not found[~usable].any()
    # A frequent token against a rare one, in the proportion of their weights. Long tokens are cut off more often.
    often, rare = counts >= np.quantile(counts[usable], 0.9), usable & (counts <= np.quantile(counts[usable], 0.5))
    wanted = draw.weights[often & usable].sum() / draw.weights[rare].sum()
    assert 0.8 < found[often].sum() / found[rare].sum() / wanted < 1.2


def test_the_same_draws_again(tokens, corpus, batch):
    draw = draw_of(tokens, corpus, share=0.5)
    assert all(torch.equal(a, b) for a, b in zip(draw.apply(batch)[:5], draw.apply(batch)[:5], strict=True))
    assert not torch.equal(
        draw_of(tokens, corpus, seed=4).apply(batch).cu_seqlens, draw_of(tokens, corpus).apply(batch).cu_seqlens
    )


def test_the_end_of_a_text_is_no_string_even_where_it_is_the_unknown_token_too(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.unk_token = tokenizer.eos_token
    tokens = TokenBytes(tokenizer)
    assert not tokens.special[tokens.eos_id] and tokens[tokens.eos_id]
    assert vocabulary_of(tokens).strings[tokens.eos_id] == b""
    draw = VocabularyDraw.by_frequency(tokens, np.zeros(0, np.int32), power=1.0, share=1.0, rate=1.0, seed=0)
    assert draw.weights[tokens.eos_id] == 0 and draw.weights.sum() > 200
