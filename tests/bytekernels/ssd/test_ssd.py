"""The scan: recurrence, chunks and extension against each other, in every ragged shape, and its promises."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import _C, dispatch
from bytekernels.extension import array, rows
from bytekernels.ssd import chunked, op, reference
from bytekernels.testing import assert_close, ragged, ragged_lengths, relative_error
from tests.bytekernels.ssd.conftest import OPTIONS, PER_ROW, assert_agrees, make, run, scan

Q = chunked.CHUNK
RAGGED = [0, 1, 3, 4, Q - 1, Q, 0, Q + 1, 2 * Q + 5]


@settings(max_examples=15)
@given(lengths=ragged_lengths(around=Q), seed=st.integers(0, 9), given_options=st.sets(st.sampled_from(OPTIONS)))
def test_chunks_are_the_recurrence(lengths, seed, given_options):
    values = make(lengths, heads=2, headdim=2, d_state=3, groups=1, seed=seed)
    assert_agrees(
        "chunked", {k: v for k, v in values.items() if k not in OPTIONS or k in given_options}, lengths, "reference"
    )


def test_chunks_are_the_recurrence_where_all_is_mixed():
    assert_agrees("chunked", make(RAGGED), RAGGED, "reference", dt_limit=(0.3, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 4, "headdim": 5, "d_state": 7, "groups": 2},
        {"heads": 2, "headdim": 16, "d_state": 16, "groups": 1},
        {"heads": 3, "headdim": 40, "d_state": 33, "groups": 3},
        {"heads": 1, "headdim": 1, "d_state": 1, "groups": 1},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_native(dtype, sizes):
    assert_agrees("native", make(RAGGED, dtype, **sizes), RAGGED)


@given(
    lengths=ragged_lengths(around=Q),
    seed=st.integers(0, 9),
    given_options=st.sets(st.sampled_from(OPTIONS)),
    dt_softplus=st.booleans(),
)
def test_native_in_ragged_shapes(lengths, seed, given_options, dt_softplus):
    values = make(lengths, torch.float32, heads=2, headdim=3, d_state=4, groups=1, seed=seed)
    values["dt"] = values["dt"].abs()
    values = {name: value for name, value in values.items() if name not in OPTIONS or name in given_options}
    assert_agrees("native", values, lengths, dt_softplus=dt_softplus)


def test_native_across_blocks_of_chunks():
    lengths = [1100, 3, 512, 513]
    assert_agrees(
        "native", make(lengths, torch.float32, heads=2, headdim=4, d_state=5, groups=1, greatest_a=0.01), lengths
    )


def test_native_clamps_the_time_step():
    values = make(RAGGED, torch.float32)
    values["dt_bias"] = values["dt_bias"] * 0.01
    assert_agrees("native", values, RAGGED, dt_limit=(0.4, 1.0))


@pytest.mark.parametrize("impl", ["chunked", "native"])
def test_strong_decay_loses_nothing(impl):
    lengths = [150, 2, 70]
    values = make(lengths, torch.float32, heads=2, headdim=8, d_state=8, groups=1)
    values["A"] = torch.tensor([-16.0, -3.0])
    values["dt"] = 5 * torch.rand(values["dt"].shape, generator=torch.Generator().manual_seed(3)) ** 4
    values["dt_bias"] = torch.zeros(2)
    assert_agrees(impl, values, lengths, "reference", dt_softplus=False)


@pytest.mark.parametrize("impl", ["chunked", "native", "reference"])
def test_softplus_is_exact_in_the_tails(impl):
    dt = torch.linspace(-80, 80, 321)
    lengths, one = [1] * 321, torch.ones(321, 1, 1)
    with dispatch.force(impl):
        _, states = scan({"x": one, "dt": dt[:, None], "A": -one[0, 0], "B": one, "C": one}, lengths, dt_softplus=True)
    expected = torch.nn.functional.softplus(dt.double(), threshold=1000)
    error = (states.flatten().double() - expected).abs() / expected
    assert error.max() < 1e-6


def test_half_precision_is_served_by_the_chunks():
    values = make(RAGGED, torch.float16)
    assert_agrees(None, values, RAGGED)
    with (
        dispatch.force("native"),
        pytest.raises(RuntimeError, match="must all be float32 or all bfloat16, got torch.f"),
    ):
        scan(values, RAGGED)


@pytest.mark.parametrize("module", [chunked, reference])
def test_gradcheck(module):
    lengths = [2, 0, 3]
    values = make(lengths, heads=2, headdim=2, d_state=2, groups=1)
    cu_seqlens, _ = ragged(lengths)
    tensors = [value.requires_grad_() for value in values.values()]

    def call(x, dt, A, B, C, D, z, dt_bias, initial):
        return module.ssd_scan(x, dt, A, B, C, cu_seqlens, D, z, dt_bias, True, 0.01, 10.0, initial)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("options", [OPTIONS, ()], ids=["all", "none"])
@pytest.mark.parametrize("impl", ["chunked", "native", "reference"])
def test_opcheck(impl, options):
    lengths = [3, 0, Q + 2]
    values = {
        k: v.requires_grad_() for k, v in make(lengths, torch.float32).items() if k not in OPTIONS or k in options
    }
    x, dt, A, B, C = (values[name] for name in ("x", "dt", "A", "B", "C"))
    D, z, dt_bias, initial = (values.get(name) for name in OPTIONS)
    with dispatch.force(impl):
        torch.library.opcheck(
            op.ssd_scan_op, (x, dt, A, B, C, ragged(lengths)[0], D, z, dt_bias, True, 0.0, 9.0, initial)
        )


@pytest.mark.parametrize("options", [OPTIONS, ()], ids=["all", "none"])
def test_backward_opcheck(options):
    lengths = [3, 0, Q + 2]
    values = {k: v for k, v in make(lengths, torch.float32).items() if k not in OPTIONS or k in options}
    x, dt, A, B, C = (values[name] for name in ("x", "dt", "A", "B", "C"))
    D, z, dt_bias, initial = (values.get(name) for name in OPTIONS)
    dfinal = torch.randn(3, *x.shape[1:], B.shape[2])
    arguments = (x, dt, A, B, C, ragged(lengths)[0], D, z, dt_bias, True, 0.0, 9.0, initial)
    with dispatch.force("native"):
        torch.library.opcheck(op.ssd_scan_backward_op, (torch.randn_like(x), dfinal, *arguments))


@pytest.mark.parametrize("dt_softplus", [True, False])
@pytest.mark.parametrize("impl", ["chunked", "native", "reference"])
def test_a_time_step_that_is_not_a_number_is_not_lost(impl, dt_softplus):
    values = make([5], torch.float32)
    values["dt"][2, 0] = torch.nan
    with dispatch.force(impl):
        y = scan(values, [5], dt_softplus=dt_softplus, dt_limit=(0.0, 9.0))[0]
    assert torch.isnan(y[2:, 0]).all()
    assert torch.isfinite(y[:, 1:]).all()


def test_step_opcheck():
    values = {name: value.detach() for name, value in make([1, 1, 1], torch.float32).items()}
    x, dt, A, B, C, D, z, dt_bias, state = values.values()
    torch.library.opcheck(op.mamba2_step_op, (x, dt, A, B, C, state, D, z, dt_bias, True, 0.0, 9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_packing_changes_no_bit(dtype):
    values = make(RAGGED, dtype, headdim=20, d_state=18)
    cu_seqlens, _ = ragged(RAGGED)
    cotangent = torch.randn(values["x"].shape, generator=torch.Generator().manual_seed(5)).to(dtype)

    def forward_and_backward(part, lengths, dy):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in part.items()}
        with dispatch.force("native"):
            y, final_states = scan(leaves, lengths, dt_softplus=True)
            wanted = [*PER_ROW, "initial_states"]
            cotangents = [dy, torch.ones_like(final_states)]
            gradients = torch.autograd.grad([y, final_states], [leaves[name] for name in wanted], cotangents)
        return y, *gradients[: len(PER_ROW)], final_states, gradients[-1]

    packed = forward_and_backward(values, RAGGED, cotangent)
    for s, length in enumerate(RAGGED):
        own = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        part = {name: value[own] if name in PER_ROW else value for name, value in values.items()}
        part["initial_states"] = values["initial_states"][s : s + 1]
        alone = forward_and_backward(part, [length], cotangent[own])
        for i, (one, all_) in enumerate(zip(alone, packed, strict=True)):
            assert torch.equal(one, all_[own] if i <= len(PER_ROW) else all_[s : s + 1]), (s, i)


@pytest.mark.parametrize("heads", [6, 38])
@pytest.mark.parametrize("lengths", [RAGGED, [600], [40, 30]], ids=["ragged", "one", "two"])
def test_native_threads_and_reruns_change_no_bit(lengths, heads):
    values = make(lengths, torch.float32, heads=heads, headdim=3, d_state=4)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 5, 16):
            torch.set_num_threads(threads)
            results.append(run("native", values, lengths))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name


@pytest.mark.parametrize("impl", ["chunked", "native"])
def test_columns_of_a_wider_tensor(impl):
    values = make(RAGGED, torch.float32)
    total = len(values["x"])
    wide = torch.cat([values[name].flatten(1) for name in PER_ROW], 1)
    pieces = wide.split([values[name][0].numel() for name in PER_ROW], 1)
    views = {n: piece.view(total, *values[n].shape[1:]) for n, piece in zip(PER_ROW, pieces, strict=True)}
    assert not views["B"].is_contiguous()
    with dispatch.force(impl):
        expected = scan(values, RAGGED)
        got = scan({**values, **views}, RAGGED)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)
        assert impl == "chunked" or torch.equal(one, other)


@pytest.mark.parametrize("impl", ["chunked", "native"])
def test_a_split_sequence_continues_from_its_state(impl):
    values = make([Q + 9], torch.float32)
    with dispatch.force(impl):
        whole, last = scan(values, [Q + 9])
        first, state = scan({k: v[:20] if k in PER_ROW else v for k, v in values.items()}, [20])
        rest = {k: v[20:] if k in PER_ROW else v for k, v in values.items()}
        second, end = scan({**rest, "initial_states": state}, [Q - 11])
    assert_close(torch.cat([first, second]), whole.double())
    assert_close(end, last.double())


@pytest.mark.parametrize("impl", ["chunked", "native"])
def test_no_bytes_and_no_sequences(impl):
    for lengths in ([], [0], [0, 0]):
        values = make(lengths, torch.float32)
        result = run(impl, values, lengths)
        assert result["y"].shape == (0, 4, 5)
        assert torch.equal(result["final_states"], values["initial_states"])
        assert not result["dA"].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_are_the_scan(dtype):
    steps, sequences = 5, 3
    lengths = [steps] * sequences
    values = make(lengths, dtype)
    y, final_states = scan(values, lengths, dt_softplus=True, dt_limit=(0.1, 2.0))
    by_sequence = {name: values[name].unflatten(0, (sequences, steps)) for name in PER_ROW}
    state = values["initial_states"].clone()
    outputs = []
    for t in range(steps):
        now = {name: value[:, t] for name, value in by_sequence.items()}
        constants = {name: values[name] for name in ("A", "D", "dt_bias")}
        out = bytekernels.mamba2_step(**now, **constants, state=state, dt_softplus=True, dt_limit=(0.1, 2.0))
        outputs.append(out)
    assert relative_error(torch.stack(outputs, 1).flatten(0, 1), y) < {torch.bfloat16: 5e-3}.get(dtype, 1e-6)
    assert relative_error(state, final_states) < 1e-6


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(5, 4), ValueError, "x must have shape [T, H, P], got [5, 4]"),
        ("dt", torch.zeros(5, 3), ValueError, "dt must have shape [T, H] = [5, 4], got [5, 3]"),
        ("A", torch.zeros(3), ValueError, "A must have shape [H] = [4], got [3]"),
        ("D", torch.zeros(4, 5), ValueError, "D must have shape [H] = [4], got [4, 5]"),
        ("B", torch.zeros(4, 2, 7), ValueError, "B must have shape [T, G, N] with T = 5, got [4, 2, 7]"),
        ("B", torch.zeros(5, 3, 7), ValueError, "B's 3 groups must divide the 4 heads of x"),
        ("C", torch.zeros(5, 2, 6), ValueError, "C must have B's shape [5, 2, 7], got [5, 2, 6]"),
        ("z", torch.zeros(5, 4, 4), ValueError, "z must have x's shape [5, 4, 5], got [5, 4, 4]"),
        ("initial_states", torch.zeros(1, 4, 5, 7), ValueError, "[S, H, P, N] = [2, 4, 5, 7], got [1, 4, 5, 7]"),
        ("cu_seqlens", torch.tensor([0, 6, 5]).int(), ValueError, "cu_seqlens must not decrease, got 6 > 5 at index 1"),
        ("cu_seqlens", torch.tensor([0, 5]), TypeError, "cu_seqlens must be int32"),
        ("dt_limit", (1.0, 0.5), ValueError, "dt_limit must be (least, greatest) with 0 <= least <= greatest, got (1"),
    ],
)
def test_what_the_scan_refuses(name, value, error, message):
    arguments = {**make([2, 3], torch.float32), "cu_seqlens": ragged([2, 3])[0], name: value}
    with pytest.raises(error, match=re.escape(message)):
        bytekernels.ssd_scan(**arguments)


def test_what_the_step_refuses():
    values = make([1, 1], torch.float32)
    state = values.pop("initial_states")
    with pytest.raises(
        TypeError, match=re.escape("state must be torch.float32 for x in torch.float32, got torch.float64")
    ):
        bytekernels.mamba2_step(**values, state=state.double())
    with pytest.raises(
        ValueError, match=re.escape("state must have shape [S, H, P, N] = [2, 4, 5, 7], got [1, 4, 5, 7]")
    ):
        bytekernels.mamba2_step(**values, state=state[:1])
    with pytest.raises(ValueError, match=re.escape("dt must have shape [S, H] = [2, 4], got [2, 3]")):
        bytekernels.mamba2_step(**{**values, "dt": values["dt"][:, :3]}, state=state)


def test_what_the_extension_refuses():
    values = make([2, 3], torch.float32)
    y, states = torch.empty_like(values["x"]), torch.empty_like(values["initial_states"])

    def call(sizes=(5, 4, 5, 2, 7), cu=(0, 2, 5), limits=(0.0, 1.0), **changed):
        given = {**values, **changed}
        fixed = (given["A"], given["D"], given["dt_bias"], given["initial_states"])
        A, D, dt_bias, initial = (array(value) for value in fixed)
        x, dt, B, C, z = (rows(given[name]) for name in ("x", "dt", "B", "C", "z"))
        arguments = (x, dt, A, B, C, D, z, dt_bias, True, *limits, initial)
        _C.ssd_scan(False, sizes, array(torch.tensor(cu).int()), arguments, array(y), array(states), 1)

    call()
    with pytest.raises(ValueError, match="x must have rows of 24 elements, got a row stride of 20"):
        call(sizes=(5, 4, 6, 2, 7))
    with pytest.raises(ValueError, match="the groups of B must divide 4 heads, got 3"):
        call(sizes=(5, 4, 5, 3, 7))
    with pytest.raises(ValueError, match="cu_seqlens must not decrease, got 6 > 5 at index 1"):
        call(cu=(0, 6, 5))
    with pytest.raises(ValueError, match="D must have 4 elements, got 3"):
        call(D=values["D"][:3])
    with pytest.raises(ValueError, match="C must have 70 elements, got 56"):
        call(C=values["C"][:4])
    with pytest.raises(ValueError, match="dt_limit must be"):
        call(limits=(2.0, 1.0))
