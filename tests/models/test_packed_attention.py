"""Attention by sequence against one product under a mask, with a window and without."""

import pytest
import torch
from torch.nn import functional as F

from bytekernels.ragged import positions, segment_ids
from bytekernels.testing import assert_close, ragged
from models.packed_attention import attend_by_sequence

LENGTHS = [7, 1, 0, 20, 4, 5, 33]


def under_a_mask(query, key, value, cu_seqlens, window):
    """The definition: every pair of rows, most of them masked."""
    total = query.shape[2]
    segment, place = segment_ids(cu_seqlens, total), positions(cu_seqlens, total)
    behind = place[:, None] - place
    seen = (segment[:, None] == segment) & (behind >= 0) & (behind < (window or total))
    return F.scaled_dot_product_attention(query, key, value, seen, scale=0.3, enable_gqa=True).transpose(1, 2)


def inputs(lengths, dtype=torch.float64):
    cu_seqlens, total = ragged(lengths)
    torch.manual_seed(0)
    shapes = ((1, heads, total, 6) for heads in (4, 2, 2))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes], cu_seqlens


@pytest.mark.parametrize("window", [None, 1, 4, 5, 33, 100])
def test_it_is_attention_under_a_mask(window):
    tensors, cu_seqlens = inputs(LENGTHS)
    found = attend_by_sequence(*tensors, cu_seqlens, scaling=0.3, window=window)
    expected = under_a_mask(*tensors, cu_seqlens, window)
    assert_close(found, expected)
    cotangent = torch.randn(found.shape, dtype=found.dtype)
    gradients = (torch.autograd.grad(out, tensors, cotangent) for out in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_16_bit_inputs_are_rounded_once():
    tensors, cu_seqlens = inputs(LENGTHS, torch.bfloat16)
    found = attend_by_sequence(*tensors, cu_seqlens, scaling=0.3, window=5)
    expected = under_a_mask(*(tensor.float() for tensor in tensors), cu_seqlens, 5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0, rtol=2**-8)


def test_no_rows_are_no_work():
    tensors, cu_seqlens = inputs([0, 0])
    assert attend_by_sequence(*tensors, cu_seqlens, window=3).shape == (1, 0, 4, 6)


def test_what_is_kept_for_the_backward_pass_grows_with_the_length_alone():
    """Twice the rows keep twice as much, and keys are not copied for each block that sees them."""
    sizes = []
    for rows in (512, 1024):
        tensors, cu_seqlens = inputs([rows], torch.float32)
        kept = {}

        def save(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            attend_by_sequence(*tensors, cu_seqlens, window=64)
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
    assert sizes[1] < 2.05 * sizes[0]
    assert sizes[1] < 4 * sum(tensor.nbytes for tensor in tensors)
