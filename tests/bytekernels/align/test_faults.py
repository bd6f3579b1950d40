"""What align_pack refuses, in both implementations, with the same words."""

import re

import numpy as np
import pytest
import torch

from bytekernels import _C, dispatch
from bytekernels.extension import array
from tests.bytekernels.align.conftest import case_of

IMPLEMENTATIONS = ["native", "reference"]
MOST = 2**63 - 1


def refuses(error, message):
    return pytest.raises(error, match=re.escape(message))


def a_case(dtype=np.uint16):
    return case_of([2, 1, 3, 4], [(0, 2), (2, 4)], dtype=dtype)  # 10 bytes, 4 tokens


def with_span(s, *span):
    case = a_case()
    spans = case.spans.copy()
    spans[s] = span
    return case.but(spans=spans)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("span", "message"),
    [
        ((-1, 3, 0, 2), "spans[1] has first_byte -1: give what is at least 0"),
        ((0, -3, 0, 2), "spans[1] has bytes -3: give what is at least 0"),
        ((0, 3, -(2**63), 2), f"spans[1] has first_token {-(2**63)}: give what is at least 0"),
        ((0, 3, 0, -2), "spans[1] has tokens -2: give what is at least 0"),
        ((8, 3, 0, 2), "spans[1] has first_byte 8 and bytes 3, but text holds 10: let each span end within it"),
        ((11, 0, 0, 0), "spans[1] has first_byte 11 and bytes 0, but text holds 10: let each span end within it"),
        ((0, MOST, 0, 2), f"spans[1] has first_byte 0 and bytes {MOST}, but text holds 10"),
        ((MOST, MOST, 0, 2), f"spans[1] has first_byte {MOST} and bytes {MOST}, but text holds 10"),
        ((0, 3, 3, 2), "spans[1] has first_token 3 and tokens 2, but token_ids holds 4: let each span end within it"),
        ((0, 3, MOST, 1), f"spans[1] has first_token {MOST} and tokens 1, but token_ids holds 4"),
        ((0, 3, 1, MOST), f"spans[1] has first_token 1 and tokens {MOST}, but token_ids holds 4"),
        ((0, 4, 0, 2), "token_lengths of spans[1] sum to 3, but it has 4 bytes: cut spans at token ends"),
        ((0, 2, 0, 2), "token_lengths of spans[1] sum to 3, but it has 2 bytes"),
        ((0, 0, 0, 1), "token_lengths of spans[1] sum to 2, but it has 0 bytes"),
        ((0, 1, 0, 0), "token_lengths of spans[1] sum to 0, but it has 1 bytes"),
    ],
)
def test_spans(impl, span, message):
    with dispatch.force(impl), refuses(ValueError, message):
        with_span(1, *span).pack()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_token_lengths(impl, dtype):
    def with_lengths(*lengths):
        return a_case(dtype).but(token_lengths=np.array(lengths, dtype=dtype))

    fix = "every token covers at least one byte, so leave out those that cover none"
    with dispatch.force(impl):
        for lengths in ([2, 1, 0, 7], [2, 1, 0, 9]):
            with refuses(ValueError, f"token_lengths[2] is 0 (spans[1]): {fix}"):
                with_lengths(*lengths).pack()
        with refuses(ValueError, "token_lengths[3] is 0 (spans[1])"):
            with_lengths(2, 1, 7, 0).pack()
        with refuses(ValueError, "token_lengths[3] is 0 (spans[1])"):
            with_lengths(2, 1, 9, 0).pack()
        with refuses(ValueError, "token_lengths of spans[0] sum to 5, but it has 3 bytes"):
            with_lengths(2, 3, 0, 0).pack()  # the first sequence that has a fault
        with refuses(ValueError, "token_lengths of spans[1] sum to 65539, but it has 7 bytes"):
            with_lengths(2, 1, 65535, 4).pack()
        if dtype == np.int32:
            for bad in (-1, -(2**31)):
                with refuses(ValueError, f"token_lengths[2] is {bad} (spans[1]): {fix}"):
                    with_lengths(2, 1, bad, 8).pack()
            with refuses(ValueError, f"token_lengths of spans[1] sum to {2**32 - 2}, but it has 7 bytes"):
                with_lengths(2, 1, 2**31 - 1, 2**31 - 1).pack()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_first_fault_of_many_threads(impl):
    lengths = np.full(200_000, 5, dtype=np.uint16)
    case = case_of(lengths, [(1000 * s, 1000 * s + 1000) for s in range(200)])
    lengths = lengths.copy()
    lengths[[63_007, 63_008, 150_000]] = 0, 9, 0
    with dispatch.force(impl), refuses(ValueError, "token_lengths[63007] is 0 (spans[63])"):
        case.but(token_lengths=lengths).pack(threads=8)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_eos_needs_its_token(impl):
    case = a_case()
    with dispatch.force(impl):
        with refuses(ValueError, "ends[1] is true, but eos_id is None: give the id of the token at EOS"):
            case.pack(eos_id=None, ends=np.array([False, True]))
        none = case.pack(eos_id=None, ends=np.array([False, False]))
        assert torch.equal(none.ids, case.pack(eos_id=None).ids)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_totals_that_int32_does_not_count(impl):
    """Refused before anything is allocated. Nothing reads the zeros, which therefore take no memory."""
    nothing = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.uint16)
    bytes_only = np.array([[0, 2**30, 0, 0]] * 3)
    case = case_of([], []).but(text=np.zeros(2**30, dtype=np.uint8), spans=bytes_only)
    case = case.but(token_ids=nothing[0], token_lengths=nothing[1])
    fix = "from spans[1] on: pack them in several batches"
    with dispatch.force(impl):
        with refuses(ValueError, f"spans hold more than 2^31 - 1 bytes with BOS and EOS, the most that int32 {'cu_'}"):
            case.pack()
        with refuses(ValueError, fix):
            case.pack()
        count = 2**28
        tokens_only = np.array([[0, 0, 0, count]] * 9)
        case = case_of([], []).but(spans=tokens_only, token_ids=np.zeros(count, dtype=np.int32))
        case = case.but(token_lengths=np.zeros(count, dtype=np.uint16))
        message = (
            "spans hold more than 2^31 - 1 tokens with BOS and EOS, the most that int32 token_cu counts, "
            "from spans[7] on: pack them in several batches"
        )
        with refuses(ValueError, message):
            case.pack()


