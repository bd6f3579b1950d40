"""The marginal head: untrained it is the token head, byte by byte; a decoder is added to it."""

import math
from itertools import accumulate, pairwise

import pytest
import torch

from bytekernels import BOS, byte_marginals, token_prefix
from models import ByteLMConfig, marginal_head, score
from tests.models.conftest import MARGINAL, packed_bytes, small_model


@pytest.fixture
def untrained():
    model = small_model(**MARGINAL)
    torch.nn.init.zeros_(model.decoder.head.weight)
    return model


@pytest.mark.parametrize("chunks", [3, 512])
def test_untrained_it_is_the_token_heads_marginals(untrained, monkeypatch, chunks):
    monkeypatch.setattr(marginal_head, "CHUNKS", chunks)
    ids, cu_seqlens = packed_bytes([30, 1, 0, 17])
    boundary = (torch.arange(len(ids)) % 3 == 0) | (ids == BOS)
    output = untrained(ids, cu_seqlens, boundary)
    vocabulary = untrained.encoder.suffix.prefixes
    prefix = token_prefix(ids, cu_seqlens, boundary, vocabulary)
    wanted = byte_marginals(untrained.token_head(output.chunks), vocabulary, output.routing.chunk_of, prefix).exp()
    known = wanted.sum(-1) > 0
    assert 0.2 < known.float().mean() < 1
    wanted = wanted + wanted.roll(256, 1) / 256 + 1e-6  # and the same byte with the other bit
    torch.testing.assert_close(
        output.logits.softmax(-1)[known], wanted[known] / (1 + 1 / 256 + 512e-6), atol=1e-6, rtol=1e-5
    )
    assert (output.logits[~known] == math.log(1e-6)).all()  # of nothing in particular


def test_along_tokens_a_text_is_as_likely_as_to_the_token_head(untrained):
    """A path whose chunks are tokens: the product over a token's bytes is the token's own probability."""
    words = [b"hell", b"i", b" wor", b"j", b"el", b"world"]
    untrained.token_head.weight.data *= 0.2  # nothing is as rare as the floor
    text = b"".join(words)
    ids = torch.tensor([BOS, *text], dtype=torch.uint8)
    boundary = torch.zeros(len(ids), dtype=torch.bool)
    boundary[[0, *accumulate(map(len, words))]] = True
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    output = untrained(ids, cu_seqlens, boundary)
    log_p = output.logits.log_softmax(-1)
    steps = [log_p[t, int(ids[t + 1]) + 256 * int(boundary[t + 1])] for t in range(len(text))]
    strings = untrained.encoder.suffix.strings()
    tokens = torch.tensor([strings.index(word) for word in words])
    given = untrained.token_head(output.chunks)  # of all ids; but those of no bytes are left out
    given[:, [i for i, string in enumerate(strings) if not string and i != 49]] = -torch.inf
    wanted = given.log_softmax(-1)[torch.arange(len(words)), tokens]
    ends = boundary.nonzero().flatten().tolist()
    found = torch.stack([sum(steps[first:last]) for first, last in pairwise(ends)])
    torch.testing.assert_close(
        found, wanted, atol=0.02, rtol=1e-3
    )  # the floor's share: 512e-6 a byte, more of the rare


def test_what_the_decoder_says_is_added(untrained):
    ids, cu_seqlens = packed_bytes([20, 9])
    bare = untrained(ids, cu_seqlens).logits
    torch.nn.init.normal_(untrained.decoder.head.weight)
    untrained.config.marginal_head = False
    own = untrained(ids, cu_seqlens).logits
    untrained.config.marginal_head = True
    torch.testing.assert_close(untrained(ids, cu_seqlens).logits, own + bare)


def test_no_gradient_goes_through_the_token_head(untrained):
    torch.nn.init.normal_(untrained.decoder.head.weight)
    untrained(*packed_bytes([20, 9])).logits.logsumexp(-1).sum().backward()
    assert untrained.token_head.weight.grad is None
    assert float(untrained.decoder.head.weight.grad.abs().max()) > 0


def test_its_token_head_stays(untrained, tmp_path):
    with pytest.raises(ValueError, match="marginal_head=True reads the token head"):
        untrained.drop_token_head()
    untrained.save_pretrained(tmp_path)
    ids, cu_seqlens = packed_bytes([20, 9])
    found = type(untrained).from_pretrained(tmp_path)
    assert torch.equal(found(ids, cu_seqlens).logits, untrained(ids, cu_seqlens).logits)
    assert torch.equal(score(found, ids, cu_seqlens).log_likelihood, score(untrained, ids, cu_seqlens).log_likelihood)


@pytest.mark.parametrize("lacking", [{"suffix_bytes": 0}, {"token_head": False}, {"lookahead": False}])
def test_what_it_needs_is_named(lacking):
    ((name, value),) = lacking.items()
    with pytest.raises(ValueError, match=f"marginal_head=True needs .*{name}.*{value}"):
        ByteLMConfig(**{**MARGINAL, **lacking})
