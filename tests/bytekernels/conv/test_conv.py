"""The causal convolution's reference, its step, and what each part refuses."""

import re

import pytest
import torch

import bytekernels
from bytekernels import _C, dispatch
from bytekernels.conv import op, reference
from bytekernels.extension import array, rows
from bytekernels.testing import assert_close, poisoned_memory, ragged

RAGGED = [0, 1, 2, 3, 4, 0, 5, 1, 0, 30, 2, 1]


@pytest.fixture(autouse=True, scope="module")
def poison():
    with poisoned_memory():
        yield


def make(lengths, dtype=torch.float64, channels=6, width=4, seed=0):
    """x, weight, bias and initial states by name; weights are float32 where x is narrower."""
    generator = torch.Generator().manual_seed(seed)
    total, wide = sum(lengths), torch.promote_types(dtype, torch.float32)
    shapes = {
        "x": ((total, channels), dtype),
        "weight": ((channels, width), wide),
        "bias": ((channels,), wide),
        "initial_states": ((len(lengths), channels, width - 1), dtype),
    }
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64).to(d) for n, (shape, d) in shapes.items()}


def conv(values, lengths, **options):
    values = {"bias": None, **values, "cu_seqlens": ragged(lengths)[0]}
    return bytekernels.causal_conv1d(**values, return_final_states=True, **options)


