"""Bytes of many forms to one packed batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bytekernels import dispatch, ragged
from bytekernels.extension import native
from bytekernels.pack.op import dynamic_size, implementations
from bytekernels.pack.rows import check_rows

# Documents for a device are packed on the host, and uploaded.
_pack_documents = dispatch.Dispatch(
    "pack_documents", native=native("pack"), cuda=native("pack"), reference=dispatch.reference("pack")
)
_pack_rows = implementations("pack_rows")
_pack_flat = implementations("pack_flat")
_MOST = 2**31 - 1  # that int32 offsets count


def _check_total(total: int) -> None:
    if total > _MOST:
        raise ValueError(f"the batch has {total} bytes, int32 cu_seqlens count up to 2^31 - 1: pack it in several")


@torch.library.custom_op("bytekernels::pack_rows", mutates_args=())
def pack_rows_op(
    padded: Tensor, lengths: Tensor, bos: int | None, total: int | None = None, validate: bool | None = None
) -> tuple[Tensor, Tensor]:
    if ragged.validates(lengths, validate):
        wrong = ((lengths < 0) | (lengths > padded.shape[1])).nonzero()
        if len(wrong):
            s = int(wrong[0])
            raise ValueError(
                f"lengths must lie in [0, {padded.shape[1]}], padded's width, got {int(lengths[s])} at {s}"
            )
    if total is None or ragged.validates(lengths, validate):
        summed = int(lengths.sum()) + (0 if bos is None else len(lengths))
        if total is not None and total != summed:
            raise ValueError(f"total must be {summed}, the bytes of all rows{_with_bos(bos)}, got {total}")
        total = summed
    _check_total(total)
    return _pack_rows(padded, lengths, bos, total)


@pack_rows_op.register_fake
def _(
    padded: Tensor, lengths: Tensor, bos: int | None, total: int | None = None, validate: bool | None = None
) -> tuple[Tensor, Tensor]:
    total = dynamic_size() if total is None else total
    return padded.new_empty(total), lengths.new_empty(len(lengths) + 1, dtype=torch.int32)


@torch.library.custom_op("bytekernels::pack_flat", mutates_args=())
def pack_flat_op(flat: Tensor, offsets: Tensor, bos: int | None, validate: bool | None = None) -> tuple[Tensor, Tensor]:
    ragged.check_cu_seqlens(offsets, len(flat), "offsets", validate=validate)
    _check_total(len(flat) + _added(offsets, bos))
    return _pack_flat(flat, offsets, bos)


@pack_flat_op.register_fake
def _(flat: Tensor, offsets: Tensor, bos: int | None, validate: bool | None = None) -> tuple[Tensor, Tensor]:
    return flat.new_empty(len(flat) + _added(offsets, bos)), torch.empty_like(offsets)


def _added(offsets: Tensor, bos: int | None) -> int:
    """BOS bytes of a batch."""
    return 0 if bos is None else len(offsets) - 1


def _with_bos(bos: int | None) -> str:
    return "" if bos is None else " with BOS"


def pack_bytes(
    sequences: Sequence[bytes | bytearray | memoryview] | tuple[Tensor, Tensor],
    *,
    bos: int | None = ragged.BOS,
    device: torch.device | str = "cpu",
    total: int | None = None,
    out: Tensor | None = None,
    validate: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Documents, one after another on a flat axis of bytes. Any byte value may occur in them.

    For a CUDA device a list is packed into page-locked memory and uploaded from there without waiting; tensors are
    moved there first, without waiting if they are in such memory, and packed there in one launch.

    Args:
        sequences: S documents of bytes; or a pair of tensors: (padded uint8 [S, L], lengths integer [S]), or
            (flat uint8 [N], offsets int32 [S+1]), documents one after another without BOS and where each begins.
        bos: the byte put before each document, None for none. An empty document becomes this byte alone.
        device: where the result goes.
        total: T, for padded rows on a CUDA device: without it their number is read, which waits for the device.
        out: uint8 [T] on ``device`` that ``ids`` is written into, for a list of documents.
        validate: whether lengths and offsets on a CUDA device are checked, which waits for it; None as
            ``BYTEKERNELS_VALIDATE=1`` says. On the CPU they always are.

    Returns:
        ``ids`` uint8 [T] and ``cu_seqlens`` int32 [S+1].

    Raises:
        TypeError: a document that is not bytes (a str is to be encoded first), or tensors of other dtypes.
        ValueError: bos outside [0, 255], shapes that do not match, lengths outside [0, L], malformed offsets, another
            total, or 2^31 bytes and more.
    """
    device = torch.device(device)
    if bos is not None and not 0 <= bos <= 255:
        raise ValueError(f"bos must be a byte in [0, 255], or None for none, got {bos}")
    if isinstance(sequences, tuple) and len(sequences) == 2 and isinstance(sequences[0], Tensor):
        if out is not None:
            raise ValueError("out is for a list of documents: tensors are packed into new memory")
        return _pack_tensors(*sequences, bos, device, total, validate)
    if isinstance(sequences, bytes | bytearray | memoryview | str):
        raise TypeError(f"sequences must be a list of documents, got one {type(sequences).__name__}: put it in []")
    if total is not None:
        raise ValueError(f"total is for padded rows: the lengths of documents are known, got {total}")
    if out is not None and (out.dtype != torch.uint8 or out.dim() != 1 or out.device.type != device.type):
        raise ValueError(
            f"out must be uint8 [T] on {device}, got {out.dtype} of shape {list(out.shape)} on {out.device}"
        )
    direct = out if device.type == "cpu" else None
    ids, cu_seqlens = _pack_documents.on_host(list(sequences), bos, direct, device.type == "cuda")
    if device.type == "cpu":
        return ids, cu_seqlens
    if out is not None:
        check_rows(out, len(ids))
    uploaded = ids.to(device, non_blocking=True) if out is None else out.copy_(ids, non_blocking=True)
    return uploaded, cu_seqlens.to(device, non_blocking=True)


def _pack_tensors(
    values: Tensor, cut: Tensor, bos: int | None, device: torch.device, total: int | None, validate: bool | None
) -> tuple[Tensor, Tensor]:
    """Padded rows and their lengths, or flat documents and their offsets."""
    names = ("flat", "offsets") if values.dim() == 1 else ("padded", "lengths")
    if values.dtype != torch.uint8 or cut.dtype.is_floating_point or cut.dtype == torch.bool:
        raise TypeError(f"{names[0]} must be uint8 and {names[1]} of integers, got {values.dtype} and {cut.dtype}")
    if values.dim() == 1:
        if total is not None:
            raise ValueError(f"total is for padded rows: that of flat documents is known, got {total}")
        return pack_flat_op(_moved(values, device), _moved(cut, device), bos, validate)
    if values.dim() != 2 or cut.shape != values.shape[:1]:
        raise ValueError(
            f"padded must have shape [S, L] and lengths [S], got {list(values.shape)} and {list(cut.shape)}"
        )
    return pack_rows_op(_moved(values, device), _moved(cut, device).to(torch.int64), bos, total, validate)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; what is in page-locked memory is not waited for."""
    return tensor.to(device, non_blocking=not tensor.is_cuda and tensor.is_pinned())
