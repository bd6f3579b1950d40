"""The convolution's fast implementations against the float64 reference; their bits alone, packed and run again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import dispatch
from bytekernels.conv import bytes as bytes_op
from bytekernels.conv import op
from bytekernels.testing import assert_close, poisoned_memory, ragged, ragged_lengths
from tests.bytekernels.conftest import assert_repeats, far_apart

OPTIONS = ("bias", "initial_states")
SHORT = [0, 9, 1, 3]
RAGGED = [*SHORT, 0, 0, 60, 2]  # beyond one of Triton's tiles of rows
LONG = [*SHORT, 0, 5, 300, 2]  # beyond one of the native code's


def ragged_on(fast):
    """Lengths of which one is longer than a tile."""
    return LONG if fast.name == "native" else RAGGED


def make(fast, lengths, channels=6, taps=4, dtype=torch.float32, options=OPTIONS, seed=0):
    """x, weight and the options on the implementation's device; weights are float32."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, dtype=torch.float32):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(fast.device, dtype).requires_grad_()

    x, weight, bias = leaf(sum(lengths), channels, dtype=dtype), leaf(channels, taps), leaf(channels)
    leaves = {"x": x, "weight": weight, "bias": bias}
    leaves["initial_states"] = leaf(len(lengths), channels, taps - 1, dtype=dtype)
    return {name: value for name, value in leaves.items() if name not in OPTIONS or name in options}


def conv(leaves, lengths, silu=True):
    """y and the final states."""
    cu = ragged(lengths)[0].to(leaves["x"].device)
    activation = "silu" if silu else None
    return bytekernels.causal_conv1d(
        **{"bias": None, **leaves}, cu_seqlens=cu, activation=activation, return_final_states=True
    )


def cotangents(outputs, dtype):
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs]
    return [value.to(dtype).to(output) for value, output in zip(values, outputs, strict=True)]


def call(leaves, lengths, silu=True):
    """Outputs, then the gradients of all leaves."""
    outputs = conv(leaves, lengths, silu)
    dtype = leaves["x"].dtype if leaves["x"].dtype != torch.float64 else torch.float32
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents(outputs, dtype))]


def check(fast, leaves, lengths, silu=True):
    """Outputs and gradients against the reference on the same values in float64."""
    dtype = leaves["x"].dtype
    with fast.force(), poisoned_memory():
        found = call(leaves, lengths, silu)
    truths = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    with dispatch.force("reference"):
        outputs = conv(truths, lengths, silu)
        wanted = [*outputs, *torch.autograd.grad(outputs, list(truths.values()), cotangents(outputs, dtype))]
    names = ("y", "final_states", *(f"d{name}" for name in leaves))
    for name, got, want in zip(names, found, wanted, strict=True):
        assert_close(got, want, what=name)


def test_agrees_with_the_reference(fast):
    @settings(max_examples=fast.examples // 2)
    @given(
        lengths=ragged_lengths(around=4),
        channels=st.sampled_from([3, 40]),
        taps=st.integers(2, 4),
        options=st.sets(st.sampled_from(OPTIONS)),
        silu=st.booleans(),
        seed=st.integers(0, 9),
    )
    def agree(lengths, channels, taps, options, silu, seed):
        check(fast, make(fast, lengths, channels, taps, options=options, seed=seed), lengths, silu)

    agree()


def test_sequences_about_tiles_and_beyond_them(fast):
    """Tiles have 64 rows in Triton and 256 in native code."""
    packs = [[0, 1, 3, 4, 63, 64, 65, 0, 1000, 2]]
    if not fast.interpreted:
        packs += [[254, 300, 1], [255, 256, 257], [256, 2, 1], [1030]]
    for lengths in packs:
        check(fast, make(fast, lengths), lengths)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 33, 130, 521])
def test_any_width(fast, channels, taps):
    """Of every dtype. A program of Triton's has 128 channels at the most."""
    if fast.interpreted and channels == 521:
        pytest.skip("no more than 130 channels show")
    lengths = [9, 0, 3] if fast.interpreted else LONG
    for dtype in fast.dtypes:
        check(fast, make(fast, lengths, channels, taps, dtype=dtype), lengths)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_at_all(fast, lengths):
    leaves = make(fast, lengths)
    check(fast, leaves, lengths)
    with fast.force():
        assert torch.equal(conv(leaves, lengths)[1], leaves["initial_states"])


def test_columns_of_wider_rows(fast):
    leaves = make(fast, SHORT, channels=20)
    wide = torch.cat([torch.full_like(leaves["x"], float("nan")), leaves["x"], leaves["x"]], 1).detach()
    strided = {**leaves, "x": wide[:, 20:40].requires_grad_()}
    assert not strided["x"].is_contiguous()
    with fast.force():
        for got, want in zip(call(strided, SHORT), call(leaves, SHORT), strict=True):
            assert torch.equal(got, want)


def test_a_split_sequence_continues_from_its_state(fast):
    leaves = make(fast, [20])
    with fast.force():
        whole, last = conv(leaves, [20])
        for cut in (1, 2, 13):
            first, state = conv({**leaves, "x": leaves["x"][:cut]}, [cut])
            second, end = conv({**leaves, "x": leaves["x"][cut:], "initial_states": state}, [20 - cut])
            assert torch.equal(torch.cat([first, second]), whole)
            assert torch.equal(end, last)


