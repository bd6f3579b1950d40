"""A score is a probability: the product of what the decoding steps themselves give, and it sums to one."""

import pytest
import torch

import bytekernels
from bytekernels import BOS
from models import Scorer, score


def product_of_steps(model, data: bytes, bits: list[bool]) -> float:
    """Log-probability of bytes and bits, byte by byte, the last byte's bit summed out."""
    ids, state, total = [BOS, *data], model.empty_state(1), 0.0
    for t in range(len(data)):
        logits = model.step(torch.tensor([ids[t]], dtype=torch.uint8), torch.tensor([bits[t]]), state)[0]
        log_probs = torch.log_softmax(logits.double(), dim=-1)
        byte = ids[t + 1]
        last = t + 1 == len(data)
        total += float(log_probs[[byte, byte + 256]].logsumexp(0) if last else log_probs[byte + 256 * bits[t + 1]])
    return total


def test_the_parallel_score_is_the_product_of_the_steps(model):
    data = bytes(torch.randint(0, 254, (100,), generator=torch.Generator().manual_seed(0)).tolist())
    ids, cu_seqlens = torch.tensor([BOS, *data], dtype=torch.uint8), torch.tensor([0, 101], dtype=torch.int32)
    bits = model(ids, cu_seqlens).routing.boundary.tolist()
    expected = product_of_steps(model, data, bits)
    assert float(score(model, ids, cu_seqlens).log_likelihood[0]) == pytest.approx(expected, abs=1e-4)  # nats
    assert Scorer(model).rolling([data])[0].log_likelihood == pytest.approx(expected, abs=1e-4)


def test_a_context_and_its_continuation_multiply(model):
    """log P(xy) = log P(x, its bits but the last) + log P(y and x's last bit | x)."""
    x, y = b"some context, ", b"and the rest"
    ids = torch.tensor([BOS, *x, *y], dtype=torch.uint8)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    boundary = model(ids, cu_seqlens, context=torch.tensor([len(x)])).routing.boundary
    whole = float(score(model, ids, cu_seqlens, boundary).log_likelihood[0])
    context = product_of_steps(model, x, boundary.tolist())  # x's last bit summed out
    assert Scorer(model).score([(x, y)])[0].log_likelihood == pytest.approx(whole - context, abs=1e-4)


def test_what_is_given_does_not_depend_on_what_is_scored(model):
    """The context's bits but the last, which nobody pays for, are the same whatever follows, and a prompt's."""
    model.config.chunk_cost = 10.0  # where chunks are held to a vocabulary, as few as can be
    x = b"hell worhelhel"
    read = model.prefill(*bytekernels.pack_bytes([x])).boundary[:-1]
    for y in (b"lo world", b"o", b"\x00", b"hellhell", b"elor"):
        ids, cu_seqlens = bytekernels.pack_bytes([x + y])
        boundary = model(ids, cu_seqlens, context=torch.tensor([len(x)])).routing.boundary
        assert torch.equal(boundary[: len(x)], read)


@torch.no_grad()
@pytest.mark.parametrize("y", [b"or", b"elor", b"lo world"])
def test_scores_go_along_what_is_given(model, y):
    """:class:`Scorer` and :func:`score` do not choose a context's bits to suit the continuation."""
    model.config.chunk_cost = 10.0
    x = b"hell worhelhel"
    ids, cu_seqlens = bytekernels.pack_bytes([x + y])
    context = torch.tensor([len(x)])
    boundary = model(ids, cu_seqlens, context=context).routing.boundary
    expected = float(score(model, ids, cu_seqlens, boundary, context).log_likelihood[0])
    assert float(score(model, ids, cu_seqlens, context=context).log_likelihood[0]) == pytest.approx(expected, abs=1e-4)
    assert Scorer(model).score([(x, y)])[0].log_likelihood == pytest.approx(expected, abs=1e-4)


def test_the_probabilities_of_all_next_bytes_sum_to_one(model):
    pairs = [(b"abc", bytes([byte])) for byte in range(254)]
    with torch.no_grad():
        model.decoder.head.weight[[254, 255, 510, 511]] = -10 * model.decoder.head.weight.abs().sum()
    scores = Scorer(model).score(pairs)
    bits = torch.tensor([one.log_likelihood for one in scores]).double().logsumexp(0)
    assert float(bits) <= 1e-5  # the two reserved bytes have the rest
