"""A mask on the mixer's step: who is not active keeps its bits, and the others don't notice."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bytekernels
from bytekernels import _C, MixerState, MixerStates, dispatch, extension
from bytekernels.mixer import op
from bytekernels.testing import assert_close
from tests.bytekernels.conftest import FAST, NATIVE, Fast
from tests.bytekernels.mixer.conftest import OPTIONS, Case

REFERENCE = Fast("reference", "cpu", (torch.float32, torch.bfloat16, torch.float64), 60)
MASK = [True, False, True, True, False]


@pytest.fixture(params=[pytest.param(REFERENCE, id="reference"), *FAST])
def stepper(request) -> Fast:
    return request.param


def begun(case):
    """The case's first state, in which each sequence's ring begins at a slot of its own."""
    wide = torch.promote_types(case.values["zxbcdt"].dtype, torch.float32)
    state = MixerState.after(MixerStates(case.values["conv"].to(wide), case.values["ssm"].to(wide)))
    generator = torch.Generator().manual_seed(2)
    state.position.copy_(torch.randint(0, state.conv.shape[2], (len(state.position), 1), generator=generator))
    return state


def tensors(state):
    return state.conv, state.position, state.ssm


def copied(state):
    return MixerState(*(value.clone() for value in tensors(state)))


def step(case, state, active=None, rows=None):
    rows = case.values["zxbcdt"] if rows is None else rows
    return bytekernels.mamba2_mixer_step(rows, *case.weights, state, **case.keywords, active=active)


def assert_masked(stepper, case, mask):
    """Active sequences give the bits of a step without a mask, the others keep theirs, whatever their row holds."""
    active = torch.tensor(mask, dtype=torch.bool, device=stepper.device)
    before, whole, found = begun(case), begun(case), begun(case)
    rows = case.values["zxbcdt"].clone()
    rows[~active] = torch.nan
    with stepper.force():
        expected = step(case, whole)
        out = step(case, found, active, rows)
    assert out.dtype == rows.dtype
    assert torch.equal(out[active], expected[active])
    assert torch.equal(out[~active], torch.zeros_like(out[~active]))
    for name, value, stepped, old in zip(
        ("conv", "position", "ssm"), tensors(found), tensors(whole), tensors(before), strict=True
    ):
        assert torch.equal(value[active], stepped[active]), f"{name} of an active sequence"
        assert torch.equal(value[~active], old[~active]), f"{name} of a sequence that is not active"


@pytest.mark.parametrize("options", [OPTIONS, ("states",)], ids=["all", "none"])
@pytest.mark.parametrize("mask", [MASK, [True] * 5, [False] * 5, [False, True, True, True, False]])
def test_who_is_not_active_keeps_its_bits(stepper, mask, options):
    for dtype in stepper.dtypes:
        assert_masked(stepper, Case([1] * 5, dtype, device=stepper.device, options=options, taps=3), mask)


@given(mask=st.lists(st.booleans(), max_size=20), groups=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_any_mask_in_native_code(mask, groups, seed):
    for dtype in NATIVE.dtypes:
        assert_masked(NATIVE, Case([1] * len(mask), dtype, groups=groups, head_dim=9, d_state=17, seed=seed), mask)


def test_masked_steps_are_the_references(stepper):
    """Four steps under changing masks, in float64 for the truth."""
    case = Case([1] * 5, torch.float32, device=stepper.device, head_dim=5)
    wide = case.of({name: value.double() for name, value in case.values.items()})
    found, expected = begun(case), begun(wide)
    for shift in range(4):
        active = torch.tensor(MASK, device=stepper.device).roll(shift)
        with stepper.force():
            out = step(case, found, active)
        with dispatch.force("reference"):
            truth = step(wide, expected, active)
        assert_close(out, truth)
        assert_close(found.ssm, expected.ssm)
        assert torch.equal(found.conv, expected.conv.float())
        assert torch.equal(found.position, expected.position)


def test_a_masked_state_that_is_not_a_number_stays_where_it_is(stepper):
    case = Case([1] * 3, torch.float32, device=stepper.device)
    state = begun(case)
    clean = copied(state)
    for value in (state.conv, state.ssm):
        value[1] = torch.nan
    active = torch.tensor([True, False, True], device=stepper.device)
    with stepper.force():
        out, expected = step(case, state, active), step(case, clean, active)
    assert torch.equal(out, expected)
    assert state.ssm[1].isnan().all() and state.conv[1].isnan().all()
    assert torch.equal(state.ssm[::2], clean.ssm[::2]) and torch.equal(state.conv[::2], clean.conv[::2])


def test_native_masked_steps_are_the_same_bits_on_any_threads():
    sequences, before = 40, torch.get_num_threads()
    case = Case([1] * sequences, torch.float32, heads=2, head_dim=32, d_state=64, groups=1)
    active = torch.arange(sequences) % 3 != 1
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state = begun(case)
            with NATIVE.force():
                results.append((step(case, state, active), *tensors(state)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(value, first) for value, first in zip(result, results[0], strict=True))


def test_a_mask_may_be_a_slice(stepper):
    case = Case([1] * 3, torch.float32, device=stepper.device)
    state, expected = begun(case), begun(case)
    mask = torch.tensor([[True, False], [False, True], [True, False]], device=stepper.device)
    with stepper.force():
        out = step(case, state, mask[:, 0])
        assert torch.equal(out, step(case, expected, mask[:, 0].contiguous()))
    assert all(torch.equal(value, other) for value, other in zip(tensors(state), tensors(expected), strict=True))


def test_masked_step_opcheck():
    case = Case([1, 1], torch.float32)
    state = begun(case)
    arguments = (case.values["zxbcdt"], *case.weights, *tensors(state), 4, 2, 1e-5, 0.0, 9.0)
    torch.library.opcheck(op.mamba2_mixer_step_op, (*arguments, torch.tensor([True, False])))


@pytest.mark.parametrize(
    ("active", "error", "message"),
    [
        (torch.ones(2), TypeError, "active must be bool, got torch.float32: use active.bool()"),
        (torch.ones(3, dtype=torch.bool), ValueError, "active must have shape [S] = [2], got [3]"),
        (torch.ones(2, 1, dtype=torch.bool), ValueError, "active must have shape [S] = [2], got [2, 1]"),
    ],
)
def test_masks_that_are_refused(active, error, message):
    case = Case([1, 1], torch.float32)
    state = begun(case)
    before = copied(state)
    with pytest.raises(error, match=re.escape(message)):
        step(case, state, active)
    assert torch.equal(state.ssm, before.ssm)


def test_the_extension_refuses_a_mask_of_another_size():
    case = Case([1, 1], torch.float32)
    state, out = begun(case), torch.zeros(2, 16)
    with pytest.raises(ValueError, match="active must have 2 elements, got 3"):
        _C.mamba2_mixer_step(
            False,
            (2, 4, 4, 2, 3, 4),
            extension.rows(case.values["zxbcdt"]),
            tuple(map(extension.array, case.weights)),
            (1e-5, 0.0, 9.0),
            tuple(map(extension.array, tensors(state))),
            extension.array(torch.ones(3, dtype=torch.bool)),
            extension.array(out),
            1,
        )
