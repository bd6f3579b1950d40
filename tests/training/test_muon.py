"""Muon: its update, held to torch.optim's and to what orthogonal means."""

import pytest
import torch

from training import muon
from training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_an_update_is_nearly_orthogonal(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
    assert values.min() > 0.6
    assert values.max() < 1.25


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_it_moves_as_torchs_own(shape, monkeypatch):
    """Whose products are in bf16, on any device; in bf16 ours are the same."""
    monkeypatch.setattr(muon, "fast_at_bf16", lambda device: True)
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = Muon([ours], lr=0.01), torch.optim.Muon([theirs], lr=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert (ours - start).abs().max() > 0.02


def test_float32_is_nearer_to_orthogonal_than_bf16_is_to_float32(monkeypatch):
    torch.manual_seed(0)
    matrix, found = torch.randn(32, 96), {}
    for fast in (False, True):
        monkeypatch.setattr(muon, "fast_at_bf16", lambda device, fast=fast: fast)
        found[fast] = orthogonal(matrix)
    assert found[False].dtype == torch.float32
    assert found[True].dtype == torch.bfloat16
    difference = (found[True].float() - found[False]).norm() / found[False].norm()
    assert 0 < difference < 0.02


def test_only_matrices():
    with pytest.raises(ValueError, match=r"matrices only, got a parameter of shape \[3\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match="no closure"):
        Muon([torch.nn.Parameter(torch.zeros(3, 3))], lr=0.1).step(lambda: 0)