def test_arguments():
    case = a_case()
    ends = np.array([True, False])
    for changes, error, message in [
        ({"text": case.text.astype(np.int8)}, TypeError, "text must be uint8, got int8: use text.astype('uint8')"),
        ({"text": case.text.tobytes()}, TypeError, "text must be a NumPy array or a CPU tensor of uint8, got bytes"),
        ({"text": torch.zeros(10)}, TypeError, "text must be uint8, got torch.float32: use text.to(torch.uint8)"),
        ({"text": torch.zeros(10, dtype=torch.uint8, device="meta")}, ValueError, "text must be on the CPU, got meta"),
        ({"text": case.text.reshape(2, 5)}, ValueError, "text must have shape [N], got [2, 5]"),
        ({"text": case.text[::2]}, ValueError, "text must be contiguous and aligned, got strides (2,) for shape [5]"),
        ({"token_ids": case.token_ids.astype(np.int64)}, TypeError, "use token_ids.astype('int32')"),
        ({"token_ids": case.token_ids.astype(">i4")}, TypeError, "token_ids must be int32, got >i4"),
        ({"token_ids": case.token_ids[:3]}, ValueError, "a length for each of the 3 token_ids, got 4"),
        (
            {"token_lengths": case.token_lengths.astype(np.int64)},
            TypeError,
            "token_lengths must be uint16 or int32, got int64: use token_lengths.astype('int32')",
        ),
        ({"token_lengths": case.token_lengths[:, None]}, ValueError, "token_lengths must have shape [n], got [4, 1]"),
        ({"spans": case.spans.astype(np.int32)}, TypeError, "spans must be int64, got int32"),
        ({"spans": case.spans[:, :3].copy()}, ValueError, "spans must have shape [S, 4], columns first_byte, bytes"),
        ({"spans": case.spans[0]}, ValueError, "spans must have shape [S, 4], got [4]"),
        ({"spans": np.asfortranarray(case.spans)}, ValueError, "copy it with np.array(spans, order='C')"),
        ({"spans": torch.from_numpy(case.spans).T.contiguous().T}, ValueError, "spans must be contiguous"),
        ({"ends": ends[:1]}, ValueError, "ends must have a flag for each of the 2 spans, got 1"),
        ({"ends": ends.astype(np.uint8)}, TypeError, "ends must be bool, got uint8"),
        ({"ends": [True, False]}, TypeError, "ends must be a NumPy array or a CPU tensor of bool, got list"),
    ]:
        with refuses(error, message):
            case.but(**changes).pack()
    for options, error, message in [
        ({"bos": 256}, ValueError, "bos must be in [0, 255], got 256"),
        ({"bos": -1}, ValueError, "bos must be in [0, 255], got -1"),
        ({"eos": 1000}, ValueError, "eos must be in [0, 255], got 1000"),
        ({"bos": b"\xfe"}, TypeError, "bos must be an integer, got b'\\xfe'"),
        ({"bos": None}, TypeError, "bos must be an integer, got None"),
        ({"bos_id": -1}, ValueError, "bos_id must be in [0, 2147483647], got -1"),
        ({"bos_id": None}, TypeError, "bos_id must be an integer, got None"),
        ({"eos_id": 2**31}, ValueError, "eos_id must be in [0, 2147483647], got 2147483648"),
        ({"eos_id": 1.5}, TypeError, "eos_id must be an integer, got 1.5"),
        ({"threads": 0}, ValueError, "threads must be in [1, 2147483647], got 0"),
        ({"threads": 2.0}, TypeError, "threads must be an integer, got 2.0"),
    ]:
        with refuses(error, message):
            case.pack(**options)


