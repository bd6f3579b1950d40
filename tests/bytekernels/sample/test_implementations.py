"""The fast implementations against the specification, index by index; what the op checks and refuses."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import _C, dispatch, extension
from bytekernels.sample import op, roofline
from bytekernels.testing import poisoned_memory
from tests.bytekernels.conftest import INTERPRETED, NATIVE, assert_repeats
from tests.bytekernels.sample.conftest import DTYPES, REFERENCE, make

INF, NAN = math.inf, math.nan


def assert_same_draws(fast, case):
    with poisoned_memory():
        assert torch.equal(case.draw(fast), case.draw(REFERENCE))


def test_agrees_with_the_reference(fast):
    @settings(max_examples=fast.examples)
    @given(
        rows=st.integers(1, 3 if fast.interpreted else 60),
        vocabulary=st.sampled_from([1, 2, 15, 16, 17, 64, 100]) if fast.interpreted else st.integers(1, 300),
        dtype=st.sampled_from(fast.dtypes),
        spread=st.sampled_from([0.0, 0.1, 1.0, 3.0, 30.0]),
        seed=st.integers(0, 9999),
    )
    def agree(rows, vocabulary, dtype, spread, seed):
        assert_same_draws(fast, make(rows, vocabulary, dtype, spread=spread, seed=seed))

    agree()


@pytest.mark.parametrize("vocabulary", [257, 512, 1024])
def test_agrees_at_the_sizes_of_models(fast, vocabulary):
    for dtype in fast.dtypes:
        assert_same_draws(fast, make(8 if fast.interpreted else 600, vocabulary, dtype, spread=2.0))


def test_native_draws_of_half_precision_and_of_many_tokens():
    assert_same_draws(NATIVE, make(50, 64, torch.float16))
    assert_same_draws(NATIVE, make(3, 50_000))


def test_rows_of_equal_logits_are_cut_by_index(fast):
    """Ties everywhere: how much is kept decides all."""
    case = make(6 if fast.interpreted else 100, 33, spread=0.0)
    assert_same_draws(fast, case.but(logits=case.logits.nan_to_num(neginf=0.0), temperature=1.0, min_p=0.0))


@pytest.mark.parametrize("vocabulary", [7, 512])
def test_native_draws_on_any_threads(vocabulary):
    case = make(300, vocabulary)
    assert_repeats(NATIVE, lambda: [case.draw(NATIVE)])


def test_arguments_may_be_slices(fast):
    case = make(4, 10)
    wide = [torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0] for tensor in case.tensors]
    assert not any(tensor.is_contiguous() for tensor in wide)
    assert torch.equal(type(case)(*wide).draw(fast), case.draw(REFERENCE))


def test_which_implementation_serves_what():
    refuse = dispatch.Dispatch.choose
    narrow, wide = make(2, 5), make(2, 5, torch.float64)
    assert refuse(op._sample, "cpu", narrow.tensors) == "native"
    assert refuse(op._sample, "cpu", wide.tensors) == "reference"
    assert refuse(op._sample, "cuda", make(2, 1025).tensors) == "reference"
    with pytest.raises(RuntimeError, match="takes rows of up to 1024 logits, got 1025"):
        make(2, 1025).draw(INTERPRETED)
    with pytest.raises(RuntimeError, match="logits must be float32, bfloat16 or float16, got torch.float64"):
        wide.draw(NATIVE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    torch.library.opcheck(op.sample_op, make(3, dtype=dtype).tensors)


def test_compiled_without_a_break():
    case = make(4)

    def twice(logits, seeds, counters, temperature, top_k, top_p, min_p):
        limits = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        return bytekernels.sample(logits * 2, seeds, counters, **limits) + 1

    compiled = torch.compile(twice, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*case.tensors), twice(*case.tensors))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -0.5, "temperature must be finite and at least 0, got -0.5 in row 1: 0 takes the greatest"),
        ("temperature", INF, "temperature must be finite and at least 0, got inf in row 1"),
        ("temperature", NAN, "temperature must be finite and at least 0, got nan in row 1"),
        ("top_k", -1, "top_k must be at least 0, got -1 in row 1: 0 keeps all"),
        ("top_p", 1.5, "top_p must be in [0, 1], got 1.5 in row 1: 1 keeps all"),
        ("top_p", NAN, "top_p must be in [0, 1], got nan in row 1"),
        ("min_p", -0.25, "min_p must be in [0, 1], got -0.25 in row 1: 0 keeps all"),
        ("logits", NAN, "logits must hold no NaN and their greatest must be finite, got NaN in row 1"),
        ("logits", INF, "greatest must be finite, got inf as the greatest in row 1"),
    ],
)
def test_rows_that_are_refused_are_named(sampler, name, value, message):
    case = make(3)
    vars(case)[name].view(3, -1)[1, -1] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        case.draw(sampler)


def test_a_row_without_tokens_is_refused(sampler):
    case = make(3).but(temperature=torch.tensor([0.0, 1.0, 0.0]))
    case.logits[1:] = -INF
    with pytest.raises(ValueError, match=re.escape("got -inf as the greatest in row 1: mask fewer tokens")):
        case.draw(sampler)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("logits", lambda x: x.long(), TypeError, "logits must have a floating dtype, got torch.int64"),
        ("logits", lambda x: x[0], ValueError, "logits must have shape [S, V] with V >= 1, got [19]"),
        ("logits", lambda x: x[:, :0], ValueError, "logits must have shape [S, V] with V >= 1, got [3, 0]"),
        (
            "seeds",
            lambda x: x.int(),
            TypeError,
            "seeds must be torch.int64, got torch.int32: use seeds.to(torch.int64)",
        ),
        ("counters", lambda x: x[:2], ValueError, "counters must have shape [S] = [3], got [2]"),
        ("temperature", lambda x: x.double(), TypeError, "temperature must be torch.float32, got torch.float64"),
        ("top_k", lambda x: x.long(), TypeError, "top_k must be torch.int32, got torch.int64"),
        ("top_p", lambda x: x[:, None], ValueError, "top_p must have shape [S] = [3], got [3, 1]"),
        ("min_p", lambda x: x.half(), TypeError, "min_p must be torch.float32, got torch.float16"),
    ],
)
def test_arguments_are_checked(name, change, error, message):
    case = make(3)
    vars(case)[name] = change(vars(case)[name])
    with pytest.raises(error, match=re.escape(message)):
        case.draw()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("sizes", (2, 0), "logits must have shape [S, V] with 1 <= V < 2^31, got 2, 0"),
        ("sizes", (-1, 5), "logits must have shape [S, V] with 1 <= V < 2^31, got -1, 5"),
        ("logits", torch.zeros(2, 4), "logits must have 10 elements, got 8"),
        ("seeds", torch.arange(3), "seeds must have 2 elements, got 3"),
        ("counters", torch.arange(1), "counters must have 2 elements, got 1"),
        ("temperature", torch.ones(3), "temperature must have 2 elements, got 3"),
        ("top_k", torch.zeros(2).long(), "top_k must have 2 elements, got 4"),
        ("top_p", torch.ones(1), "top_p must have 2 elements, got 1"),
        ("min_p", torch.ones(1), "min_p must have 2 elements, got 1"),
        ("drawn", torch.zeros(2).int(), "drawn must have 2 elements, got 1"),
    ],
)
def test_what_the_extension_refuses(place, value, message):
    arguments = {"sizes": (2, 5), **vars(make(2, 5)), "drawn": torch.zeros(2).long(), place: value}
    sizes, logits, seeds, counters, *limits, drawn = arguments.values()
    logits, seeds, counters, drawn = map(extension.array, (logits, seeds, counters, drawn))
    with pytest.raises(ValueError, match=re.escape(message)):
        _C.sample(sizes, logits, seeds, counters, tuple(map(extension.array, limits)), drawn, 1)


def test_roofline_counts_the_tensors():
    case = make(3, 10, torch.bfloat16)
    work = roofline.sample(3, 10, torch.bfloat16)
    assert work.bytes == sum(tensor.nbytes for tensor in case.tensors) + 3 * 8
    assert work.flops == 3 * 3 * 10
