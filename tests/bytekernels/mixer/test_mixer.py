"""The mixer: its implementations against the float64 reference and against its rooms; its promises."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import MixerStates, dispatch
from bytekernels.mixer import op
from bytekernels.testing import assert_close, ragged, ragged_lengths
from tests.bytekernels.conftest import assert_repeats
from tests.bytekernels.mixer.conftest import (
    NAMES,
    OPTIONS,
    RAGGED,
    SHORT,
    Case,
    assert_agrees,
    make,
    run,
    spare_the_interpreter,
)


@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_agrees_with_the_reference(fast, table):
    lengths = [*SHORT, 5 if table else 65] if fast.interpreted else RAGGED
    assert_agrees(fast.name, make(fast, lengths, table=table))


@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_agrees_with_the_reference_in_ragged_shapes(fast, table):
    spare_the_interpreter(fast)

    @settings(max_examples=15)
    @given(lengths=ragged_lengths(around=8), options=st.sets(st.sampled_from(OPTIONS)), seed=st.integers(0, 9))
    def agree(lengths, options, seed):
        assert_agrees(fast.name, make(fast, lengths, table=table, options=options, seed=seed, heads=2, groups=1))

    agree()


@pytest.mark.parametrize("taps", [2, 3])
def test_groups_taps_and_limits(fast, taps):
    assert_agrees(fast.name, make(fast, SHORT, taps=taps, groups=taps - 1), dt_limit=(0.2, 1.5))


@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
@pytest.mark.parametrize("options", [OPTIONS, ()], ids=["all", "none"])
def test_is_its_rooms_bit_for_bit(fast, table, options):
    """So bfloat16 is rounded where the rooms round it."""
    if table or not options:
        spare_the_interpreter(fast)
    for dtype in fast.dtypes:
        case = make(fast, SHORT if fast.interpreted else RAGGED, dtype, table=table, options=options)
        with fast.force():
            found = run(case)
        with dispatch.force("triton" if fast.name == "triton" else None):
            expected = run(case, Case.by_rooms)
        for name, value in expected.items():
            if table and name == "dzxbcdt" and dtype != torch.float32:  # a sum by byte, of other parts at a time
                assert_close(found[name], value, limit=5e-3, what=name)
            else:
                assert torch.equal(found[name], value), (dtype, name)


@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_chunks_are_the_recurrence(table):
    assert_agrees("chunked", Case(RAGGED, table=table), dt_limit=(0.1, 2.0))


def test_what_the_extension_lacks_is_served_by_the_chunks():
    assert_agrees(None, Case(SHORT, torch.float32, taps=5))
    assert_agrees(None, Case(SHORT, torch.float32, taps=1))
    found = run(Case(SHORT, torch.float16))
    assert found["out"].dtype == torch.float16 and found["final ssm"].dtype == torch.float32
    with dispatch.force("native"), pytest.raises(RuntimeError, match="conv_weight must have 2 to 4 taps, got 5"):
        Case(SHORT, torch.float32, taps=5).mix()
    with dispatch.force("native"), pytest.raises(RuntimeError, match="zxbcdt must be float32 or bfloat16, got torch.f"):
        Case(SHORT).mix()


@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_gradcheck(table):
    case = Case([2, 0, 3], table=table, heads=2, head_dim=2, d_state=2, groups=1, taps=3).leaves()
    if table:
        case.ids %= 3
    names = list(case.values)
    tensors = [value[:3].detach() if table and n == "zxbcdt" else value for n, value in case.values.items()]

    def call(*values):
        given = dict(zip(names, values, strict=True))
        if table:
            given["zxbcdt"] = torch.cat([given["zxbcdt"], given["zxbcdt"].new_zeros(253, given["zxbcdt"].shape[1])])
        return case.of(given).mix()

    with dispatch.force("reference"):
        assert torch.autograd.gradcheck(call, [tensor.requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_at_all(fast, lengths):
    for table in (False, True):
        if table and fast.interpreted and len(lengths) < 2:
            continue  # each gradient of a table costs the interpreter 512 programs
        case = make(fast, lengths, table=table)
        with fast.force():
            found = run(case)
        assert found["out"].shape == (0, len(case.values["norm_weight"]))
        assert torch.equal(found["final conv"], case.values["conv"])
        assert torch.equal(found["final ssm"], case.values["ssm"])
        assert not found["dzxbcdt"].any() and not found["dA"].any() and not found["dnorm_weight"].any()


@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_packed_is_one_by_one_bit_for_bit(fast, table):
    if table:
        spare_the_interpreter(fast)
    lengths = [5, 0, 9] if fast.interpreted else RAGGED
    for dtype in fast.dtypes:
        case = make(fast, lengths, dtype, table=table).leaves()
        shape = sum(lengths), len(case.values["norm_weight"])
        cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(fast.device, dtype)

        def forward_and_backward(case, cotangent):
            names = ["conv", "ssm"] if case.ids is not None else ["zxbcdt", "conv", "ssm"]
            with fast.force():
                out, conv, ssm = case.mix()
                found = torch.autograd.grad(
                    [out, conv, ssm],
                    [case.values[name] for name in names],
                    [cotangent, torch.ones_like(conv), torch.ones_like(ssm)],
                )
            return [out, *found[:-2]], [conv, ssm, *found[-2:]]

        rows, states = forward_and_backward(case, cotangent)
        for s, length in enumerate(lengths):
            own = slice(*case.cu_seqlens[s : s + 2].tolist())
            part = {n: v.detach()[s : s + 1] if n in ("conv", "ssm") else v.detach() for n, v in case.values.items()}
            if not table:
                part["zxbcdt"] = part["zxbcdt"][own]
            alone = case.of(part).leaves()
            alone.cu_seqlens = ragged([length])[0].to(fast.device)
            alone.ids = None if case.ids is None else case.ids[own]
            rows_alone, states_alone = forward_and_backward(alone, cotangent[own])
            for one, all_ in zip(rows_alone, rows, strict=True):
                assert torch.equal(one, all_[own]), (dtype, s)
            for one, all_ in zip(states_alone, states, strict=True):
                assert torch.equal(one, all_[s : s + 1]), (dtype, s)


@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_threads_and_reruns_change_no_bit(fast, table):
    if table:
        spare_the_interpreter(fast)
    for lengths in [[0, 3, 5]] if fast.interpreted else [RAGGED, [300]]:
        case = make(fast, lengths, table=table)
        with fast.force():
            assert_repeats(fast, lambda case=case: run(case).values())


@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_a_split_sequence_continues_from_its_states(fast, table):
    case = make(fast, [30, 41], table=table)
    parts = []
    with fast.force():
        whole = case.mix()
        for pieces in ([slice(0, 2), slice(30, 50)], [slice(2, 30), slice(50, 71)]):
            values = {**case.values}
            if not table:
                values["zxbcdt"] = torch.cat([case.values["zxbcdt"][piece] for piece in pieces])
            if parts:
                values["conv"], values["ssm"] = parts[-1][1:]
            part = case.of(values)
            part.ids = None if case.ids is None else torch.cat([case.ids[piece] for piece in pieces])
            part.cu_seqlens = ragged([piece.stop - piece.start for piece in pieces])[0].to(fast.device)
            parts.append(part.mix())
    first, second = (part[0] for part in parts)
    assert_close(torch.cat([first[:2], second[:28], first[2:], second[28:]]), whole[0].double())
    for found, expected in zip(parts[1][1:], whole[1:], strict=True):
        assert_close(found, expected.double())


def test_columns_of_a_wider_tensor(fast):
    case = make(fast, SHORT)
    wider = torch.cat([case.values["zxbcdt"], torch.full_like(case.values["zxbcdt"][:, :3], torch.nan)], 1)
    with fast.force():
        dense, strided = case.mix(), case.of({**case.values, "zxbcdt": wider[:, :-3]}).mix()
    assert all(torch.equal(one, other) for one, other in zip(strided, dense, strict=True))


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2)], ids=lambda which: " and ".join(NAMES[i] for i in which))
def test_some_outputs_alone_get_gradients(fast, which):
    case = make(fast, [5] if fast.interpreted else SHORT)
    names = [name for name in case.values if not (0 not in which and name == "norm_weight")]

    def call(dtype):
        leaves = case.leaves(dtype)
        outputs = [leaves.mix()[i].sum() for i in which]
        return torch.autograd.grad(outputs, [leaves.values[name] for name in names], allow_unused=True)

    with fast.force():
        found = call(torch.float32)
    with dispatch.force("reference"):
        expected = call(torch.float64)
    for name, got, want in zip(names, found, expected, strict=True):
        assert_close(got, want, what=name)


@pytest.mark.parametrize("options", [OPTIONS, ()], ids=["all", "none"])
@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
@pytest.mark.parametrize("impl", ["native", "chunked", "reference"])
def test_opcheck(impl, table, options):
    case = Case([3, 0, 5], torch.float32, table=table, options=options).leaves()
    states = case.values.get("conv"), case.values.get("ssm")
    arguments = (case.values["zxbcdt"], *case.weights, case.cu_seqlens, 4, 2, 1e-5, 0.0, 9.0, case.ids, *states)
    with dispatch.force(impl):
        torch.library.opcheck(op.mamba2_mixer_op, arguments)


@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_backward_opcheck(table):
    case = Case([3, 0, 5], torch.float32, table=table)
    states = case.values["conv"], case.values["ssm"]
    arguments = (case.values["zxbcdt"], *case.weights, case.cu_seqlens, 4, 2, 1e-5, 0.0, 9.0, case.ids, *states)
    with dispatch.force("native"):
        out, y, conved, *_ = op.mamba2_mixer_op(*arguments)
        torch.library.opcheck(
            op.mamba2_mixer_backward_op, (torch.ones_like(out), None, states[1], y, conved, *arguments)
        )


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("zxbcdt", torch.zeros(5, 47), ValueError, "zxbcdt must have shape [T, W] with W = H*P + C + H = 48, got [5,"),
        ("zxbcdt", torch.zeros(5, 48).int(), TypeError, "zxbcdt must have a floating dtype, got torch.int32"),
        ("norm_weight", torch.zeros(18), ValueError, "shape [H*P] with P = head_dim = 4 >= 1, got [18]"),
        ("A", torch.zeros(3), ValueError, "A must have shape [H] = [4], got [3]"),
        ("D", torch.zeros(4, 4), ValueError, "D must have shape [H] = [4], got [4, 4]"),
        ("dt_bias", torch.zeros(5), ValueError, "dt_bias must have shape [H] = [4], got [5]"),
        ("conv_weight", torch.zeros(30, 4), ValueError, "C = H*P + 2*G*N = 16 + 4 N rows with N >= 1, got 30"),
        ("conv_weight", torch.zeros(16, 4), ValueError, "C = H*P + 2*G*N = 16 + 4 N rows with N >= 1, got 16"),
        ("conv_weight", torch.zeros(28), ValueError, "conv_weight must have shape [C, K] with K >= 1, got [28]"),
        ("conv_bias", torch.zeros(27), ValueError, "conv_bias must have shape [C] = [28], got [27]"),
        ("num_groups", 3, ValueError, "num_groups must divide the 4 heads, got 3"),
        ("dt_limit", (1.0, 0.5), ValueError, "0 <= least <= greatest, got (1.0, 0.5)"),
        ("cu_seqlens", torch.tensor([0, 5]), TypeError, "cu_seqlens must be int32"),
        ("cu_seqlens", torch.tensor([0, 6]).int(), ValueError, "cu_seqlens must start at 0 and end at 5"),
        ("ids", torch.zeros(5).long(), TypeError, "ids must be uint8, one byte a row, got torch.int64"),
        ("ids", torch.zeros(5, 1).byte(), ValueError, "ids must have shape [T], got [5, 1]"),
        ("ids", torch.zeros(5).byte(), ValueError, "zxbcdt must have shape [256, W] with ids, a row a byte, got [5, 4"),
        (
            "initial_states",
            MixerStates(torch.zeros(2, 28, 4), torch.zeros(2, 4, 4, 3)),
            ValueError,
            "initial_states.conv must have shape [S, C, K-1] = [2, 28, 3], got [2, 28, 4]",
        ),
        (
            "initial_states",
            MixerStates(torch.zeros(2, 28, 3), torch.zeros(1, 4, 4, 3)),
            ValueError,
            "initial_states.ssm must have shape [S, H, P, N] = [2, 4, 4, 3], got [1, 4, 4, 3]",
        ),
    ],
)
def test_what_the_mixer_refuses(name, value, error, message):
    case = Case([2, 3], torch.float32)
    names = ("zxbcdt", "conv_weight", "conv_bias", "A", "D", "dt_bias", "norm_weight")
    arguments = {n: case.values[n] for n in names}
    arguments |= {"cu_seqlens": case.cu_seqlens, **case.keywords, name: value}
    with pytest.raises(error, match=re.escape(message)):
        bytekernels.mamba2_mixer(**arguments)
