"""The scan's Triton kernels against the float64 chunks: shapes, long sequences, every configuration; their bits."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytekernels import dispatch
from bytekernels.ssd import op
from bytekernels.testing import assert_close, ragged, ragged_lengths
from tests.bytekernels.conftest import far_apart
from tests.bytekernels.ssd.conftest import OPTIONS, PER_ROW, assert_agrees, make, run, scan

SIZES = {"heads": 2, "headdim": 5, "d_state": 6, "groups": 1}
SHORT = [0, 1, 3, 4, 0, 63, 64, 65]


@pytest.fixture
def segment(monkeypatch, in_triton):
    """Segments of 128 bytes, so that short sequences have several."""
    from bytekernels.ssd.triton import call  # here, once conftest.py has chosen the interpreter

    monkeypatch.setattr(call, "SEGMENT", 128)


def chosen(values, names):
    return {name: value for name, value in values.items() if name not in OPTIONS or name in names}


def test_ragged_shapes(in_triton):
    @settings(max_examples=2 if in_triton.interpreted else 40)
    @given(
        lengths=ragged_lengths(max_sequences=3, around=64),
        seed=st.integers(0, 9),
        names=st.sets(st.sampled_from(OPTIONS)),
        dt_softplus=st.booleans(),
    )
    def agree(lengths, seed, names, dt_softplus):
        values = make(lengths, torch.float32, seed=seed, device=in_triton.device, **SIZES)
        values["dt"] = values["dt"].abs()
        assert_agrees("triton", chosen(values, names), lengths, dt_softplus=dt_softplus)

    agree()


def test_lengths_about_a_chunk_and_a_long_one(in_triton):
    lengths = [*SHORT, 1000]
    values = make(lengths, torch.float32, heads=1, headdim=4, d_state=4, groups=1, device=in_triton.device)
    assert_agrees("triton", values, lengths)


@pytest.mark.parametrize("names", [OPTIONS, ()], ids=["all", "none"])
def test_sequences_of_several_segments(in_triton, segment, names):
    lengths = [260, 0, 129] if names else [257]
    values = make(lengths, torch.float32, heads=1, headdim=3, d_state=4, groups=1, device=in_triton.device)
    assert_agrees("triton", chosen(values, names), lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 48, "headdim": 64, "d_state": 128, "groups": 1},
        {"heads": 6, "headdim": 64, "d_state": 64, "groups": 3},
        {"heads": 4, "headdim": 20, "d_state": 33, "groups": 2},
        {"heads": 1, "headdim": 1, "d_state": 1, "groups": 1},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_every_dtype_and_size(dtype, sizes):
    lengths = [*SHORT, 1000, 9000]
    assert_agrees("triton", make(lengths, dtype, device="cuda", **sizes), lengths)


@pytest.mark.parametrize("sizes", [(24, 128), (20, 40)], ids=["one block", "padded"])
@pytest.mark.parametrize(
    ("dtype", "arch"),
    [(torch.bfloat16, 80), (torch.bfloat16, 90), (torch.bfloat16, 100), (torch.float32, 90)],
    ids=["bf16 sm_80", "bf16 sm_90", "bf16 sm_100", "fp32"],
)
def test_blocks_of_every_chip(monkeypatch, in_triton, dtype, arch, sizes):
    """What each dtype and chip is given, in float32 arithmetic."""
    from bytekernels.ssd.triton import call, configurations

    if not in_triton.interpreted:
        pytest.skip("blocks of other chips and dtypes may not fit this one")
    monkeypatch.setattr(call, "chunk_length", lambda *_: configurations.chunk_length(dtype, arch))
    monkeypatch.setattr(
        call, "configuration", lambda kernel, _, __, *rest: configurations.configuration(kernel, dtype, arch, *rest)
    )
    lengths = [65, 0, 3]
    headdim, d_state = sizes
    # Two heads: the gradient of one head's bias alone would be a single sum of terms that cancel.
    values = make(lengths, torch.float32, heads=2, headdim=headdim, d_state=d_state, groups=1)
    assert_agrees("triton", values, lengths)


def test_strong_decay_loses_nothing(in_triton):
    """|A| to 16 with Delta to 5: running sums in the thousands, whose differences may be small."""
    lengths = [150, 2]
    values = make(lengths, torch.float32, heads=2, headdim=4, d_state=4, groups=1)
    values["A"] = torch.tensor([-16.0, -3.0])
    values["dt"] = 5 * torch.rand(values["dt"].shape, generator=torch.Generator().manual_seed(3)) ** 4
    values["dt_bias"] = torch.zeros(2)
    values = {name: value.to(in_triton.device) for name, value in values.items()}
    assert_agrees("triton", values, lengths, dt_softplus=False)


def test_the_time_step_is_clamped(in_triton):
    values = make([40, 3], torch.float32, device=in_triton.device, **SIZES)
    values["dt_bias"] = values["dt_bias"] * 0.01
    assert_agrees("triton", values, [40, 3], dt_limit=(0.4, 1.0))


@pytest.mark.parametrize("dt_softplus", [True, False])
def test_a_time_step_that_is_not_a_number_is_not_lost(in_triton, dt_softplus):
    values = make([5], torch.float32, device=in_triton.device)
    values["dt"][2, 0] = torch.nan
    with dispatch.force("triton"):
        y = scan(values, [5], dt_softplus=dt_softplus, dt_limit=(0.0, 9.0))[0]
    assert torch.isnan(y[2:, 0]).all()
    assert torch.isfinite(y[:2]).all()
    assert torch.isfinite(y[:, 1:]).all()


def test_packing_changes_no_bit(in_triton, segment):
    lengths = [130, 0, 1, 64]
    values = make(lengths, torch.float32, heads=1, headdim=3, d_state=4, groups=1, device=in_triton.device)
    cu = ragged(lengths)[0].tolist()

    def forward_and_backward(part, lengths, dy):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in part.items()}
        with dispatch.force("triton"):
            y, final_states = scan(leaves, lengths, dt_softplus=True)
            wanted = [leaves[name] for name in (*PER_ROW, "initial_states")]
            gradients = torch.autograd.grad([y, final_states], wanted, [dy, torch.ones_like(final_states)])
        return y, *gradients[:-1], final_states, gradients[-1]

    dy = torch.randn(values["x"].shape, generator=torch.Generator().manual_seed(5)).to(in_triton.device)
    packed = forward_and_backward(values, lengths, dy)
    for s, length in enumerate(lengths):
        own = slice(cu[s], cu[s + 1])
        part = {name: value[own] if name in PER_ROW else value for name, value in values.items()}
        part["initial_states"] = values["initial_states"][s : s + 1]
        alone = forward_and_backward(part, [length], dy[own])
        for i, (one, all_) in enumerate(zip(alone, packed, strict=True)):
            assert torch.equal(one, all_[own] if i <= len(PER_ROW) else all_[s : s + 1]), (s, i)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_sequence_among_long_ones_keeps_its_bits(dtype):
    """Past a segment's length in all, the kernels are other binaries."""
    lengths = [100, 9000, 700]
    values = make(lengths, dtype, heads=4, headdim=64, d_state=128, groups=1, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    dy, dfinal = (
        torch.randn(values[name].shape, generator=generator, device="cuda", dtype=values[name].dtype)
        for name in ("x", "initial_states")
    )
    together = run("triton", values, lengths, cotangents=[dy, dfinal])
    for s, own in enumerate((slice(0, 100), slice(100, 9100), slice(9100, 9800))):
        part = {name: value[own] if name in PER_ROW else value for name, value in values.items()}
        part["initial_states"] = values["initial_states"][s : s + 1]
        alone = run("triton", part, [own.stop - own.start], cotangents=[dy[own], dfinal[s : s + 1]])
        for name in ("y", *(f"d{name}" for name in PER_ROW)):
            assert torch.equal(alone[name], together[name][own]), name
        for name in ("final_states", "dinitial_states"):
            assert torch.equal(alone[name], together[name][s : s + 1]), name


def test_runs_are_equal_bit_for_bit(in_triton):
    lengths = [70, 3]
    values = make(lengths, torch.float32, device=in_triton.device, **SIZES)
    first, second = (run("triton", values, lengths) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_split_sequence_continues_from_its_state(in_triton):
    values = make([73], torch.float32, device=in_triton.device, **SIZES)
    with dispatch.force("triton"):
        whole, last = scan(values, [73])
        first, state = scan({k: v[:20] if k in PER_ROW else v for k, v in values.items()}, [20])
        rest = {k: v[20:] if k in PER_ROW else v for k, v in values.items()}
        second, end = scan({**rest, "initial_states": state}, [53])
    assert_close(torch.cat([first, second]), whole.double())
    assert_close(end, last.double())


def test_no_bytes_and_no_sequences(in_triton):
    for lengths in ([], [0], [0, 0]):
        values = make(lengths, torch.float32, device=in_triton.device)
        result = run("triton", values, lengths)
        assert result["y"].shape == (0, 4, 5)
        assert torch.equal(result["final_states"], values["initial_states"])
        assert not result["dA"].any()


def test_columns_of_wider_tensors_in_and_out(in_triton):
    """Strided rows change no bit, of inputs or of the gradients that the mixer has written into one buffer."""
    from bytekernels.ssd import triton

    lengths = [70, 3]
    values = make(lengths, torch.float32, device=in_triton.device, **SIZES)
    cu = ragged(lengths)[0].to(in_triton.device)
    options = (values["D"], None, values["dt_bias"], True, 0.0, 9.0, values["initial_states"])

    def spread(value):
        """Equal values, in columns of a tensor that has two more."""
        wide = value.new_full((len(value), value[0].numel() + 2), torch.nan)
        wide[:, 1:-1] = value.flatten(1)
        return wide[:, 1:-1].unflatten(1, value.shape[1:])

    dense = [values[name] for name in ("x", "dt", "A", "B", "C")]
    strided = [value if value is values["A"] else spread(value) for value in dense]
    assert not strided[3].is_contiguous()
    y, states = triton.ssd_scan(*dense, cu, *options)
    for one, other in zip(triton.ssd_scan(*strided, cu, *options), (y, states), strict=True):
        assert torch.equal(one, other)
    outputs = {name: spread(values[name[1:]]) for name in ("dx", "ddt", "dB", "dC")}
    expected = triton.ssd_scan_backward(y, states, *dense, cu, *options)
    got = triton.ssd_scan_backward(y, states, *strided, cu, *options, **outputs)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert [got[i].data_ptr() for i in (0, 1, 3, 4)] == [value.data_ptr() for value in outputs.values()]


def test_offsets_past_int32(in_triton, tmp_path):
    """Rows of x, and of its gradient, more than 2^31 elements apart."""
    from bytekernels.ssd import triton

    rows = 3
    values = make([rows], torch.float32, device=in_triton.device, **SIZES)
    cu = ragged([rows])[0].to(in_triton.device)
    x, dx = (far_apart(values["x"].flatten(1), tmp_path / name) for name in ("x", "dx"))
    x, dx = (value.unflatten(1, values["x"].shape[1:]) for value in (x, dx))
    rest = [values[name] for name in ("dt", "A", "B", "C")]
    options = (cu, values["D"], None, None, True, 0.0, 9.0, None)
    y, states = triton.ssd_scan(values["x"], *rest, *options)
    assert torch.equal(triton.ssd_scan(x, *rest, *options)[0], y)
    expected = triton.ssd_scan_backward(y, states, values["x"], *rest, *options)
    got = triton.ssd_scan_backward(y, states, x, *rest, *options, dx=dx)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [OPTIONS, ()], ids=["all", "none"])
def test_opcheck(in_triton, options):
    lengths = [3, 0, 66]
    values = make(lengths, torch.float32, heads=1, headdim=2, d_state=3, groups=1, device=in_triton.device)
    values = {name: value.requires_grad_() for name, value in chosen(values, options).items()}
    x, dt, A, B, C = (values[name] for name in ("x", "dt", "A", "B", "C"))
    D, z, dt_bias, initial = (values.get(name) for name in OPTIONS)
    cu = ragged(lengths)[0].to(in_triton.device)
    arguments = (x, dt, A, B, C, cu, D, z, dt_bias, True, 0.0, 9.0, initial)
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    with dispatch.force("triton"):
        check(op.ssd_scan_op, arguments)
        detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
        dfinal = x.new_zeros(3, *x.shape[1:], B.shape[2])
        check(op.ssd_scan_backward_op, (torch.ones_like(x), dfinal, *detached))


def test_what_the_kernels_refuse(in_triton):
    values = make([2], torch.float32, heads=1, headdim=65, d_state=3, groups=1, device=in_triton.device)
    with (
        dispatch.force("triton"),
        pytest.raises(RuntimeError, match="takes P from 1 to 64 and N from 1 to 128, got"),
    ):
        scan(values, [2])
    values = make([2], torch.float32, heads=1, headdim=3, d_state=3, groups=1, device=in_triton.device)
    values["B"], values["C"] = values["B"].double(), values["C"].double()
    with (
        dispatch.force("triton"),
        pytest.raises(RuntimeError, match="takes float32, float16 and bfloat16, got float64"),
    ):
        scan(values, [2])
