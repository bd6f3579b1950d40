"""A prediction knows nothing of what comes after it: given the bits up to byte t, logits at t do not change, not in one
bit, when any later byte does.

The router itself looks one byte ahead to decide whether a chunk ends, and chunks that are held to a vocabulary as far
as they need to. These hard bits are fair: they are written, and paid for, together with their bytes. The router's
probability is not: ``lookahead``, the paper's own dechunk weight, leaks the next byte through it, which is why the
scorer and the writer refuse it.
"""

import pytest
import torch

from models import ByteLM, score
from tests.models.conftest import CONSTRAINED, packed_bytes, packed_tokens, small_model

LENGTH = 24


def change_of_predictions(model: ByteLM, position: int, *, flip_bits: bool = False) -> float:
    """How much the logits up to a position move when all bytes after it change, and all bits too where asked."""
    ids, cu_seqlens = packed_bytes([LENGTH])
    bits = model(ids, cu_seqlens).routing.boundary.clone()
    bits[position] = True
    later = torch.arange(LENGTH) > position
    others = torch.where(later, (ids + 77) % 254, ids), torch.where(later, bits ^ flip_bits, bits)
    with torch.no_grad():
        outputs = [model(x, cu_seqlens, b) for x, b in ((ids, bits), others)]
    before, after = (output.logits if output.draft is None else output.draft for output in outputs)
    assert (before[position + 1 :] != after[position + 1 :]).any()
    return float((before - after)[: position + 1].abs().max())


@pytest.mark.parametrize("position", range(LENGTH - 1))
def test_logits_do_not_know_later_bytes(model, position):
    assert change_of_predictions(model, position) == 0.0


@pytest.mark.parametrize("position", [0, 3, 11, 20])
def test_nor_later_bits(model, position):
    # Other bits make another number of chunks, and the matrix library may round other shapes otherwise.
    assert change_of_predictions(model, position, flip_bits=True) < 1e-5


@pytest.mark.parametrize("position", [3, 20])
def test_drafts_do_not_know_later_bytes(position):
    model = small_model(draft_head=True)
    assert change_of_predictions(model, position) == 0.0
    assert change_of_predictions(model, position, flip_bits=True) < 1e-5


def test_the_lookahead_weight_leaks():
    model = small_model(dechunk="lookahead")
    assert change_of_predictions(model, 11) > 1e-3
    with pytest.raises(ValueError, match="train with dechunk='hold' or 'causal'"):
        score(model, *packed_bytes([LENGTH]))


def test_the_router_looks_one_byte_ahead_and_no_further():
    model = small_model()
    ids, cu_seqlens = packed_bytes([LENGTH])
    other = ids.clone()
    other[12] ^= 1
    prob, changed = (model(x, cu_seqlens).routing.prob for x in (ids, other))
    assert torch.equal(prob[:11], changed[:11]) and prob[11] != changed[11]


@pytest.mark.parametrize("position", range(0, 44, 4))
def test_a_contexts_chunks_do_not_know_what_follows_where_all_look_ahead(position):
    """Chunks held to a vocabulary may depend on all bytes; those of a context, which are not paid for, do not."""
    model = small_model(**CONSTRAINED)
    ids, cu_seqlens, _ = packed_tokens([48])
    other = torch.where(torch.arange(48) > position, (ids + 77) % 254, ids)
    context = torch.tensor([position])  # bytes after BOS: up to this row
    ends, changed = (model(x, cu_seqlens, context=context).routing.boundary for x in (ids, other))
    assert torch.equal(ends[:position], changed[:position])
    assert not torch.equal(ends, changed)
