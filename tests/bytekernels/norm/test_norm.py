"""The norms against their formulas, float64 and autograd."""

import pytest
import torch

import bytekernels
from bytekernels import _C, dispatch
from bytekernels.extension import array, rows
from bytekernels.norm import op, reference
from bytekernels.testing import assert_close, gradients


def make(dtype=torch.float64, rows=5, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    weight = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
    return [value.to(dtype).requires_grad_() for value in (*values, weight)]


def test_rms_norm_is_its_formula():
    x, residual, weight = make()
    y, total = bytekernels.rms_norm(x, weight, residual, eps=1e-3)
    assert torch.equal(total, x + residual)
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(y, expected)
    assert bytekernels.rms_norm(x, weight)[1] is x


def test_gated_norm_normalises_groups_after_the_gate():
    y, z, weight = make()
    out = bytekernels.gated_rms_norm(y, z, weight, 4, eps=0.0)
    gated = y * torch.nn.functional.silu(z)
    for start in (0, 4, 8):
        part = gated[:, start : start + 4]
        expected = part / part.square().mean(-1, keepdim=True).sqrt() * weight[start : start + 4]
        torch.testing.assert_close(out[:, start : start + 4], expected)


def test_half_precision_is_served_by_the_reference():
    narrow = make(torch.float16, rows=64)
    truth = [value.detach().double().requires_grad_() for value in narrow]
    for call in (
        lambda a, b, w: bytekernels.rms_norm(a, w, b)[0],
        lambda a, b, w: bytekernels.gated_rms_norm(a, b, w, 6),
    ):
        out, expected = call(*narrow), call(*truth)
        assert_close(out, expected)
        for name, got, want in zip("abw", gradients(out, narrow), gradients(expected, truth), strict=True):
            assert_close(got, want, what=f"d{name}")


def test_reference_gradcheck():
    x, residual, weight = make()
    assert torch.autograd.gradcheck(lambda *a: reference.rms_norm(*a, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: reference.add_rms_norm(*a, 1e-5), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda *a: reference.gated_rms_norm(*a, 6, 1e-5), (x, residual, weight))


def test_opcheck():
    x, residual, weight = make(torch.float32)
    with dispatch.force("reference"):
        for given, other in ((x, residual), (x.T.reshape(5, 12), residual[:, None].transpose(0, 1)[0])):
            torch.library.opcheck(op.rms_norm_op, (given, weight, 1e-5))
            torch.library.opcheck(op.add_rms_norm_op, (given, other, weight, 1e-5))
            torch.library.opcheck(op.gated_rms_norm_op, (given, other, weight, 6, 1e-5))


def test_what_native_leaves_to_the_reference():
    x, residual, weight = make(torch.float32)
    with dispatch.force("native"):
        with pytest.raises(RuntimeError, match="inputs must be float32 or bfloat16, got torch.float16"):
            bytekernels.rms_norm(x.half(), weight)
        with pytest.raises(RuntimeError, match="a float32 x needs a float32 residual, got torch.bfloat16"):
            bytekernels.rms_norm(x, weight, residual.bfloat16())
        with pytest.raises(RuntimeError, match="y and z must have one dtype, got torch.float32 and torch.bfloat16"):
            bytekernels.gated_rms_norm(x, residual.bfloat16(), weight)
    assert bytekernels.rms_norm(x, weight, residual.bfloat16())[1].dtype == torch.bfloat16


def test_what_the_extension_refuses():
    x, _, weight = (tensor.detach() for tensor in make(torch.float32))
    y = torch.empty_like(x)
    with pytest.raises(ValueError, match="group_size must divide 12, got 5"):
        _C.gated_rms_norm(False, (5, 12, 5, 1e-5), rows(x), rows(x), array(weight), array(y), 1)
    with pytest.raises(ValueError, match="weight must have 12 elements, got 11"):
        _C.gated_rms_norm(False, (5, 12, 12, 1e-5), rows(x), rows(x), array(weight[:11]), array(y), 1)
    with pytest.raises(ValueError, match="total must be given exactly where residual is"):
        _C.rms_norm(False, False, (5, 12, 12, 1e-5), rows(x), rows(x), array(weight), array(y), None, 1)


def test_shapes_are_checked():
    x, residual, weight = make()
    with pytest.raises(ValueError, match=r"weight must have shape \[12\].*got \[5\]"):
        bytekernels.rms_norm(x, weight[:5])
    with pytest.raises(ValueError, match="residual must have x's shape"):
        bytekernels.rms_norm(x, weight, residual[:3])
    with pytest.raises(ValueError, match="group_size must divide 12, the width of y, got 5"):
        bytekernels.gated_rms_norm(x, residual, weight, 5)