@pytest.mark.parametrize("options", [OPTIONS, ()], ids=["all", "bare"])
def test_packed_is_one_by_one_bit_for_bit(fast, options):
    names = [name for name in ("x", "initial_states") if name == "x" or name in options]
    lengths = ragged_on(fast)
    for dtype in fast.dtypes:
        leaves = make(fast, lengths, 20, dtype=dtype, options=options)
        with fast.force():
            outputs = conv(leaves, lengths)
            cotangent = cotangents(outputs, dtype)
            packed = [*outputs, *torch.autograd.grad(outputs, [leaves[name] for name in names], cotangent)]
        cu = ragged(lengths)[0].tolist()
        for s, length in enumerate(lengths):
            rows, own = slice(cu[s], cu[s + 1]), slice(s, s + 1)
            places = {"x": rows, "initial_states": own}
            part = {name: leaf.detach()[places.get(name, slice(None))] for name, leaf in leaves.items()}
            part = {name: value.requires_grad_() for name, value in part.items()}
            with fast.force():
                outputs = conv(part, [length])
                given_back = [cotangent[0][rows], cotangent[1][own]]
                alone = [*outputs, *torch.autograd.grad(outputs, [part[name] for name in names], given_back)]
            for got, want, place in zip(alone, packed, (rows, own, rows, own), strict=False):
                assert torch.equal(got, want[place]), s


def test_threads_and_reruns_change_no_bit(fast):
    packs = [(RAGGED, 20)] if fast.interpreted else [(LONG, 600), ([700], 600)]
    for lengths, channels in packs:
        for dtype in fast.dtypes:
            leaves = make(fast, lengths, channels, dtype=dtype)
            with fast.force():
                assert_repeats(fast, lambda leaves=leaves, lengths=lengths: call(leaves, lengths))


def test_gradients_where_they_are_wanted(in_triton):
    """The rows' gradient written between other columns."""
    from bytekernels.conv import triton as kernels

    fast = in_triton
    leaves = {name: leaf.detach() for name, leaf in make(fast, SHORT, 20).items()}
    cu = ragged(SHORT)[0].to(fast.device)
    rest = leaves["weight"], leaves["bias"], cu, True, leaves["initial_states"]
    dy, dfinal = torch.randn_like(leaves["x"]), torch.randn_like(leaves["initial_states"])
    wide = torch.full((len(dy), 60), 7.0, device=fast.device)
    got = kernels.causal_conv1d_backward(dy, dfinal, leaves["x"], *rest, dx=wide[:, 20:40])
    assert got[0].data_ptr() == wide[:, 20:40].data_ptr()
    wide_dy = torch.cat([dy, dy], 1)[:, 20:]
    for one, other in zip(got, kernels.causal_conv1d_backward(wide_dy, dfinal, leaves["x"], *rest), strict=True):
        assert torch.equal(one, other)
    assert (wide[:, :20] == 7).all() and (wide[:, 40:] == 7).all()


def test_rows_more_than_two_billion_elements_apart(fast, tmp_path):
    rows = 4
    leaves = make(fast, [rows], 20)
    far = far_apart(leaves["x"], tmp_path / "rows")
    with fast.force():
        want = call(leaves, [rows])
        got = call({**leaves, "x": far.requires_grad_()}, [rows])
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    if fast.name == "triton":
        from bytekernels.conv import triton as kernels

        arguments = leaves["weight"], leaves["bias"], ragged([rows])[0].to(fast.device), True, leaves["initial_states"]
        x, dy, dfinal = leaves["x"].detach(), *cotangents(want[:2], torch.float32)
        far.detach().copy_(dy)
        dx, *_ = kernels.causal_conv1d_backward(far.detach(), dfinal, x, *arguments, dx=far.detach())
        assert torch.equal(dx, want[2])


def test_opcheck(fast):
    lengths = [2, 0, 5]
    values = make(fast, lengths, 4)
    x, weight, bias, initial = values.values()
    cu = ragged(lengths)[0].to(fast.device)
    ids = torch.tensor([0, 255, 7, 7, 9, 1, 0], dtype=torch.uint8, device=fast.device)
    table = torch.randn(256, 4, device=fast.device, requires_grad=True)
    forward_alone = dict(test_utils=("test_schema", "test_faketensor"))  # the backward ops have no gradients
    of_bytes = forward_alone if fast.interpreted else {}  # each gradient costs the interpreter 512 programs
    with fast.force():
        torch.library.opcheck(op.causal_conv1d_op, (x, weight, bias, cu, True, initial))
        torch.library.opcheck(op.causal_conv1d_op, (x, weight, None, cu, False, None), **forward_alone)
        inputs = [value.detach() for value in (x, initial, x, weight, bias)]
        inputs += [cu, True, initial.detach()]
        torch.library.opcheck(op.causal_conv1d_backward_op, tuple(inputs), **forward_alone)
        torch.library.opcheck(bytes_op.byte_conv1d_op, (ids, table, weight, bias, cu, True), **of_bytes)
        inputs = [value.detach() for value in (table[ids.long()], ids, table, weight, bias)]
        torch.library.opcheck(bytes_op.byte_conv1d_backward_op, (*inputs, cu, True), **forward_alone)


