"""The norms' fast implementations against the float64 reference; their bits by row, alone and run again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import dispatch
from bytekernels.norm import op
from bytekernels.testing import assert_close, poisoned_memory
from tests.bytekernels.conftest import assert_repeats, far_apart

KINDS = ("rms", "add", "gated")


def make(fast, rows, width, *, dtypes=(torch.float32, torch.float32), strided=False, seed=0):
    """x or y, residual or gate [rows, width] of two dtypes, rows as in a slice of columns or dense; a weight."""
    generator = torch.Generator().manual_seed(seed)
    before, after = (3, 5) if strided else (0, 0)
    values = torch.randn(2, rows, before + width + after, generator=generator, dtype=torch.float64)
    weight = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
    x, other = (value.to(fast.device, dtype) for value, dtype in zip(values, dtypes, strict=True))
    columns = slice(before, before + width)
    return [x[:, columns], other[:, columns], weight.to(fast.device, torch.float32)]


def outputs(kind, x, other, weight, group_size=None, eps=1e-5):
    if kind == "rms":
        return (bytekernels.rms_norm(x, weight, eps=eps)[0],)
    if kind == "add":
        return bytekernels.rms_norm(x, weight, other, eps=eps)
    return (bytekernels.gated_rms_norm(x, other, weight, group_size, eps=eps),)


def run(impl, kind, tensors, dtypes, **options):
    """Outputs and gradients, for cotangents rounded to the given dtypes whatever dtype the outputs have."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    inputs = [leaves[0], leaves[2]] if kind == "rms" else leaves
    with dispatch.force(impl), poisoned_memory():
        found = outputs(kind, *leaves, **options)
        generator = torch.Generator().manual_seed(1)
        cotangents = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype).to(o.device, o.dtype)
            for o, dtype in zip(found, dtypes, strict=False)
        ]
        return [*found, *torch.autograd.grad(found, inputs, cotangents)]


def check(fast, kind, tensors, **options):
    dtypes = [tensor.dtype for tensor in tensors[:2]]
    got = run(fast.name, kind, tensors, dtypes, **options)
    expected = run("reference", kind, [tensor.double() for tensor in tensors], dtypes, **options)
    narrow = dtypes[1] if dtypes[0] == dtypes[1] else None  # what all is rounded to, or each value's own dtype
    for i, (value, truth) in enumerate(zip(got, expected, strict=True)):
        assert_close(value, truth, dtype=narrow, what=f"{kind} {i}")


def test_agrees_with_the_reference(fast):
    @settings(max_examples=40)
    @given(
        kind=st.sampled_from(KINDS),
        rows=st.sampled_from([0, 1, 2, 7, 70]),
        width=st.sampled_from([1, 3, 16, 96, 1000]),
        groups=st.sampled_from([1, 2, 3, 8, 16]),
        strided=st.booleans(),
        seed=st.integers(0, 9),
    )
    def agree(kind, rows, width, groups, strided, seed):
        size = width // groups if kind == "gated" and width % groups == 0 else width
        # The gradient of a group of one is r^3 eps g, what is left of a cancellation: eps must be seen beside h^2.
        options = dict(group_size=size, eps=0.1 if size == 1 else 1e-5)
        check(fast, kind, make(fast, rows, width, strided=strided, seed=seed), **options)

    agree()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [512, 1536, 3072, 4100])
def test_wide_rows(fast, kind, width):
    check(fast, kind, make(fast, 3, width))


