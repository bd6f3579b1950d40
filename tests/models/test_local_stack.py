"""The byte-level stacks: block 0 from a table of 256 rows is block 0, forward and backward; steps are the forward."""

import pytest
import torch

import bytekernels
from bytekernels.testing import assert_close
from models.local_stack import LocalStack
from tests.models.conftest import packed_bytes, small_model

LENGTHS = [150, 1, 0, 260, 3]


def plain(encoder, ids, cu_seqlens):
    """The encoder with a row for each byte from the embedding on."""
    return encoder.bridge(encoder.stack(encoder.embed(ids), cu_seqlens))


def run(function, encoder, dtype=torch.float32):
    """Output and the gradient of every parameter, by name."""
    encoder = encoder.to(dtype)
    ids, cu_seqlens = packed_bytes(LENGTHS)
    h = function(encoder, ids, cu_seqlens)
    cotangent = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(h.dtype)
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    return dict(zip(("h", *names), (h, *torch.autograd.grad(h, parameters, cotangent)), strict=True))


@pytest.mark.parametrize("settings", [{}, {"num_groups": 2}, {"encoder_layers": 1}], ids=str)
def test_block_zero_from_a_table_is_block_zero(settings):
    encoder = small_model(**settings).encoder
    found, rows = (run(function, encoder) for function in (type(encoder).__call__, plain))
    expected = run(plain, encoder, torch.float64)
    assert {"embed.weight", "stack.blocks.0.norm.weight", "stack.blocks.0.mixer.in_proj.weight"} < set(found)
    for name, value in expected.items():
        assert_close(found[name].float(), value, what=name)
        assert_close(rows[name].float(), value, what=name)


def test_in_float64_they_are_equal():
    encoder = small_model().encoder
    found, expected = (run(function, encoder, torch.float64) for function in (type(encoder).__call__, plain))
    for name, value in expected.items():
        assert_close(found[name], value, what=name)


def test_the_norm_of_the_table_has_the_bits_of_the_norm_of_the_rows():
    encoder = small_model().encoder
    ids, _ = packed_bytes(LENGTHS)
    norm = encoder.stack.blocks[0].norm
    table, rows = norm(encoder.embed.weight)[0], norm(encoder.embed(ids))[0]
    assert torch.equal(bytekernels.byte_table(ids, table), rows)


def test_autocast_rounds_where_it_did():
    """in_proj gives bfloat16 rows, and the residual stream stays float32."""
    encoder, seen = small_model().encoder, []
    encoder.stack.blocks[0].mixer.in_proj.register_forward_hook(lambda module, given, out: seen.append(out))
    encoder.stack.blocks[1].norm.register_forward_hook(lambda module, given, out: seen.append(out))
    ids, cu_seqlens = packed_bytes(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (function(encoder, ids, cu_seqlens) for function in (type(encoder).__call__, plain))
    (table, (x, residual)), (rows, (_, plain_residual)) = seen[:2], seen[2:]
    assert table.dtype == rows.dtype == x.dtype == torch.bfloat16
    assert residual.dtype == plain_residual.dtype == torch.float32
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_close(found, expected)


def test_a_stack_without_blocks_takes_a_table_too():
    encoder = small_model(encoder_layers=0).encoder
    ids, cu_seqlens = packed_bytes(LENGTHS)
    assert torch.equal(encoder(ids, cu_seqlens), plain(encoder, ids, cu_seqlens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_from_bytes_are_the_forward_from_a_table(dtype):
    encoder = small_model().encoder.to(dtype)
    stack: LocalStack = encoder.stack
    ids, cu_seqlens = packed_bytes([9, 9, 9])
    with torch.no_grad():
        expected = stack(encoder.embed.weight, cu_seqlens, ids).unflatten(0, (3, 9))
        states = stack.empty_state(3)
        by_sequence = ids.unflatten(0, (3, 9))
        found = torch.stack([stack.step(encoder.embed(by_sequence[:, t]), states) for t in range(9)], 1)
    assert_close(found, expected)


def test_activations_that_are_computed_again_give_the_same_gradients():
    model = small_model()
    ids, cu_seqlens = packed_bytes([9, 30, 1])
    found = []
    for again in (False, True):
        if again:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        model.train()
        model.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            loss = model(ids, cu_seqlens).logits.square().sum()
        loss.backward()
        found.append((sum(kept), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (plain, expected), (checkpointed, gradients) = found
    assert checkpointed < 0.7 * plain
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
