"""Inputs of the scan, and its outputs and gradients by name."""

import pytest
import torch

import bytekernels
from bytekernels import dispatch
from bytekernels.testing import assert_close, poisoned_memory, ragged

OPTIONS = ("D", "z", "dt_bias", "initial_states")
PER_ROW = ("x", "dt", "B", "C", "z")


@pytest.fixture(autouse=True, scope="module")
def poison():
    with poisoned_memory():
        yield


def make(lengths, dtype=torch.float64, heads=4, headdim=5, d_state=7, groups=2, greatest_a=4.0, seed=0, device="cpu"):
    """Inputs by name; parameters and states are float32 where activations are narrower."""
    generator = torch.Generator().manual_seed(seed)
    _, total = ragged(lengths)
    shapes = {
        "x": (total, heads, headdim),
        "dt": (total, heads),
        "A": (heads,),
        "B": (total, groups, d_state),
        "C": (total, groups, d_state),
        "D": (heads,),
        "z": (total, heads, headdim),
        "dt_bias": (heads,),
        "initial_states": (len(lengths), heads, headdim, d_state),
    }
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    values["A"] = -greatest_a * torch.rand(heads, generator=generator, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    return {name: value.to(device, dtype if name in PER_ROW else wide) for name, value in values.items()}


def scan(values, lengths, **options):
    cu_seqlens = ragged(lengths)[0].to(values["x"].device)
    return bytekernels.ssd_scan(**values, cu_seqlens=cu_seqlens, return_final_states=True, **options)


def run(impl, values, lengths, dtype=None, seed=1, cotangents=None, **options):
    """Outputs and gradients by name, from ``impl``; cotangents not given are drawn, rounded to ``dtype``."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    with dispatch.force(impl):
        y, final_states = scan(leaves, lengths, **{"dt_softplus": True, **options})
        generator = torch.Generator().manual_seed(seed)
        dy, dfinal = (torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in (y, final_states))
        drawn = [dy.to(y.device, dtype or y.dtype).to(y.dtype), dfinal.float().to(final_states)]
        gradients = torch.autograd.grad([y, final_states], list(leaves.values()), cotangents or drawn)
    return {"y": y, "final_states": final_states, **{f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}}


def assert_agrees(impl, values, lengths, truth="chunked", **options):
    """``impl`` on the values against ``truth`` on the same values in float64."""
    dtype = values["x"].dtype
    wide = {name: value.double() for name, value in values.items()}
    got = run(impl, values, lengths, dtype, **options)
    expected = run(truth, wide, lengths, dtype, **options)
    for name in expected:
        assert_close(got[name], expected[name], what=name)