@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype(fast, kind):
    pairs = [(dtype, dtype) for dtype in fast.dtypes]
    if kind == "add" and torch.bfloat16 in fast.dtypes:
        pairs.append((torch.bfloat16, torch.float32))
    for dtypes in pairs:
        for width in (48, 1536):
            check(fast, kind, make(fast, 50, width, dtypes=dtypes))


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_are_rows(fast, kind):
    x, other, weight = make(fast, 12, 20, strided=True)
    shaped = [x.unflatten(0, (3, 4)), other.unflatten(0, (3, 4)), weight]
    dtypes = [torch.float32] * 2
    for tensors, shape in ((shaped, (3, 4)), ([x[0], other[0], weight], ())):
        flat = [tensor.reshape(-1, 20) for tensor in tensors[:2]] + [weight]
        for value, expected in zip(
            run(fast.name, kind, tensors, dtypes), run(fast.name, kind, flat, dtypes), strict=True
        ):
            assert value.shape in ((*shape, 20), (20,))
            assert torch.equal(value.reshape(expected.shape), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_change_nothing(fast, kind):
    """Rows of a slice of columns, repeated rows, and columns that do not lie together."""
    strided = make(fast, 6, 24, strided=True)
    repeated = [strided[0][:1].expand(6, -1), strided[1], strided[2]]
    apart = [strided[0], strided[1].T.contiguous().T, torch.stack([strided[2]] * 2, 1)[:, 0]]
    for tensors in (strided, repeated, apart):
        dense = [tensor.contiguous() for tensor in tensors]
        dtypes = [torch.float32] * 2
        for value, expected in zip(
            run(fast.name, kind, tensors, dtypes), run(fast.name, kind, dense, dtypes), strict=True
        ):
            assert_close(value, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(fast, kind):
    *found, dweight = run(fast.name, kind, make(fast, 0, 12), [torch.float32] * 2)
    assert all(value.shape == (0, 12) for value in found)
    assert dweight.shape == (12,) and not dweight.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [24, 1030])
def test_rows_threads_and_reruns_change_no_bit(fast, kind, width, monkeypatch):
    """Rows enough for a program to take several blocks of them, or for native threads to share them."""
    rows = 1100
    if fast.interpreted:
        rows = 11
        monkeypatch.setattr("bytekernels.norm.triton.BLOCK", 64)
        monkeypatch.setattr("bytekernels.norm.triton.FORWARD", (2, 4))
        monkeypatch.setattr("bytekernels.norm.triton.BACKWARD", (2, 64))
    for dtype in fast.dtypes:
        tensors = make(fast, rows, width, dtypes=(dtype, dtype))
        dtypes = [dtype] * 2
        check(fast, kind, tensors)
        assert_repeats(fast, lambda tensors=tensors, dtypes=dtypes: run(fast.name, kind, tensors, dtypes))
        with dispatch.force(fast.name):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            found = outputs(kind, *leaves)
            cotangents = [torch.randn_like(value) for value in found]
            together = torch.autograd.grad(found, leaves[: 1 + (kind != "rms")], cotangents)
            for row in (0, rows // 2, rows - 1):
                own = [tensor.detach()[row : row + 1].clone().requires_grad_() for tensor in tensors[:2]]
                alone = outputs(kind, *own, tensors[2])
                parts = torch.autograd.grad(
                    alone, own[: len(together)], [cotangent[row : row + 1].clone() for cotangent in cotangents]
                )
                for part, whole in zip((*alone, *parts), (*found, *together), strict=True):
                    assert torch.equal(part, whole[row : row + 1])


def test_a_row_of_zeros_or_of_nan_is_its_own_affair(fast):
    for kind in KINDS:
        x, other, weight = make(fast, 5, 16)
        x[1], other[1], x[3] = 0.0, 0.0, float("nan")
        *found, _ = run(fast.name, kind, [x, other, weight], [torch.float32] * 2)
        expected = run("reference", kind, [x, other, weight], [torch.float32] * 2)
        for value, truth in zip(found, expected, strict=False):
            assert torch.equal(value.isnan(), truth.isnan())
            assert_close(value.nan_to_num(), truth.nan_to_num())


def test_opcheck(fast):
    x, other, weight = make(fast, 5, 12)
    across = x.T.reshape(5, 12), other[:, None].transpose(0, 1)[0]
    with fast.force():
        for given_x, given_other in ((x, other), across):
            leaves = [tensor.detach().requires_grad_() for tensor in (given_x, given_other, weight)]
            torch.library.opcheck(op.rms_norm_op, (leaves[0], leaves[2], 1e-5))
            torch.library.opcheck(op.add_rms_norm_op, (*leaves, 1e-5))
            torch.library.opcheck(op.gated_rms_norm_op, (*leaves, 6, 1e-5))
        torch.library.opcheck(op.rms_norm_backward_op, (other, x, weight, 1e-5))
        torch.library.opcheck(op.add_rms_norm_backward_op, (other, x, x, other, weight, 1e-5))
        torch.library.opcheck(op.gated_rms_norm_backward_op, (other, x, other, weight, 6, 1e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_past_int32(fast, kind, tmp_path):
    x, other, weight = make(fast, 3, 16)
    apart = far_apart(torch.cat([x, other], 1), tmp_path / "rows")
    dtypes = [torch.float32] * 2
    found = run(fast.name, kind, [apart[:, :16], apart[:, 16:], weight], dtypes)
    expected = run(fast.name, kind, [x, other, weight], dtypes)
    for value, want in zip(found, expected, strict=True):
        assert torch.equal(value, want)


def test_the_gates_gradient_may_go_into_columns_of_a_wider_tensor(in_triton):
    from bytekernels.norm import triton

    generator = torch.Generator().manual_seed(0)
    dout, y, wide = (torch.randn(9, width, generator=generator).to(in_triton.device) for width in (24, 24, 60))
    z, weight = wide[:, 8:32], torch.ones(24, device=in_triton.device)
    dwide = torch.full_like(wide, 7.0)
    for size in (24, 6):
        expected = triton.gated_rms_norm_backward(dout, y, z, weight, size, 1e-5)
        found = triton.gated_rms_norm_backward(dout, y, z, weight, size, 1e-5, dz=dwide[:, 8:32])
        assert found[1].data_ptr() == dwide[:, 8:32].data_ptr()
        for value, want in zip(found, expected, strict=True):
            assert_close(value, want)
        assert (dwide[:, :8] == 7).all() and (dwide[:, 32:] == 7).all()
    with pytest.raises(ValueError, match="dz must have dense rows at one stride, got strides"):
        triton.gated_rms_norm_backward(dout, y, z, weight, 24, 1e-5, dz=torch.empty(24, 9, device=in_triton.device).T)