def run(values, lengths, dtype=None):
    """Outputs and gradients by name, with the same cotangents (rounded to ``dtype``) whatever the values' dtype."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    outputs = conv(leaves, lengths)
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype or o.dtype).to(o.dtype) for o in outputs
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    y, final_states = outputs
    return {"y": y, "final_states": final_states, **{f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}}


@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_reference_is_its_formula(width):
    lengths = [3, 0, 1, 5]
    values = make(lengths, width=width)
    y, final_states = conv(values, lengths, activation=None)
    before, row = values["initial_states"], 0
    for s, length in enumerate(lengths):
        padded = torch.cat([before[s], values["x"][row : row + length].T], 1)  # [C, K-1 + length]
        for t in range(length):
            expected = (padded[:, t : t + width] * values["weight"]).sum(1) + values["bias"]
            torch.testing.assert_close(y[row + t], expected)
        assert torch.equal(final_states[s], padded[:, length:])
        row += length
    torch.testing.assert_close(conv(values, lengths)[0], torch.nn.functional.silu(y))


def test_reference_is_torch_conv1d():
    values = make([9])
    expected = torch.nn.functional.conv1d(
        torch.cat([values["initial_states"], values["x"].T[None]], 2),
        values["weight"][:, None],
        values["bias"],
        groups=6,
    )
    torch.testing.assert_close(conv(values, [9], activation=None)[0], expected[0].T)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 4), (torch.float32, 7)], ids=str)
def test_half_precision_and_wide_windows_are_served_by_the_reference(dtype, width):
    values = make(RAGGED, dtype, width=width)
    found = run(values, RAGGED)
    for name, expected in run({n: value.double() for n, value in values.items()}, RAGGED, dtype).items():
        assert_close(found[name], expected, what=name)


@pytest.mark.parametrize("silu", [True, False])
def test_gradcheck(silu):
    lengths = [2, 0, 5]
    x, weight, bias, initial = (value.requires_grad_() for value in make(lengths, channels=2).values())
    cu_seqlens, _ = ragged(lengths)
    assert torch.autograd.gradcheck(
        lambda *t: reference.causal_conv1d(*t[:3], cu_seqlens, silu, t[3]), (x, weight, bias, initial)
    )


def test_opcheck():
    lengths = [2, 0, 5]
    x, weight, bias, initial = (value.requires_grad_() for value in make(lengths, torch.float32).values())
    cu_seqlens, _ = ragged(lengths)
    with dispatch.force("reference"):
        torch.library.opcheck(op.causal_conv1d_op, (x, weight, bias, cu_seqlens, True, initial))
        torch.library.opcheck(op.causal_conv1d_op, (x, weight, None, cu_seqlens, False, None))


def test_step_opcheck():
    values = {name: value.detach() for name, value in make([1, 1], torch.float32).items()}
    arguments = (values["x"], values["initial_states"], values["weight"], values["bias"], True)
    torch.library.opcheck(op.causal_conv1d_step_op, arguments)


def test_a_split_sequence_continues_from_its_state():
    values = make([9])
    whole, last = conv(values, [9])
    for cut in (1, 2, 5):
        first, state = conv({**values, "x": values["x"][:cut]}, [cut])
        second, end = conv({**values, "x": values["x"][cut:], "initial_states": state}, [9 - cut])
        assert_close(torch.cat([first, second]), whole)
        assert torch.equal(end, last)


def test_no_bytes_and_no_sequences():
    for lengths in ([], [0], [0, 0]):
        values = make(lengths)
        result = run(values, lengths)
        assert result["y"].shape == (0, 6)
        assert torch.equal(result["final_states"], values["initial_states"])
        assert not result["dweight"].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_steps_are_the_convolution(dtype, width):
    steps, sequences = 5, 3
    lengths = [steps] * sequences
    values = make(lengths, dtype, width=width)
    y, final_states = conv(values, lengths)
    state, x = values["initial_states"].clone(), values["x"].unflatten(0, (sequences, steps))
    outputs = [bytekernels.causal_conv1d_step(x[:, t], state, values["weight"], values["bias"]) for t in range(steps)]
    assert_close(torch.stack(outputs, 1).flatten(0, 1), y)
    assert torch.equal(state, final_states)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(5), ValueError, "x must have shape [T, C], got [5]"),
        ("weight", torch.zeros(5, 4), ValueError, "weight must have shape [C, K] with C = 6 and K >= 1, got [5, 4]"),
        ("bias", torch.zeros(5), ValueError, "bias must have shape [6], got [5]"),
        ("activation", "gelu", ValueError, "activation must be 'silu' or None, got 'gelu'"),
        ("initial_states", torch.zeros(2, 6, 4), ValueError, "[S, C, K-1] = [2, 6, 3], got [2, 6, 4]"),
        ("cu_seqlens", torch.tensor([0, 2, 4]).int(), ValueError, "cu_seqlens must start at 0 and end at 5"),
    ],
)
def test_what_the_convolution_refuses(name, value, error, message):
    arguments = {**make([2, 3], torch.float32), "cu_seqlens": ragged([2, 3])[0], name: value}
    with pytest.raises(error, match=re.escape(message)):
        bytekernels.causal_conv1d(**arguments)


def test_what_the_step_refuses():
    values = make([1, 1], torch.float32)
    with pytest.raises(
        ValueError, match=re.escape("conv_state must have shape [S, C, K-1] = [2, 6, 3], got [2, 6, 4]")
    ):
        bytekernels.causal_conv1d_step(values["x"], torch.zeros(2, 6, 4), values["weight"], None)


def test_what_the_extension_refuses():
    values = make([2, 3], torch.float32)
    y, states = torch.empty_like(values["x"]), torch.empty_like(values["initial_states"])

    def call(sizes=(5, 6, 4), cu=(0, 2, 5), x=values["x"]):
        arguments = (rows(x), array(values["weight"]), array(values["bias"]), True, array(values["initial_states"]))
        _C.causal_conv1d(False, sizes, array(torch.tensor(cu).int()), arguments, array(y), array(states), 1)

    call()
    with pytest.raises(ValueError, match="weight must have 2 to 4 taps, got 5"):
        call(sizes=(5, 6, 5))
    with pytest.raises(ValueError, match="x must have rows of 7 elements, got a row stride of 6"):
        call(sizes=(5, 7, 4))
    with pytest.raises(ValueError, match="x must have 30 elements, got 24"):
        call(x=values["x"][:4])
    with pytest.raises(ValueError, match="cu_seqlens must end at 5, the number of rows, got 4"):
        call(cu=(0, 2, 4))
