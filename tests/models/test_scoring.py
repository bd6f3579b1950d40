"""Scorers: order, batches and windows change nothing; greedy means greedy; what does not fit is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bytekernels import SortedVocabulary, constrain_ends, pack_bytes
from models import Scorer, TokenScorer, generate
from models.beam import Path, PathSearch
from tests.models.conftest import CONSTRAINED, small_model, small_teacher

PAIRS = [
    (b"", b"x"),
    (b"a context", b" and its continuation"),
    ("naïve ", "漢字"),
    (b"\x80\xff"[:1], b"\xc3"),
    (b"a" * 60, b"b" * 20),
]


def likelihoods(scores) -> list[float]:
    return [one.log_likelihood for one in scores]


@pytest.mark.parametrize("beam", [1, 4])
def test_batches_and_order_change_nothing(model, beam):
    together = Scorer(model, beam=beam).score(PAIRS)
    for batch_bytes in (1, 40):
        found = Scorer(model, beam=beam, batch_bytes=batch_bytes).score(PAIRS[::-1])[::-1]
        assert likelihoods(found) == pytest.approx(likelihoods(together), abs=1e-5)
        assert [one.is_greedy for one in found] == [one.is_greedy for one in together]
    assert [one.num_bytes for one in together] == [1, 21, 6, 1, 20]


@pytest.mark.parametrize("lookahead", [True, False])
def test_greedy_is_what_greedy_decoding_writes(model, lookahead):
    model.config.lookahead = model.router.lookahead = lookahead
    contexts = [b"", b"a", b"some context ", "naïve ".encode()]
    written = [generate(model, context, max_new_bytes=9).new for context in contexts]
    assert all(len(new) > 4 for new in written)
    others = [new[:k] + bytes([new[k] ^ 1]) + new[k + 1 :] for k, new in enumerate(written)]
    scorer = Scorer(model)
    assert all(one.is_greedy for one in scorer.score(list(zip(contexts, written, strict=True))))
    assert not any(one.is_greedy for one in scorer.score(list(zip(contexts, others, strict=True))))


def test_windows_cover_each_byte_once(model):
    data = bytes(torch.randint(0, 254, (150,), generator=torch.Generator().manual_seed(0)).tolist())
    scorer = Scorer(model)
    windows = list(scorer._windows(data, 9))
    assert b"".join(windows) == data and len(windows) > 5
    for window in windows:
        assert scorer._route(window)[:-1].sum() <= 9
    found = scorer.rolling([data, b"", b"short"], window=9)
    assert found[0].log_likelihood == pytest.approx(sum(likelihoods(scorer.rolling(windows))), abs=1e-5)
    assert [one.num_bytes for one in found] == [150, 0, 5]
    assert found[1].log_likelihood == 0 and math.isnan(found[1].bits_per_byte)


def test_windows_fit_though_their_chunks_are_others_without_what_follows(monkeypatch):
    scorer, asked = Scorer(small_model(**CONSTRAINED)), []
    tree = SortedVocabulary([b"x", b"y", b"xya", b"abz", b"zk"])  # "b" and "k" are none, nor do they begin one
    odds = torch.tensor([1.0, 1, 1, 5, -5, 1])

    def route(data, context=0):
        asked.append(data)
        ids, cu_seqlens = pack_bytes([data], bos=None)
        return np.array([True, *constrain_ends(ids, cu_seqlens, odds[: len(data)], tree).tolist()])

    monkeypatch.setattr(scorer, "_route", route)
    assert list(scorer._windows(b"xyabzk", 3)) == [b"xya", b"bzk"]
    assert asked[:3] == [b"xyabzk", b"xyab", b"xya"]  # xya|b|zk, and x|y|ab, which are too many with BOS


def test_a_context_is_cut_at_the_chunks_it_is_scored_with(monkeypatch):
    model = small_model(core={**small_model().config.core, "max_position_embeddings": 8})
    scorer, asked = Scorer(model, truncate=True), []
    route = scorer._route
    monkeypatch.setattr(scorer, "_route", lambda data, context=0: asked.append((data, context)) or route(data, context))
    context = b"many words " * 3
    fitted = scorer.fitted_context(context, b"in")
    assert asked[0] == (context + b"in", len(context)) and fitted == asked[-1][0].removesuffix(b"in")


def test_what_does_not_fit_is_refused_or_cut():
    model = small_model(core={**small_model().config.core, "max_position_embeddings": 80})
    context, continuation = b"many words " * 40, b"in here"
    with pytest.raises(
        ValueError, match="pair 0: .* chunks are more than the core's 80 positions: shorten the context"
    ):
        Scorer(model).score([(context, continuation)])
    cut = Scorer(model, truncate=True).score([(context, continuation)])[0]
    assert cut.num_bytes == 7 and math.isfinite(cut.log_likelihood)
    with pytest.raises(
        ValueError, match="pair 0: .* more than the core's 80 positions, even without the context: score"
    ):
        Scorer(model, truncate=True).score([(b"", context * 2)])
    assert Scorer(model).rolling([context * 2])[0].num_bytes == 880


def test_a_context_leaves_room_for_what_is_to_be_written():
    model = small_model(core={**small_model().config.core, "max_position_embeddings": 80})
    context = b"many words " * 40
    scorer = Scorer(model, truncate=True)
    kept = {spare: scorer.fitted_context(context, spare=spare) for spare in (0, 30)}
    for spare, end in kept.items():
        assert context.endswith(end) and 80 - spare - 5 < scorer._route(end).sum() <= 80 - spare
        cut = context.removesuffix(end)
        assert scorer._route(context)[len(cut)], "the cut is no chunk's end"
    assert scorer.fitted_context(b"short", spare=30) == b"short"
    with pytest.raises(ValueError, match="chunks and 30 to be written are more than .* 80 positions: shorten the"):
        Scorer(model).fitted_context(context, spare=30)
    with pytest.raises(ValueError, match="and 80 to be written .* even without the context: write fewer bytes"):
        scorer.fitted_context(b"x" * 9, spare=80)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(batch_bytes=0), "batch_bytes must be >= 1, got 0"),
        (dict(beam=0), "beam must be >= 1, got 0"),
        (dict(combine="mean"), "combine must be one of sum, best, got 'mean'"),
        (dict(margin=-1.0), "margin must be >= 0 nats, got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Scorer(small_model(), **settings)


def test_bad_texts_and_leaking_models_are_refused():
    model = small_model()
    with pytest.raises(ValueError, match="pair 1: the continuation is empty"):
        Scorer(model).score([("a", "b"), ("a", "")])
    with pytest.raises(ValueError, match="byte 0xFE at offset 0 is reserved"):
        Scorer(model).rolling([b"\xfe"])
    with pytest.raises(ValueError, match="window must be at least 2"):
        Scorer(model).rolling(["abc"], window=1)
    with pytest.raises(ValueError, match="train with dechunk='hold' or 'causal'"):
        Scorer(small_model(dechunk="lookahead"))


def test_a_search_takes_the_most_promising_flips_once():
    def path(bits, log_likelihood, flips):
        return Path(np.array(bits), log_likelihood, np.array(flips), np.zeros(4, dtype=np.int64))

    search = PathSearch(path([True, False, False, True], -10.0, [-1.0, 2.0, -np.inf, -np.inf]), beam=3, margin=5.0)
    (first,) = search.propose(1)
    assert first.tolist() == [True, False, True, True]
    search.add(path(first, -8.0, [-4.0, -2.0, -np.inf, -np.inf]))
    (second,) = search.propose(4)  # one place is left; the way back is known
    assert second.tolist() == [True, True, False, True]
    search.add(path(second, -11.0, [-np.inf] * 4))
    assert search.propose(4) == []
    assert search.best == search.log_likelihood("best") == -8.0
    assert search.log_likelihood("sum") == pytest.approx(np.logaddexp.reduce([-10.0, -8.0, -11.0]))


def words(texts):
    """A tokenizer of two-byte tokens: ids from their first byte."""
    found = []
    for text in texts:
        data = text.encode()
        sizes = [len(data[i : i + 2]) for i in range(0, len(data), 2)]
        ids = [1 + data[i] % 40 for i in range(0, len(data), 2)]
        found.append(SimpleNamespace(ids=np.array(ids, dtype=np.int32), lengths=np.array(sizes, dtype=np.int32)))
    return found


def test_a_teachers_score_is_its_own_cross_entropy():
    teacher = small_teacher()
    ids = torch.tensor([[0, *words(["contextend"])[0].ids.tolist()]])
    log_probs = torch.log_softmax(teacher(input_ids=ids).logits[0].double(), -1)
    each = log_probs[:-1].gather(1, ids[0, 1:, None])[:, 0]
    scorer = TokenScorer(teacher, words, bos_id=0)
    whole, part = scorer.rolling(["contextend"])[0], scorer.score([("contex", "tend")])[0]
    assert whole.log_likelihood == pytest.approx(each.sum().item(), abs=1e-4) and whole.num_bytes == 10
    assert part.log_likelihood == pytest.approx(each[3:].sum().item(), abs=1e-4) and part.num_bytes == 4


def test_a_stage_one_model_is_scored_at_the_tokenizers_ends():
    model = small_model()
    data = b"contextend"
    ids = torch.tensor([0xFE, *data], dtype=torch.uint8)
    ends = torch.tensor([True, *[i % 2 == 1 for i in range(10)]])
    hidden = model.token_hidden(model.encoder(ids, torch.tensor([0, 11], dtype=torch.int32)), ids, ends,
                                torch.tensor([0, 11], dtype=torch.int32))  # fmt: skip
    targets = torch.from_numpy(words(["contextend"])[0].ids.astype(np.int64))
    expected = torch.log_softmax(model.token_head(hidden)[:-1].double(), -1).gather(1, targets[:, None]).sum()
    found = TokenScorer(model, words).rolling(["contextend"])[0]
    assert found.log_likelihood == pytest.approx(expected.item(), abs=1e-4)
    model.drop_token_head()
    with pytest.raises(ValueError, match="has no token head"):
        TokenScorer(model, words)