@pytest.mark.parametrize("taps", [1, 5])
def test_other_numbers_of_taps_are_left_to_the_reference(fast, taps):
    leaves = make(fast, [3], taps=taps)
    with fast.force(), pytest.raises(RuntimeError, match=f"{fast.name}: weight must have 2 to 4 taps, got {taps}"):
        conv(leaves, [3])
    assert conv(leaves, [3])[0].shape == (3, 6)


@pytest.mark.parametrize("taps", [2, 4])
def test_steps_are_the_convolution(in_triton, taps):
    fast, lengths, channels = in_triton, [4, 4, 4], 20  # x is [3, 4, C] then
    for dtype in fast.dtypes:
        leaves = {name: leaf.detach() for name, leaf in make(fast, lengths, channels, taps, dtype=dtype).items()}
        x = leaves["x"].unflatten(0, (3, 4))
        state = leaves["initial_states"].transpose(1, 2).contiguous().transpose(1, 2)
        with fast.force():
            y, final = conv(leaves, lengths)
            rows = [bytekernels.causal_conv1d_step(x[:, t], state, leaves["weight"], leaves["bias"]) for t in range(4)]
        assert_close(torch.stack(rows, 1).flatten(0, 1), y, dtype=dtype)
        assert torch.equal(state, final)


def bytes_leaves(fast, lengths, channels=20, taps=4, dtype=torch.float32, bias=True):
    leaves = make(fast, lengths, channels, taps, dtype, ("bias",) if bias else ())
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 256, leaves.pop("x").shape[:1], generator=generator, dtype=torch.uint8).to(fast.device)
    table = torch.randn(256, channels, generator=generator).to(fast.device, dtype).requires_grad_()
    return ids, {"table": table, "bias": None, **leaves}


def convolve_bytes(ids, leaves, lengths, silu=True):
    """y, and the gradients of the leaves that are given."""
    cu = ragged(lengths)[0].to(ids.device)
    y = bytekernels.byte_conv1d(ids, **leaves, cu_seqlens=cu, activation="silu" if silu else None)
    inputs = [leaf for leaf in leaves.values() if leaf is not None]
    return [y, *torch.autograd.grad(y, inputs, cotangents([y], torch.bfloat16))]


@pytest.mark.parametrize(("taps", "bias", "silu"), [(4, True, True), (2, False, False)])
def test_bytes_agree_with_the_reference(fast, taps, bias, silu):
    for dtype in fast.dtypes:
        ids, leaves = bytes_leaves(fast, SHORT, taps=taps, dtype=dtype, bias=bias)
        with fast.force(), poisoned_memory():
            found = convolve_bytes(ids, leaves, SHORT, silu)
        truths = {n: None if leaf is None else leaf.detach().double().requires_grad_() for n, leaf in leaves.items()}
        with dispatch.force("reference"):
            wanted = convolve_bytes(ids, truths, SHORT, silu)
        for got, want in zip(found, wanted, strict=True):
            assert_close(got, want)


def test_bytes_are_the_convolution_of_the_gathered_rows(fast):
    cu = ragged(SHORT)[0].to(fast.device)
    for dtype in fast.dtypes:
        ids, leaves = bytes_leaves(fast, SHORT, dtype=dtype)
        table, *rest = (leaf.detach() for leaf in (leaves["table"], leaves["weight"], leaves["bias"]))
        wide = torch.cat([table, table], 1)[:, 20:]
        with fast.force():
            y = bytekernels.causal_conv1d(table[ids.long()], *rest, cu)
            assert torch.equal(bytekernels.byte_conv1d(ids, table, *rest, cu), y)
            assert torch.equal(bytekernels.byte_conv1d(ids, wide, *rest, cu), y)


def test_no_bytes(fast):
    lengths = [0, 0]
    ids, leaves = bytes_leaves(fast, lengths)
    with fast.force():
        y, *gradients = convolve_bytes(ids, leaves, lengths)
    assert y.shape == (0, 20)
    assert not any(gradient.any() for gradient in gradients)


def test_what_the_convolution_of_bytes_refuses(fast):
    ids, leaves = bytes_leaves(fast, [3])
    cu = ragged([3])[0].to(fast.device)
    with pytest.raises(TypeError, match=r"ids must be uint8, one byte a row, got torch\.int64"):
        bytekernels.byte_conv1d(ids.long(), **leaves, cu_seqlens=cu)
    with pytest.raises(ValueError, match="weight must have shape \\[C, K\\] with C = 19"):
        bytekernels.byte_conv1d(ids, **{**leaves, "table": leaves["table"][:, :19]}, cu_seqlens=cu)
    with pytest.raises(TypeError, match=r"cu_seqlens must be int32, got torch\.int64"):
        bytekernels.byte_conv1d(ids, **leaves, cu_seqlens=cu.long())
