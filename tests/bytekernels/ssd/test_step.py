"""mamba2_step's Triton kernel against the float64 reference and the scan; one sequence's bits among others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import dispatch
from bytekernels.ssd import reference
from bytekernels.testing import assert_close, poisoned_memory, ragged

OPTIONS = ("D", "z", "dt_bias")
PER_SEQUENCE = ("x", "dt", "B", "C", "z", "state")


@pytest.fixture
def device(in_triton):
    return in_triton.device


def make(device, sequences=3, heads=4, headdim=5, d_state=7, groups=2, dtype=torch.float32, seed=0):
    """Inputs by name; parameters and the state are float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (sequences, heads, headdim),
        "dt": (sequences, heads),
        "A": (heads,),
        "B": (sequences, groups, d_state),
        "C": (sequences, groups, d_state),
        "state": (sequences, heads, headdim, d_state),
        "D": (heads,),
        "z": (sequences, heads, headdim),
        "dt_bias": (heads,),
    }
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    values["A"] = -4 * values["A"].abs()
    narrow = set(PER_SEQUENCE) - {"state"}
    return {name: value.to(device, dtype if name in narrow else torch.float32) for name, value in values.items()}


def step(function, values, softplus=True, limits=(0.0, float("inf"))):
    """y, and the state after, which is another tensor than before."""
    values = dict.fromkeys(OPTIONS) | values | {"state": values["state"].clone()}
    names = ("x", "dt", "A", "B", "C", "state", *OPTIONS)
    y = function(*(values[name] for name in names), softplus, *limits)
    return y, values["state"]


def launcher(*args):
    from bytekernels.ssd.triton import step  # here, once conftest.py has chosen the interpreter

    with poisoned_memory():
        return step.mamba2_step(*args)


def check(values, **options):
    y, state = step(launcher, values, **options)
    wide = {name: value.double() for name, value in values.items()}
    expected, expected_state = step(reference.mamba2_step, wide, **options)
    assert y.dtype == values["x"].dtype
    assert_close(y, expected)
    assert_close(state, expected_state, what="state")


def test_agrees_with_the_reference(device):
    @settings(max_examples=40)
    @given(
        sequences=st.sampled_from([0, 1, 3]),
        heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
        headdim=st.sampled_from([1, 5, 16, 40]),
        d_state=st.sampled_from([1, 7, 16, 33, 128, 256]),
        options=st.sets(st.sampled_from(OPTIONS)),
        softplus=st.booleans(),
        limits=st.sampled_from([(0.0, float("inf")), (0.3, 1.0)]),
        seed=st.integers(0, 9),
    )
    def agree(sequences, heads, headdim, d_state, options, softplus, limits, seed):
        values = make(device, sequences, heads[0], headdim, d_state, heads[1], seed=seed)
        values = {name: value for name, value in values.items() if name not in OPTIONS or name in options}
        if not softplus:
            values["dt"] = values["dt"].abs()
        check(values, softplus=softplus, limits=limits)

    agree()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype):
    check(make("cuda", 64, 48, 64, 128, 1, dtype))


def test_steps_are_the_scan(device):
    sequences, length = 3, 6
    values = make(device, sequences * length)
    cu, _ = ragged([length] * sequences)
    scanned = {name: value for name, value in values.items() if name != "state"}
    state = torch.zeros_like(values["state"][:sequences])
    with dispatch.force("reference"):
        expected, expected_states = bytekernels.ssd_scan(
            **scanned, cu_seqlens=cu.to(device), dt_softplus=True, return_final_states=True
        )
    for t in range(length):
        rows = {name: value[t::length] for name, value in values.items() if name in PER_SEQUENCE}
        y, state = step(launcher, values | rows | {"state": state})
        assert_close(y, expected[t::length])
    assert_close(state, expected_states, what="state")


def test_softplus_is_exact_in_the_tails(device):
    dt = torch.linspace(-80, 80, 81)
    one = torch.ones(81, 1, 1, device=device)
    values = dict(x=one, dt=dt[:, None].to(device), A=-one[0, 0], B=one, C=one, state=torch.zeros_like(one[..., None]))
    y, _ = step(launcher, values)
    expected = torch.nn.functional.softplus(dt.double(), threshold=1000)
    error = (y.flatten().cpu().double() - expected).abs() / expected
    assert error.max() < 1e-6


def test_what_is_not_a_number_stays_in_its_head(device):
    values = make(device)
    values["dt"][1, 2] = float("nan")
    values["dt"][0, 0], values["dt"][0, 1] = float("inf"), -float("inf")
    y, state = step(launcher, values, limits=(0.0, 2.0))
    wrong = torch.zeros(3, 4, dtype=torch.bool)
    wrong[1, 2] = True
    assert torch.equal(y.isnan().all(-1).cpu(), wrong) and torch.equal(y.isnan().any(-1).cpu(), wrong)
    assert torch.equal(state.isnan().flatten(2).all(-1).cpu(), wrong)
    assert torch.isfinite(state[~wrong.to(device)]).all()


def test_slices_of_columns(device):
    values = make(device, heads=4, headdim=5, groups=2, d_state=7)
    dense_y, dense_state = step(launcher, values)

    def slice_of(value):
        flat = value.flatten(1)
        return torch.cat([torch.full_like(flat[:, :3], 7), flat, torch.full_like(flat[:, :2], 7)], 1)[:, 3:-2]

    rows = {name: slice_of(values[name]).unflatten(1, values[name].shape[1:]) for name in ("x", "dt", "B", "C", "z")}
    spread = {name: torch.stack([values[name]] * 2, 1)[:, 0] for name in ("A", "D", "dt_bias")}
    across = {"C": values["C"].transpose(1, 2).contiguous().transpose(1, 2)}
    for changed in (rows, spread, across):
        y, state = step(launcher, values | changed)
        assert torch.equal(y, dense_y) and torch.equal(state, dense_state)


def test_a_sequence_alone_is_the_same_bit_for_bit(device):
    values = make(device, sequences=5, headdim=40, d_state=128)
    y, state = step(launcher, values)
    again, state_again = step(launcher, values)
    assert torch.equal(again, y) and torch.equal(state_again, state)
    for s in range(5):
        own = {name: value[s : s + 1].clone() for name, value in values.items() if name in PER_SEQUENCE}
        alone, state_alone = step(launcher, values | own)
        assert torch.equal(alone, y[s : s + 1]) and torch.equal(state_alone, state[s : s + 1])


def test_the_state_must_be_contiguous(device):
    values = make(device)
    values["state"] = values["state"].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="state must be contiguous, as it is updated in place, got strides"):
        bytekernels.mamba2_step(**values)
