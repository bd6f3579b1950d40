"""The split router: it reads bytes by itself, in forward passes and in steps (the integrated one: test_byte_lm.py)."""

import pytest
import torch

from bytekernels.ragged import cu_seqlens_of
from models import ByteLM
from tests.models.conftest import packed_bytes, small_model


@pytest.fixture(params=[0, 1, 2], ids=str)
def split(request) -> ByteLM:
    return small_model(router="split", router_layers=request.param)


def test_a_split_router_does_not_read_the_encoder(split):
    ids, cu_seqlens = packed_bytes([30, 0, 12])
    before = split(ids, cu_seqlens).routing
    with torch.no_grad():
        for parameter in split.encoder.parameters():
            parameter.normal_()
    after, alone = split(ids, cu_seqlens).routing, split.route(ids, cu_seqlens)
    for routing in (after, alone, split.router(None, ids, cu_seqlens)):
        assert torch.equal(routing.prob, before.prob) and torch.equal(routing.boundary, before.boundary)
    assert 2 < int(before.boundary.sum()) < 42


def test_an_integrated_router_reads_it():
    model = small_model()
    ids, cu_seqlens = packed_bytes([30, 12])
    assert torch.equal(model.route(ids, cu_seqlens).prob, model(ids, cu_seqlens).routing.prob)
    assert model.router_source(model.empty_state(2))[0] is model.encoder
    with pytest.raises(ValueError, match="h must be the encoder's output, got None"):
        model.router(None, ids, cu_seqlens)


def test_the_routers_alone_learn_from_their_chunks(split):
    for model in (split, small_model()):
        model.route(*packed_bytes([30, 12])).prob.sum().backward()
        learnt = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert learnt == {name for name, _ in model.named_parameters() if name.startswith("router.")}


def test_its_steps_are_its_forward_pass(split):
    """From prompts of two lengths on; whoever has come to the end keeps still."""
    lengths, prompts = torch.tensor([20, 12, 16]), torch.tensor([5, 1, 8])
    ids, cu_seqlens = packed_bytes(lengths.tolist())
    begin = cu_seqlens[:-1].long()
    expected = split.router.read(None, ids, cu_seqlens)
    prob = split.router.route(expected, ids, cu_seqlens).prob
    start = torch.cat([ids[at : at + size] for at, size in zip(begin, prompts, strict=True)])
    prefill = split.prefill(start, cu_seqlens_of(prompts))
    read, state = prefill.router_read, prefill.state
    torch.testing.assert_close(read, expected[begin + prompts - 1], atol=1e-5, rtol=1e-4)
    for t in range(int((lengths - prompts).max())):
        active = prompts + t < lengths
        rows = (begin + prompts + t).clamp(max=len(ids) - 1)
        with torch.no_grad():
            following = split.step_encoder(ids[rows], state, active)[1]
        torch.testing.assert_close(following[active], expected[rows[active]], atol=1e-5, rtol=1e-4)
        pairs = split.router.pair(read, following)
        torch.testing.assert_close(pairs[active], prob[rows[active] - 1], atol=1e-5, rtol=1e-4)
        read = torch.where(active[:, None], following, read)


def test_its_states_are_selected_and_restored(split):
    state = split.prefill(*packed_bytes([9, 4, 6])).state
    chosen, fresh = state.select(torch.tensor([2, 0])), split.empty_state(3)
    fresh.restore(state.tensors())
    assert len(state.router) == split.config.router_layers
    for one, picked, restored in zip(state.router, chosen.router, fresh.router, strict=True):
        assert torch.equal(picked.ssm, one.ssm[[2, 0]]) and torch.equal(restored.ssm, one.ssm)
