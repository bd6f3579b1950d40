"""What the packing ops are measured against.

``python`` is :mod:`benchmarks.pack_loops`. ``numpy`` has no such loop: joins, repeats and cumulative sums, and at most
a loop over sequences, of slices. ``eager`` is PyTorch's ops: masks and indices, which run on a GPU too. ``bytekernels``
is the public functions with the implementation that they choose, ``reference`` their specification.

Every function takes its op's arguments by name and returns its outputs by name. Those with an ``out`` write into it
where it is given; an op whose name ends in ``_into`` is the same function with that argument.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bytekernels
from benchmarks import pack_loops, peers
from benchmarks.harness import Function, Provider, Unavailable
from bytekernels import BOS, EOS, IGNORE
from bytekernels.ragged import cu_seqlens_of, lengths_of

OPS = (
    "pack",
    "pack_into",
    "pack_flat",
    "pack_padded",
    "pack_padded_into",
    "unpack",
    "unpack_into",
    "targets",
    "token_ends",
    "row_index",
    "align_pack",
)
PROVIDERS = ("python", "numpy", "eager", "bytekernels", "reference")
ON_REQUEST = ("python", "reference")
Outputs = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------------ NumPy


def numpy_pack(documents: Sequence[bytes], device: torch.device, out: np.ndarray | None = None) -> Outputs:
    lengths = np.fromiter(map(len, documents), dtype=np.int32, count=len(documents))
    ids = np.frombuffer(_joined(documents), dtype=np.uint8)
    if out is not None:
        np.copyto(out, ids)
        ids = out
    return _tensors(ids=ids, cu_seqlens=_offsets(lengths + 1))


def numpy_pack_flat(flat: np.ndarray, offsets: np.ndarray) -> Outputs:
    cu_seqlens = offsets + np.arange(len(offsets), dtype=np.int32)
    return _tensors(ids=np.insert(flat, offsets[:-1], BOS), cu_seqlens=cu_seqlens)


def numpy_unpack(values: np.ndarray, cu_seqlens: np.ndarray, length: int, out: np.ndarray | None = None) -> Outputs:
    shape = (len(cu_seqlens) - 1, length, *values.shape[1:])
    padded = np.empty(shape, values.dtype) if out is None else out
    for row, begin, end in zip(padded, cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        row[: end - begin] = values[begin:end]
        row[end - begin :] = 0
    return _tensors(padded=padded)


def numpy_pack_padded(
    padded: np.ndarray, cu_seqlens: np.ndarray, length: int, out: np.ndarray | None = None
) -> Outputs:
    rows = [row[:count] for row, count in zip(padded, np.diff(cu_seqlens).tolist(), strict=True)]
    return _tensors(values=np.concatenate(rows, out=out))


def numpy_targets(ids: np.ndarray, cu_seqlens: np.ndarray, boundary: np.ndarray) -> Outputs:
    targets = np.empty(len(ids), dtype=np.int64)
    targets[:-1] = np.where(boundary[1:], np.int16(256), np.int16(0)) + ids[1:]
    targets[cu_seqlens[1:][np.diff(cu_seqlens) > 0] - 1] = IGNORE
    return _tensors(targets=targets)


def numpy_token_ends(token_lengths: np.ndarray, token_cu: np.ndarray, cu_seqlens: np.ndarray) -> Outputs:
    bos_before = np.repeat(np.arange(1, len(token_cu), dtype=np.int32), np.diff(token_cu))
    mask = np.zeros(cu_seqlens[-1], dtype=bool)
    mask[np.cumsum(token_lengths, dtype=np.int32) + bos_before - 1] = True
    mask[cu_seqlens[:-1]] = True
    return _tensors(token_end=mask)


def numpy_row_index(cu_seqlens: np.ndarray, total: int) -> Outputs:
    lengths = np.diff(cu_seqlens)
    sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    position = np.arange(total, dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)
    return _tensors(sequence=sequence, position=position)


def numpy_align_pack(
    text: np.ndarray,
    token_ids: np.ndarray,
    token_lengths: np.ndarray,
    spans: np.ndarray,
    ends: np.ndarray,
    bos_id: int,
    eos_id: int,
    device: torch.device,
) -> Outputs:
    def pieces(values: np.ndarray, column: int, first: int, last: int) -> list[np.ndarray]:
        """Of each span the first value, its slice, and the last value where the text ends."""
        first_piece, last_piece = (np.array([value], dtype=values.dtype) for value in (first, last))
        taken = []
        for (begin, count), ends_text in zip(spans[:, column : column + 2].tolist(), ends.tolist(), strict=True):
            taken += [first_piece, values[begin : begin + count]]
            if ends_text:
                taken.append(last_piece)
        return taken

    ids = np.concatenate(pieces(text, 0, BOS, EOS))
    cu_seqlens = _offsets(spans[:, 1] + 1 + ends)
    token_end = np.zeros(len(ids), dtype=bool)
    token_end[np.cumsum(np.concatenate(pieces(token_lengths, 2, 1, 1)), dtype=np.int32) - 1] = True
    return dict(
        **_tensors(
            ids=ids,
            cu_seqlens=cu_seqlens,
            token_end=token_end,
            token_ids=np.concatenate(pieces(token_ids, 2, bos_id, eos_id), dtype=np.int64),
            token_cu=_offsets(spans[:, 3] + 1 + ends),
        ),
        **numpy_targets(ids, cu_seqlens, token_end),
    )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _joined(documents: Sequence[bytes]) -> bytearray:
    """BOS before each document."""
    return bytearray([BOS]).join([b"", *documents])


def _tensors(**arrays: np.ndarray) -> Outputs:
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


# ---------------------------------------------------------------------------------------------------------- PyTorch


def eager_pack(documents: Sequence[bytes], device: torch.device, out: Tensor | None = None) -> Outputs:
    ids = torch.frombuffer(_joined(documents), dtype=torch.uint8)
    lengths = torch.tensor([len(document) + 1 for document in documents])
    return dict(ids=ids.to(device) if out is None else out.copy_(ids), cu_seqlens=cu_seqlens_of(lengths).to(device))


def eager_pack_flat(flat: Tensor, offsets: Tensor) -> Outputs:
    sequences, lengths = len(offsets) - 1, lengths_of(offsets)
    bos_before = torch.arange(1, sequences + 1, device=flat.device).repeat_interleave(lengths, output_size=len(flat))
    ids = flat.new_full((len(flat) + sequences,), BOS)
    ids[bos_before + torch.arange(len(flat), device=flat.device)] = flat
    cu_seqlens = offsets + torch.arange(sequences + 1, dtype=torch.int32, device=flat.device)
    return dict(ids=ids, cu_seqlens=cu_seqlens)


def eager_unpack(values: Tensor, cu_seqlens: Tensor, length: int, out: Tensor | None = None) -> Outputs:
    padded = values.new_empty((len(cu_seqlens) - 1, length, *values.shape[1:])) if out is None else out
    padded.zero_()[_places(cu_seqlens, length)] = values
    return dict(padded=padded)


def eager_pack_padded(padded: Tensor, cu_seqlens: Tensor, length: int, out: Tensor | None = None) -> Outputs:
    held = _places(cu_seqlens, length)
    if out is None:
        return dict(values=padded[held])
    rows = held.flatten().nonzero().flatten()
    return dict(values=torch.index_select(padded.flatten(0, 1), 0, rows, out=out))


def eager_targets(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor) -> Outputs:
    targets = torch.empty(len(ids), dtype=torch.int64, device=ids.device)
    targets[:-1] = 256 * boundary[1:].to(torch.int16) + ids[1:]
    targets[cu_seqlens[1:][lengths_of(cu_seqlens) > 0].long() - 1] = IGNORE
    return dict(targets=targets)


def eager_token_ends(token_lengths: Tensor, token_cu: Tensor, cu_seqlens: Tensor) -> Outputs:
    numbers = torch.arange(1, len(token_cu), dtype=torch.int32, device=token_cu.device)
    bos_before = numbers.repeat_interleave(lengths_of(token_cu), output_size=len(token_lengths))
    mask = torch.zeros(int(cu_seqlens[-1]), dtype=torch.bool, device=cu_seqlens.device)
    mask[token_lengths.cumsum(0) + bos_before - 1] = True
    mask[cu_seqlens[:-1].long()] = True
    return dict(token_end=mask)


def eager_row_index(cu_seqlens: Tensor, total: int) -> Outputs:
    lengths = lengths_of(cu_seqlens)
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=cu_seqlens.device)
    sequence = numbers.repeat_interleave(lengths, output_size=total)
    starts = cu_seqlens[:-1].repeat_interleave(lengths, output_size=total)
    return dict(sequence=sequence, position=torch.arange(total, dtype=torch.int32, device=starts.device) - starts)


def eager_align_pack(
    text: Tensor,
    token_ids: Tensor,
    token_lengths: Tensor,
    spans: Tensor,
    ends: Tensor,
    bos_id: int,
    eos_id: int,
    device: torch.device,
) -> Outputs:
    def pieces(values: Tensor, column: int, first: int, last: int) -> list[Tensor]:
        """Of each span the first value, its slice, and the last value where the text ends."""
        first_piece, last_piece = (torch.tensor([value], dtype=values.dtype) for value in (first, last))
        taken = []
        for (begin, count), ends_text in zip(spans[:, column : column + 2].tolist(), ends.tolist(), strict=True):
            taken += [first_piece, values[begin : begin + count]]
            if ends_text:
                taken.append(last_piece)
        return taken

    ids = torch.cat(pieces(text, 0, BOS, EOS)).to(device)
    cu_seqlens = cu_seqlens_of(spans[:, 1] + 1 + ends).to(device)
    token_end = torch.zeros(len(ids), dtype=torch.bool, device=device)
    token_end[torch.cat(pieces(token_lengths, 2, 1, 1)).to(device).cumsum(0) - 1] = True
    return dict(
        ids=ids,
        cu_seqlens=cu_seqlens,
        token_end=token_end,
        token_ids=torch.cat(pieces(token_ids, 2, bos_id, eos_id)).to(device, torch.int64),
        token_cu=cu_seqlens_of(spans[:, 3] + 1 + ends).to(device),
        **eager_targets(ids, cu_seqlens, token_end),
    )


def _places(cu_seqlens: Tensor, length: int) -> Tensor:
    """Which places of [S, length] hold a row."""
    return torch.arange(length, device=cu_seqlens.device) < lengths_of(cu_seqlens)[:, None]


# ------------------------------------------------------------------------------------------------------------- ours


def our_pack(documents: Sequence[bytes], device: torch.device, out: Tensor | None = None) -> Outputs:
    ids, cu_seqlens = bytekernels.pack_bytes(documents, device=device, out=out)
    return dict(ids=ids, cu_seqlens=cu_seqlens)


def our_pack_flat(flat: Tensor, offsets: Tensor) -> Outputs:
    ids, cu_seqlens = bytekernels.pack_bytes((flat, offsets), device=flat.device)
    return dict(ids=ids, cu_seqlens=cu_seqlens)


def our_unpack(values: Tensor, cu_seqlens: Tensor, length: int, out: Tensor | None = None) -> Outputs:
    return dict(padded=bytekernels.unpack(values, cu_seqlens, 0, length=length, out=out))


def our_pack_padded(padded: Tensor, cu_seqlens: Tensor, length: int, out: Tensor | None = None) -> Outputs:
    return dict(values=bytekernels.pack_padded(padded, cu_seqlens, out=out))


def our_targets(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor) -> Outputs:
    return dict(targets=bytekernels.next_byte_targets(ids, cu_seqlens, boundary))


def our_token_ends(token_lengths: Tensor, token_cu: Tensor, cu_seqlens: Tensor) -> Outputs:
    return dict(token_end=bytekernels.token_end_mask(token_lengths, token_cu, cu_seqlens, True))


def our_row_index(cu_seqlens: Tensor, total: int) -> Outputs:
    sequence, position = bytekernels.row_index(cu_seqlens, total)
    return dict(sequence=sequence, position=position)


def our_align_pack(device: torch.device, **arguments: Any) -> Outputs:
    batch = bytekernels.align_pack(**arguments, pin=device.type == "cuda")
    return batch.to(device, non_blocking=True)._asdict()


# -------------------------------------------------------------------------------------------------------- providers


def _as_arrays(**arguments: Any) -> dict[str, Any]:
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _as_lists(**arguments: Any) -> dict[str, Any]:
    """Bytes for uint8 and bool, lists for other integers."""
    made = {}
    for name, value in _as_arrays(**arguments).items():
        if not isinstance(value, np.ndarray):
            made[name] = value
        elif value.dtype.itemsize > 1:
            made[name] = value.tolist()
        else:
            made[name] = value.tobytes()
    return made


def _as_lists_of_rows(**arguments: Any) -> dict[str, Any]:
    """As :func:`_as_lists`, with the shape of a row."""
    rows = arguments["values"].shape[1:] if "values" in arguments else arguments["padded"].shape[2:]
    return dict(**_as_lists(**arguments), row=rows)


def _without_out(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "out"}


def _with_into(functions: dict[str, Function]) -> dict[str, Function]:
    """The functions, those of the ops that write into a tensor that is there added."""
    return functions | {op: functions[op.removesuffix("_into")] for op in OPS if op.endswith("_into")}


_PYTHON: dict[str, Function] = {
    "pack": pack_loops.pack,
    "pack_padded": pack_loops.pack_padded,
    "unpack": pack_loops.unpack,
    "targets": pack_loops.targets,
    "token_ends": pack_loops.token_ends,
    "row_index": pack_loops.row_index,
    "align_pack": pack_loops.align_pack,
}
_NUMPY: dict[str, Function] = {
    "pack": numpy_pack,
    "pack_flat": numpy_pack_flat,
    "pack_padded": numpy_pack_padded,
    "unpack": numpy_unpack,
    "targets": numpy_targets,
    "token_ends": numpy_token_ends,
    "row_index": numpy_row_index,
    "align_pack": numpy_align_pack,
}
_EAGER: dict[str, Function] = {
    "pack": eager_pack,
    "pack_flat": eager_pack_flat,
    "pack_padded": eager_pack_padded,
    "unpack": eager_unpack,
    "targets": eager_targets,
    "token_ends": eager_token_ends,
    "row_index": eager_row_index,
    "align_pack": eager_align_pack,
}
_OURS: dict[str, Function] = {
    "pack": our_pack,
    "pack_flat": our_pack_flat,
    "pack_padded": our_pack_padded,
    "unpack": our_unpack,
    "targets": our_targets,
    "token_ends": our_token_ends,
    "row_index": our_row_index,
    "align_pack": our_align_pack,
}

PYTHON = Provider(
    _PYTHON, prepare=dict.fromkeys(_PYTHON, _as_lists) | dict.fromkeys(("unpack", "pack_padded"), _as_lists_of_rows)
)
NUMPY = Provider(_with_into(_NUMPY), prepare=dict.fromkeys(OPS, _as_arrays))
EAGER = Provider(_with_into(_EAGER))
OURS = Provider(_with_into(_OURS))
# Into memory of its own: what it writes must not lie in the providers' memory before they write there.
TRUTH = dataclasses.replace(
    OURS, settings=peers.REFERENCE.settings, prepare={op: _without_out for op in OPS if op.endswith("_into")}
)


def providers(names: Iterable[str], device: torch.device) -> dict[str, Provider | Unavailable]:
    """The providers of these names, those that can't run on this device with the reason."""
    of_host = {"python": ("Python's loop", PYTHON), "numpy": ("NumPy", NUMPY)}
    others = {
        "eager": EAGER,
        "bytekernels": OURS,
        "reference": dataclasses.replace(OURS, settings=peers.REFERENCE.settings),
    }
    made: dict[str, Provider | Unavailable] = {}
    for name in names:
        if name in others:
            made[name] = others[name]
        else:
            what, provider = of_host[name]
            absent = Unavailable(f"{what} runs on the CPU alone, not on {device}")
            made[name] = provider if device.type == "cpu" else absent
    return made
