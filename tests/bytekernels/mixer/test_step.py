"""The mixer's step: against the forward and the float64 reference; its ring, its state, its bits."""

import re

import pytest
import torch

import bytekernels
from bytekernels import _C, MixerState, MixerStates, dispatch, extension
from bytekernels.mixer import op
from bytekernels.testing import assert_close, ragged
from tests.bytekernels.conftest import FAST, NATIVE, Fast
from tests.bytekernels.mixer.conftest import OPTIONS, Case, spare_the_interpreter


def steps_of(case, lengths, start):
    """The case's rows from ``start`` of each sequence on, as steps from the states before: outputs and last state."""
    sequences, length = len(lengths), lengths[0]
    zxbcdt = case.values["zxbcdt"].unflatten(0, (sequences, length))
    if start:
        values = {**case.values, "zxbcdt": zxbcdt[:, :start].flatten(0, 1)}
        before = case.of(values)
        before.cu_seqlens = ragged([start] * sequences)[0].to(case.cu_seqlens.device)
        state = MixerState.after(MixerStates(*before.mix()[1:]))
    else:
        state = MixerState.after(MixerStates(case.values["conv"], case.values["ssm"]))
    outputs = [
        bytekernels.mamba2_mixer_step(zxbcdt[:, t], *case.weights, state, **case.keywords) for t in range(start, length)
    ]
    return torch.stack(outputs, 1), state


REFERENCE = Fast("reference", "cpu", (torch.float32, torch.bfloat16), 60)


@pytest.fixture(params=[pytest.param(REFERENCE, id="reference"), *FAST])
def stepper(request) -> Fast:
    return request.param


@pytest.mark.parametrize("options", [OPTIONS, ("states",)], ids=["all", "none"])
@pytest.mark.parametrize("start", [0, 4])
def test_steps_are_the_forward(stepper, start, options):
    """Three sequences, for longer than the ring is, from its first state and from a forward's last."""
    length, taps = 8, 3
    if options != OPTIONS:
        spare_the_interpreter(stepper)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        if dtype not in stepper.dtypes:
            continue
        case = Case([length] * 3, dtype, device=stepper.device, options=options, taps=taps, head_dim=5)
        with stepper.force():
            out, conv, ssm = case.mix()
            found, state = steps_of(case, [length] * 3, start)
        assert found.dtype == dtype
        assert_close(found, out.unflatten(0, (3, length))[:, start:], limit=limit)
        assert_close(state.ssm, ssm, limit=limit)
        assert torch.equal(state.position, torch.full((3, 4), (length - start) % taps, device=stepper.device))
        order = (state.position[:, :1].long() + torch.arange(1, taps, device=stepper.device)) % taps  # oldest first
        ring = state.conv.gather(2, order[:, None].expand(-1, state.conv.shape[1], -1))
        assert torch.equal(ring, conv.float())


def test_steps_agree_with_the_float64_reference():
    case = Case([9] * 3)
    with dispatch.force("reference"):
        out, _, ssm = case.mix()
        found, state = steps_of(case, [9] * 3, 0)
    assert_close(found, out.unflatten(0, (3, 9)))
    assert_close(state.ssm, ssm)


def test_triton_steps_are_the_references(in_triton):
    """Odd sizes, where blocks are padded, and a head that is more than one block."""
    bare = dict(heads=3, head_dim=7, d_state=5, groups=3, options=("states",))
    for sizes in (bare, dict(heads=2, head_dim=20, d_state=700, groups=1)):
        case = Case([2] * 3, torch.float32, device=in_triton.device, **sizes)
        rows = case.values["zxbcdt"].unflatten(0, (3, 2))
        states = MixerStates(case.values["conv"], case.values["ssm"])
        found, expected = MixerState.after(states), MixerState.after(MixerStates(*(s.double() for s in states)))
        wide = [None if value is None else value.double() for value in case.weights]
        for t in range(2):
            with in_triton.force():
                out = bytekernels.mamba2_mixer_step(rows[:, t], *case.weights, found, **case.keywords)
            with dispatch.force("reference"):
                truth = bytekernels.mamba2_mixer_step(rows[:, t].double(), *wide, expected, **case.keywords)
            assert_close(out, truth)
            assert_close(found.ssm, expected.ssm)
            assert_close(found.conv, expected.conv)
            assert torch.equal(found.position, expected.position)


def native_steps(case, sequences, state, **options):
    """The case's rows as native steps of so many sequences: outputs [S, L, H*P]. Updates the state."""
    rows = case.values["zxbcdt"].unflatten(0, (sequences, -1))
    with NATIVE.force():
        steps = [
            bytekernels.mamba2_mixer_step(rows[:, t], *case.weights, state, **case.keywords, **options)
            for t in range(rows.shape[1])
        ]
    return torch.stack(steps, 1)


