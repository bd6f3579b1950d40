"""The windowed-attention encoder: its window limits, its steps are its forward pass, it is as large as Mamba2's."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import bytekernels
from bytekernels.testing import assert_close
from models import ByteLMConfig
from models.encoder import Encoder
from models.window_attention import WindowState
from tests.models.conftest import packed_bytes, small_model
from training.recipe import read_recipe

LENGTHS = [150, 1, 0, 26, 3]
WINDOW = 5


def small_encoder(**settings) -> Encoder:
    return small_model(encoder="attention", **{"attention_window": WINDOW, **settings}).encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [1, WINDOW, 64])
def test_steps_are_the_forward_pass(dtype, window):
    encoder = small_encoder(attention_window=window).to(dtype)
    ids, cu_seqlens = packed_bytes([23, 23, 23])
    with torch.no_grad():
        expected = encoder(ids, cu_seqlens).unflatten(0, (3, 23))
        states, by_sequence = encoder.stack.empty_state(3), ids.unflatten(0, (3, 23))
        found = torch.stack([encoder.step(by_sequence[:, t], states) for t in range(23)], 1)
    assert_close(found, expected)


def test_steps_go_on_from_prompts_of_any_length_and_the_others_keep_still():
    encoder = small_encoder()
    lengths, prompts = torch.tensor([30, 9, 50, 12]), torch.tensor([7, 1, 40, 5])
    ids, cu_seqlens = packed_bytes(lengths.tolist())
    begin = cu_seqlens[:-1].long()
    read = torch.cat([ids[start : start + size] for start, size in zip(begin, prompts, strict=True)])
    states = []
    with torch.no_grad():
        expected = encoder(ids, cu_seqlens)
        encoder(read, bytekernels.ragged.cu_seqlens_of(prompts), states)
        for t in range(int((lengths - prompts).max())):
            active = prompts + t < lengths
            rows = (begin + prompts + t).clamp(max=len(ids) - 1)
            found = encoder.step(ids[rows], states, active)
            assert_close(found[active], expected[rows[active]])
    assert [state.position.tolist() for state in states] == [lengths.tolist()] * 2


def test_a_state_is_the_same_from_a_forward_pass_and_from_steps():
    encoder = small_encoder().double()
    ids, cu_seqlens = packed_bytes([13, 13])
    after, states = [], encoder.stack.empty_state(2)
    with torch.no_grad():
        encoder(ids, cu_seqlens, after)
        for byte in ids.view(2, 13).T:
            encoder.step(byte, states)
    for one, other in zip(after, states, strict=True):
        for field in dataclasses.fields(WindowState):
            assert_close(getattr(one, field.name).double(), getattr(other, field.name).double())


@pytest.mark.parametrize("layers", [1, 2])
def test_the_window_limits_what_a_byte_sees_and_all_of_it_is_seen(layers):
    encoder = small_encoder(encoder_layers=layers)
    ids, cu_seqlens = packed_bytes([40, 6])
    other, reach = ids.clone(), layers * (WINDOW - 1)
    other[9] ^= 1
    with torch.no_grad():
        changed = (encoder(ids, cu_seqlens) != encoder(other, cu_seqlens)).any(1)
    assert changed.nonzero().flatten().tolist() == list(range(9, 9 + reach + 1))


def test_a_document_is_the_same_alone_and_among_others():
    encoder = small_encoder()
    ids, cu_seqlens = packed_bytes(LENGTHS)
    packed = encoder(ids, cu_seqlens)
    for start, stop in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        alone = encoder(ids[start:stop], torch.tensor([0, stop - start], dtype=torch.int32))
        torch.testing.assert_close(alone, packed[start:stop], atol=1e-5, rtol=1e-4)


def test_the_first_block_from_a_table_is_the_first_block():
    encoder = small_encoder().double()
    ids, cu_seqlens = packed_bytes(LENGTHS)
    expected = encoder.bridge(encoder.stack(encoder.embed(ids), cu_seqlens))
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    found, cotangent = encoder(ids, cu_seqlens), torch.randn(expected.shape, dtype=torch.float64)
    assert_close(found, expected)
    gradients = (torch.autograd.grad(out, parameters, cotangent) for out in (found, expected))
    for name, one, other in zip(names, *gradients, strict=True):
        assert_close(one, other, what=name)
        assert float(one.abs().max()) > 0, name


def test_autocast_keeps_the_residual_stream_wide():
    encoder, seen = small_encoder(), []
    encoder.stack.blocks[1].norm.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        encoder(*packed_bytes(LENGTHS))
    assert [tensor.dtype for tensor in seen[0]] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("name", ["quickstart", "llama3.2-3b", "qwen3-4b", "olmo2-1b"])
def test_it_has_as_many_parameters_as_mamba2s(name):
    core, settings = dict(model_type="llama", hidden_size=256), read_recipe(name).model.settings(0)
    with torch.device("meta"):
        mamba, attention = (
            sum(p.numel() for p in Encoder(ByteLMConfig(core=core, **settings | {"encoder": kind})).stack.parameters())
            for kind in ("mamba2", "attention")
        )
    assert attention == pytest.approx(mamba, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back(dtype, tmp_path):
    model = small_model(encoder="attention", attention_window=WINDOW).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.config.encoder, loaded.config.attention_window) == ("attention", WINDOW)
    batch = packed_bytes(LENGTHS)
    assert torch.equal(loaded(*batch).logits, model(*batch).logits)
