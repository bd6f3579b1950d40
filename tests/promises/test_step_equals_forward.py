"""Decoding byte by byte gives the logits of the forward pass over the whole text.

For a batch of five, each with another length, another number of chunks and a prompt of another length, which is read at
once (prefill); whoever has come to its end keeps still while the others go on.
"""

import pytest
import torch

from bytekernels import token_prefix
from bytekernels.ragged import cu_seqlens_of, lengths_of
from tests.models.conftest import ABLATED, MARGINAL, packed_bytes, packed_tokens, small_model

LENGTHS = torch.tensor([30, 9, 50, 12, 21])  # bytes, BOS among them
PROMPTS = torch.tensor([7, 1, 40, 11, 2])  # how many of them are read at once


HNET = [{**settings, "lookahead": False} for settings in ({}, dict(dechunk="causal"), ABLATED)]
HNET_IDS = ["hold, H-Net", "causal, H-Net", "ablated, H-Net"]


@pytest.mark.parametrize(
    "settings",
    [{}, dict(dechunk="causal"), ABLATED, MARGINAL, *HNET],
    ids=["hold", "causal", "ablated", "marginal", *HNET_IDS],
)
def test_step_equals_forward(settings):
    def assert_same(logits, rows, active=slice(None)):
        torch.testing.assert_close(logits[active], output.logits[rows[active]], atol=1e-5, rtol=1e-4)

    model = small_model(**settings)
    given = None
    if model.config.marginal_head:  # what it adds shows inside tokens
        ids, cu_seqlens, given = packed_tokens(LENGTHS.tolist())
        prefix = token_prefix(ids, cu_seqlens, given, model.prefixes)
        assert int((prefix > 0).sum()) > 20
    else:
        ids, cu_seqlens = packed_bytes(LENGTHS.tolist())
    output = model(ids, cu_seqlens, given)
    boundary, chunks = output.routing.boundary, lengths_of(output.routing.cu_chunks)
    assert len(set(chunks.tolist())) == 5

    begin = cu_seqlens[:-1].long()
    read = torch.cat([torch.arange(start, start + size) for start, size in zip(begin, PROMPTS, strict=True)])
    prefill = model.prefill(ids[read], cu_seqlens_of(PROMPTS), boundary[read])
    last = begin + PROMPTS - 1
    assert_same(prefill.logits, last - 1, PROMPTS > 1)

    state = prefill.state  # the bit of a prompt's last byte, and its chunk, are still to come
    model.close_chunks(prefill.h, boundary[last], state)
    assert_same(model.step_decoder(prefill.h, ids[last], state)[0], last)
    for t in range(int((LENGTHS - PROMPTS).max())):
        active = PROMPTS + t < LENGTHS
        rows = (begin + PROMPTS + t).clamp(max=len(ids) - 1)
        assert_same(model.step(ids[rows], boundary[rows], state, active), rows, active)
    assert torch.equal(state.cache.lengths, chunks)
