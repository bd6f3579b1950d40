"""The mixer: its implementations against the float64 reference and against its rooms; its promises; its steps."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import _C, MixerState, MixerStates, dispatch, extension
from bytekernels.mixer import op
from bytekernels.testing import assert_close, poisoned_memory, ragged, ragged_lengths
from tests.bytekernels.conftest import FAST, NATIVE, Fast, assert_repeats

OPTIONS = ("conv_bias", "D", "dt_bias", "states")
RAGGED = [0, 1, 3, 4, 63, 0, 64, 65]
SHORT = [0, 1, 3, 4, 0, 5]
SIZES = dict(heads=4, head_dim=4, d_state=3, groups=2, taps=4)


@pytest.fixture(autouse=True, scope="module")
def poison():
    with poisoned_memory():
        yield


class Case:
    """Inputs by name, the first parameters of mamba2_mixer, and its sizes."""

    def __init__(
        self, lengths, dtype=torch.float64, *, table=False, options=OPTIONS, device="cpu", seed=0, **sizes
    ) -> None:
        self.sizes = {**SIZES, **sizes}
        heads, head_dim, d_state, groups, taps = self.sizes.values()
        self.cu_seqlens, total = ragged(lengths)
        self.cu_seqlens = self.cu_seqlens.to(device)
        generator = torch.Generator().manual_seed(seed)
        inner, channels = heads * head_dim, heads * head_dim + 2 * groups * d_state
        ids = torch.randint(0, 256, (total,), generator=generator, dtype=torch.uint8)
        self.ids = ids.to(device) if table else None
        shapes = {
            "zxbcdt": (256 if table else total, inner + channels + heads),
            "conv_weight": (channels, taps),
            "conv_bias": (channels,),
            "A": (heads,),
            "D": (heads,),
            "dt_bias": (heads,),
            "norm_weight": (inner,),
            "conv": (len(lengths), channels, taps - 1),
            "ssm": (len(lengths), heads, head_dim, d_state),
        }
        values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        values["A"] = -4 * torch.rand(heads, generator=generator, dtype=torch.float64)
        wide = torch.promote_types(dtype, torch.float32)
        self.values = {
            name: value.to(device, dtype if name in ("zxbcdt", "conv") else wide)
            for name, value in values.items()
            if name not in OPTIONS or name in options
        }
        if "states" not in options:
            del self.values["conv"], self.values["ssm"]

    def of(self, values):
        """The same case with other values."""
        other = object.__new__(Case)
        other.__dict__ = {**self.__dict__, "values": values}
        return other

    def leaves(self, dtype=None):
        return self.of({n: v.detach().to(dtype or v.dtype).clone().requires_grad_() for n, v in self.values.items()})

    @property
    def weights(self):
        names = ("conv_weight", "conv_bias", "A", "D", "dt_bias", "norm_weight")
        return [self.values.get(name) for name in names]

    @property
    def keywords(self):
        return dict(head_dim=self.sizes["head_dim"], num_groups=self.sizes["groups"])

    def mix(self, **options):
        states = MixerStates(self.values["conv"], self.values["ssm"]) if "conv" in self.values else None
        out, final = bytekernels.mamba2_mixer(
            self.values["zxbcdt"],
            *self.weights,
            self.cu_seqlens,
            **self.keywords,
            ids=self.ids,
            initial_states=states,
            return_final_states=True,
            **options,
        )
        return out, *final

    def by_rooms(self):
        """The same from the rooms' public functions."""
        values, inner = self.values, self.values["norm_weight"].shape[0]
        conv_weight, conv_bias, A, D, dt_bias, norm_weight = self.weights
        rows = values["zxbcdt"] if self.ids is None else bytekernels.byte_table(self.ids, values["zxbcdt"])
        z, xbc, dt = rows.split([inner, len(conv_weight), len(A)], 1)
        xbc, final_conv = bytekernels.causal_conv1d(
            xbc,
            conv_weight,
            conv_bias,
            self.cu_seqlens,
            initial_states=values.get("conv"),
            return_final_states=True,
        )
        groups, shared = self.sizes["groups"], self.sizes["groups"] * self.sizes["d_state"]
        x, B, C = xbc.split([inner, shared, shared], 1)
        y, final_ssm = bytekernels.ssd_scan(
            x.unflatten(1, (len(A), -1)),
            dt,
            A,
            B.unflatten(1, (groups, -1)),
            C.unflatten(1, (groups, -1)),
            self.cu_seqlens,
            D=D,
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_states=values.get("ssm"),
            return_final_states=True,
        )
        out = bytekernels.gated_rms_norm(y.flatten(1), z, norm_weight, inner // groups)
        return out, final_conv, final_ssm


def spare_the_interpreter(fast) -> None:
    """Leave out what the rooms' own tests show of their kernels."""
    if fast.interpreted:
        pytest.skip("each program costs the interpreter milliseconds")


NAMES = ("out", "final conv", "final ssm")


def make(fast, lengths, dtype=torch.float32, **settings):
    """A case on the implementation's device; of two heads for the interpreter."""
    small = dict(heads=2, groups=1) if fast.interpreted else {}
    return Case(lengths, dtype, device=fast.device, **{**small, **settings})


def run(case, function=Case.mix, dtype=None, **options):
    """Outputs and gradients by name, with cotangents that are the same for each dtype."""
    case = case.leaves(dtype)
    outputs = function(case, **options)
    generator = torch.Generator().manual_seed(1)
    cotangents = []
    for output in outputs:
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        cotangents.append(cotangent.bfloat16().to(output.device, output.dtype))
    found = torch.autograd.grad(outputs, list(case.values.values()), cotangents)
    return dict(zip((*NAMES, *(f"d{name}" for name in case.values)), (*outputs, *found), strict=True))


def compare(impl, case, truth="reference", **options):
    """``impl`` against ``truth`` on the same values in float64: outputs, states and every gradient."""
    with dispatch.force(impl):
        found = run(case, **options)
    with dispatch.force(truth):
        expected = run(case, dtype=torch.float64, **options)
    for name, value in expected.items():
        assert_close(found[name], value, what=name)


@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_agrees_with_the_reference(fast, table):
    lengths = [*SHORT, 5 if table else 65] if fast.interpreted else RAGGED
    compare(fast.name, make(fast, lengths, table=table))


@pytest.mark.parametrize("table", [False, True], ids=["rows", "table"])
def test_agrees_with_the_reference_in_ragged_shapes(fast, table):
    spare_the_interpreter(fast)

    @settings(max_examples=15)
    @given(lengths=ragged_lengths(around=8), options=st.sets(st.sampled_from(OPTIONS)), seed=st.integers(0, 9))
    def agree(lengths, options, seed):
        compare(fast.name, make(fast, lengths, table=table, options=options, seed=seed, heads=2, groups=1))

    agree()


@pytest.mark.parametrize("taps", [2, 3])
def test_groups_taps_and_limits(fast, taps):
    compare(fast.name, make(fast, SHORT, taps=taps, groups=taps - 1), dt_limit=(0.2, 1.5))


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
    compare("chunked", Case(RAGGED, table=table), dt_limit=(0.1, 2.0))


def test_what_the_extension_lacks_is_served_by_the_chunks():
    compare(None, Case(SHORT, torch.float32, taps=5))
    compare(None, Case(SHORT, torch.float32, taps=1))
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
    arguments = (case.values["zxbcdt"], *case.weights, *states, 4, 2, 1e-5, 0.0, 9.0)
    torch.library.opcheck(op.mamba2_mixer_step_op, arguments)


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
