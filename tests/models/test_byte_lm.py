"""The whole model: the draft head, the router on pairs, the core's wiring, saving (and tests/promises)."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from bytekernels import routing_of
from bytekernels.ragged import lengths_of
from models import ByteLM, ByteLMConfig
from models.core import run_packed, use_packed
from tests.models.conftest import FAMILIES, packed_bytes, small_model, small_teacher

LENGTHS = [7, 1, 0, 70, 3]


def test_a_draft_head_changes_nothing_else_and_steps_with_the_decoder():
    model, without = small_model(draft_head=True), small_model()
    without.load_state_dict({n: v for n, v in model.state_dict().items() if n != "decoder.draft_head.weight"})
    ids, cu_seqlens = packed_bytes([20, 20])
    output, plain = model(ids, cu_seqlens), without(ids, cu_seqlens)
    assert plain.draft is None and without.decoder.draft_head is None
    assert torch.equal(output.logits, plain.logits)
    u = model.dechunk(output.chunks, output.h, output.routing).view(2, 20, -1)
    states = model.decoder.stack.empty_state(2)
    for t in range(20):
        logits, draft = model.decoder.step(u[:, t], ids.view(2, 20)[:, t], states)
        torch.testing.assert_close(logits, output.logits.view(2, 20, -1)[:, t], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(draft, output.draft.view(2, 20, -1)[:, t], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_the_router_on_pairs_equals_the_router_on_sequences_of_two(rows):
    router = small_model().router
    h, following = torch.randn(2, rows, 32, generator=torch.Generator().manual_seed(0)).unbind()
    h, following = h - 0.3, following - 0.3
    two = torch.stack([h, following], 1).flatten(0, 1)  # [2 S, d]
    cu_seqlens = torch.arange(0, 2 * rows + 1, 2, dtype=torch.int32)
    packed = router(two, torch.zeros(2 * rows, dtype=torch.uint8), cu_seqlens)
    prob = router.pair(h, following)
    torch.testing.assert_close(prob, packed.prob[::2], atol=1e-6, rtol=1e-6)
    assert torch.equal(prob >= 0.5, packed.boundary[::2])
    assert rows < 30 or 0 < int((prob >= 0.5).sum()) < rows


def test_the_router_refuses_pairs_that_do_not_match():
    with pytest.raises(ValueError, match=r"following must have read's shape \[3, 32\], got \[2, 32\]"):
        small_model().router.pair(torch.zeros(3, 32), torch.zeros(2, 32))


def from_small_teacher(teacher) -> ByteLM:
    sizes = dict(
        width=24, encoder_layers=1, decoder_layers=1, state_size=8, head_dim=12, bridge_inner=8, router_inner=8
    )
    return ByteLM.from_teacher(teacher, ByteLMConfig(**sizes)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_core_with_the_teachers_embeddings_gives_the_teachers_logits(family):
    teacher = small_teacher(family)
    model = from_small_teacher(teacher)
    tokens = torch.randint(0, 50, (31,), generator=torch.Generator().manual_seed(0))
    cu_chunks = torch.tensor([0, 9, 9, 31], dtype=torch.int32)
    logits = model.token_head(model.core(teacher.get_input_embeddings()(tokens), cu_chunks))
    for start, stop in ((0, 9), (9, 31)):
        expected = teacher(input_ids=tokens[None, start:stop]).logits[0]
        torch.testing.assert_close(logits[start:stop], expected, atol=1e-5, rtol=1e-5)


def test_no_chunk_sees_another_document():
    core = use_packed(small_teacher().base_model)
    embeddings = torch.randn(20, 32, requires_grad=True)
    cu_chunks = torch.tensor([0, 8, 20], dtype=torch.int32)
    run_packed(core, embeddings, cu_chunks)[8:].sum().backward()
    assert embeddings.grad[:8].abs().max() == 0 and embeddings.grad[8:].abs().min() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_core_steps_equal_its_forward(family):
    core = from_small_teacher(small_teacher(family)).core
    chunks = torch.randn(17, 32, generator=torch.Generator().manual_seed(0))
    together = core(chunks, torch.tensor([0, 8, 17], dtype=torch.int32))
    cache, both = core.empty_cache(2), torch.tensor([True, True])
    for t in range(8):
        step = core.step(chunks[[t, 8 + t]], cache, both)
        torch.testing.assert_close(step, together[[t, 8 + t]], atol=1e-5, rtol=1e-4)
    step = core.step(chunks[[0, 16]], cache, torch.tensor([False, True]))
    torch.testing.assert_close(step[1], together[16], atol=1e-5, rtol=1e-4)
    assert cache.lengths.tolist() == [8, 9]


def test_bos_is_a_chunk_of_its_own(model):
    ids, cu_seqlens = packed_bytes(LENGTHS)
    starts = cu_seqlens[:-1][lengths_of(cu_seqlens) > 0].long()
    assert model(ids, cu_seqlens).routing.boundary[starts].all()


def test_token_hidden_reads_the_given_ends():
    model = small_model()
    ids, cu_seqlens = packed_bytes([9, 12])
    boundary = torch.rand(21, generator=torch.Generator().manual_seed(0)) < 0.4
    h = model.encoder(ids, cu_seqlens)
    routing = routing_of(boundary, cu_seqlens)
    expected = model.core(h[routing.index.long()], routing.cu_chunks)
    torch.testing.assert_close(model.token_hidden(h, ids, boundary, cu_seqlens), expected)


def test_every_parameter_of_stage_two_gets_a_gradient(model):
    model.train()
    ids, cu_seqlens = packed_bytes([30, 30])
    model(ids, cu_seqlens).logits.sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith("token_head")]
    assert without == []


def test_a_saved_draft_head_comes_back(tmp_path):
    model = small_model(draft_head=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = packed_bytes(LENGTHS)
    assert torch.equal(loaded.decoder.draft_head.weight, model.decoder.draft_head.weight)
    assert torch.equal(loaded(*batch).draft, model(*batch).draft)


def test_a_model_saved_before_there_were_draft_heads_loads(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["draft_head"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = packed_bytes(LENGTHS)
    assert torch.equal(loaded(*batch).logits, model(*batch).logits)


def test_mixer_parameters_are_named_as_in_the_public_module():
    mixer = small_model().encoder.stack.blocks[0].mixer
    assert {name: tuple(value.shape) for name, value in mixer.state_dict().items()} == {
        "in_proj.weight": (48 + 48 + 16 + 4, 24),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "norm.weight": (48,),
        "out_proj.weight": (24, 48),
    }


def test_bad_offsets_are_refused(model):
    ids, _ = packed_bytes([5])
    with pytest.raises(ValueError, match="must start at 0 and end at 5"):
        model(ids, torch.tensor([0, 4], dtype=torch.int32))