def begun(case, dtype=torch.float32):
    """The case's first state, in which each head's ring begins at a slot of its own."""
    state = MixerState.after(MixerStates(case.values["conv"].to(dtype), case.values["ssm"].to(dtype)))
    generator = torch.Generator().manual_seed(2)
    state.position.random_(0, state.conv.shape[2], generator=generator)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sequences", [1, 3, 17])
def test_native_steps_are_the_references(sequences, groups, dtype):
    """Odd sizes and whole vectors, every number of taps, for longer than the ring is."""
    for taps, head_dim, d_state, options in ((4, 5, 7, OPTIONS), (3, 33, 17, ("states",)), (2, 16, 64, OPTIONS)):
        sizes = dict(taps=taps, head_dim=head_dim, d_state=d_state, groups=groups)
        case = Case([6] * sequences, dtype, options=options, **sizes)
        found, expected = begun(case), begun(case, torch.float64)
        out = native_steps(case, sequences, found, dt_limit=(0.1, 2.0))
        rows = case.values["zxbcdt"].double().unflatten(0, (sequences, 6))
        wide = [None if value is None else value.double() for value in case.weights]
        with dispatch.force("reference"):
            truth = [
                bytekernels.mamba2_mixer_step(rows[:, t], *wide, expected, **case.keywords, dt_limit=(0.1, 2.0))
                for t in range(6)
            ]
        limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]  # x, B, C and y are rounded on the way
        assert out.dtype == dtype
        assert_close(out, torch.stack(truth, 1), limit=limit)
        assert_close(found.ssm, expected.ssm, limit=limit)
        assert torch.equal(found.conv, expected.conv.float())
        assert torch.equal(found.position, expected.position)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_native_steps_are_the_same_bits_on_any_threads_and_alone(dtype):
    """In sizes at which each pass but the norm's is worth two threads."""
    sequences, before = 40, torch.get_num_threads()
    case = Case([5] * sequences, dtype, heads=2, head_dim=32, d_state=64, groups=1)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state = begun(case)
            results.append((native_steps(case, sequences, state), state.conv, state.position, state.ssm))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(value, first) for value, first in zip(result, results[0], strict=True))
    for s in (0, 17, 39):
        whole = begun(case)
        state = MixerState(*(value[s : s + 1].clone() for value in (whole.conv, whole.position, whole.ssm)))
        alone = case.of({**case.values, "zxbcdt": case.values["zxbcdt"][5 * s : 5 * s + 5]})
        result = native_steps(alone, 1, state), state.conv, state.position, state.ssm
        assert all(torch.equal(value, first[s : s + 1]) for value, first in zip(result, results[0], strict=True))


def test_native_steps_keep_what_is_not_a_number():
    case = Case([1, 1], torch.float32)
    case.values["zxbcdt"][1, -1] = torch.nan  # dt of the second sequence's last head
    state = begun(case)
    out = native_steps(case, 2, state)
    assert state.ssm.isnan().flatten(2).all(2).tolist() == [[False] * 4, [False] * 3 + [True]]
    assert not state.ssm[1, :3].isnan().any() and not out[0].isnan().any()
    assert out[1, 0, 8:].isnan().all() and not out[1, 0, :8].isnan().any()  # the group's


def test_native_steps_read_columns_in_any_order():
    case = Case([1] * 3, torch.float32)
    turned = case.of({**case.values, "zxbcdt": case.values["zxbcdt"].T.contiguous().T})
    assert torch.equal(native_steps(turned, 3, begun(case)), native_steps(case, 3, begun(case)))