def test_misaligned_memory():
    memory = np.zeros(17, dtype=np.uint8)
    with refuses(ValueError, "token_ids must be contiguous and aligned"):
        a_case().but(token_ids=memory[1:].view(np.int32)).pack()


@pytest.mark.skipif(torch.cuda.is_available(), reason="pins where there is a GPU")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pinning_needs_cuda(impl):
    with dispatch.force(impl), refuses(RuntimeError, "pin=True needs CUDA, which torch does not find here"):
        a_case().pack(pin=True)


def test_the_extension_checks_for_itself():
    case = a_case()
    corpus = array(case.text), array(case.token_ids)
    sizes = [("ids", 12, 1), ("cu_seqlens", 3, 4), ("token_end", 12, 1), ("the batch's token_ids", 6, 8)]
    sizes += [("token_cu", 3, 4), ("targets", 12, 8)]
    outputs = [np.zeros(count * size, dtype=np.uint8) for _, count, size in sizes]

    def call(outputs, bos=0, eos=0, lengths=case.token_lengths, spans=case.spans, ends=None):
        to = tuple(array(values) for values in outputs)
        chosen = array(spans), None if ends is None else array(ends)
        _C.align_pack(True, *corpus, array(lengths), *chosen, 1, 2, bos, eos, to, 1)

    call(outputs)
    for i, (name, count, size) in enumerate(sizes):
        for other in (count - 1, count + 1):
            changed = [*outputs[:i], np.zeros(other * size, dtype=np.uint8), *outputs[i + 1 :]]
            with refuses(ValueError, f"{name} must have {count} elements, got {other}"):
                call(changed)
    with refuses(ValueError, "bos must be a byte in [0, 255], got 256"):
        call(outputs, bos=256)
    with refuses(ValueError, "eos must be a byte in [0, 255], got -1"):
        call(outputs, eos=-1)
    with refuses(ValueError, "token_lengths must have 4 elements, got 3"):
        call(outputs, lengths=case.token_lengths[:3])
    with refuses(ValueError, "spans must have shape [S, 4], got 7 elements"):
        call(outputs, spans=case.spans.reshape(-1)[:7])
    with refuses(ValueError, "ends must have 2 elements, got 1"):
        call(outputs, ends=np.array([True]))


def test_extension_takes_numpy_arrays():
    values = np.arange(6, dtype=np.int32).reshape(2, 3)
    values.flags.writeable = False
    address, size, kept = array(values)
    assert (address, size) == (values.ctypes.data, 24)
    assert kept is values
    with refuses(ValueError, "got strides (4, 12) for shape [3, 2]: use np.ascontiguousarray"):
        array(values.T)