def test_what_the_extension_lacks_is_stepped_by_the_reference():
    for taps, dtype in ((5, torch.float32), (4, torch.float16), (4, torch.float64)):
        case = Case([1, 1], dtype, taps=taps)
        state = begun(case, torch.promote_types(dtype, torch.float32))
        out = bytekernels.mamba2_mixer_step(case.values["zxbcdt"], *case.weights, state, **case.keywords)
        assert out.isfinite().all()
        with pytest.raises(RuntimeError, match="must have 2 to 4 taps, got 5|must be float32 or bfloat16, got torch.f"):
            native_steps(case, 2, state)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("sizes", (2, 4, 4, 2, 0, 4), "ssm must have shape [S, H, P, N] with H, P, N >= 1, got 2, 4, 4, 0"),
        ("sizes", (2, 4, 4, 3, 3, 4), "the groups must divide 4 heads, got 3"),
        ("sizes", (2, 4, 4, 2, 3, 5), "conv_weight must have 2 to 4 taps, got 5"),
        ("sizes", (2, 4, 2**60, 2, 3, 4), "sizes are too large: their product passes 2^63"),
        ("sizes", (3, 4, 4, 2, 3, 4), "zxbcdt must have 144 elements, got 96"),
        ("zxbcdt", torch.zeros(2, 47), "zxbcdt must have rows of 48 elements, got a row stride of 47"),
        ("conv_weight", torch.zeros(27, 4), "conv_weight must have 112 elements, got 108"),
        ("conv_bias", torch.zeros(27), "conv_bias must have 28 elements, got 27"),
        ("A", torch.zeros(3), "A must have 4 elements, got 3"),
        ("D", torch.zeros(3), "D must have 4 elements, got 3"),
        ("dt_bias", torch.zeros(5), "dt_bias must have 4 elements, got 5"),
        ("norm_weight", torch.zeros(15), "norm_weight must have 16 elements, got 15"),
        ("options", (1e-5, 1.0, 0.5), "0 <= least <= greatest, got 1.000000, 0.500000"),
        ("conv", torch.zeros(2, 28, 3), "conv must have 224 elements, got 168"),
        ("position", torch.zeros(2, 3).int(), "position must have 8 elements, got 6"),
        ("ssm", torch.zeros(2, 4, 4, 3).double(), "ssm must have 96 elements, got 192"),
        ("out", torch.zeros(2, 15), "out must have 32 elements, got 30"),
    ],
)
def test_what_the_extension_refuses_to_step(place, value, message):
    case = Case([1, 1], torch.float32)
    state = begun(case)
    parameters = dict(zip(("conv_weight", "conv_bias", "A", "D", "dt_bias", "norm_weight"), case.weights, strict=True))
    states = dict(conv=state.conv, position=state.position, ssm=state.ssm)
    others = dict(
        sizes=(2, 4, 4, 2, 3, 4), zxbcdt=case.values["zxbcdt"], options=(1e-5, 0.0, 9.0), out=torch.zeros(2, 16)
    )
    next(group for group in (parameters, states, others) if place in group)[place] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        _C.mamba2_mixer_step(
            False,
            others["sizes"],
            extension.rows(others["zxbcdt"]),
            tuple(map(extension.array, parameters.values())),
            others["options"],
            tuple(map(extension.array, states.values())),
            None,
            extension.array(others["out"]),
            1,
        )


def test_a_step_counts_as_a_change_of_its_state():
    case = Case([1, 1], torch.float32)
    state = begun(case)
    product = (torch.ones(1, requires_grad=True) * state.ssm).sum()  # its gradient needs the state as it was
    native_steps(case, 2, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_an_empty_state_is_that_of_a_sequence_before_its_first_byte():
    case = Case([4] * 2, torch.float32, options=("conv_bias",))
    heads, head_dim, d_state, _, taps = case.sizes.values()
    state = MixerState.empty(2, len(case.values["conv_weight"]), taps, heads, head_dim, d_state)
    rows = case.values["zxbcdt"].unflatten(0, (2, 4))
    found = [bytekernels.mamba2_mixer_step(rows[:, t], *case.weights, state, **case.keywords) for t in range(4)]
    assert_close(torch.stack(found, 1).flatten(0, 1), case.mix()[0].double())


def test_no_sequences_to_step():
    case = Case([], torch.float32)
    state = MixerState.after(MixerStates(case.values["conv"], case.values["ssm"]))
    assert bytekernels.mamba2_mixer_step(case.values["zxbcdt"], *case.weights, state, **case.keywords).shape == (0, 16)


def test_step_opcheck():
    case = Case([1, 1], torch.float32)
    state = MixerState.after(MixerStates(case.values["conv"], case.values["ssm"]))
    states = state.conv, state.position, state.ssm
    arguments = (case.values["zxbcdt"], *case.weights, *states, 4, 2, 1e-5, 0.0, 9.0, None)
    torch.library.opcheck(op.mamba2_mixer_step_op, arguments)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        (
            "conv",
            lambda c: c[:, :, 1:],
            ValueError,
            "state.conv must have shape [S, C, K] = [2, 28, 4], got [2, 28, 3]",
        ),
        ("conv", lambda c: c.mT.contiguous().mT, ValueError, "state.conv must be contiguous, got strides [112, 1, 28]"),
        ("position", lambda p: p.long(), TypeError, "state.position must be torch.int32 for zxbcdt in torch.float32"),
        ("position", lambda p: p[:, :1], ValueError, "state.position must have shape [S, H] = [2, 4], got [2, 1]"),
        ("ssm", lambda s: s.double(), TypeError, "state.ssm must be torch.float32 for zxbcdt in torch.float32, got"),
        ("ssm", lambda s: s[:1], ValueError, "state.ssm must have shape [S, H, P, N] = [2, 4, 4, 3], got [1, 4, 4, 3]"),
    ],
)
def test_what_the_step_refuses(name, change, error, message):
    case = Case([1, 1], torch.float32)
    state = MixerState.after(MixerStates(case.values["conv"], case.values["ssm"]))
    setattr(state, name, change(getattr(state, name)))
    with pytest.raises(error, match=re.escape(message)):
        bytekernels.mamba2_mixer_step(case.values["zxbcdt"], *case.weights, state, **case.keywords)
