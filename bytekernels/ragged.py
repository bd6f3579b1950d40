"""What a packed batch is: one flat axis of T rows and ``cu_seqlens``, the S+1 offsets that cut it into sequences."""

import os

import torch
from torch import Tensor

BOS = 0xFE  # begins every sequence; never occurs in UTF-8
EOS = 0xFF  # ends a document; never occurs in UTF-8
IGNORE = -100  # a target that no loss counts


def validates(tensor: Tensor, validate: bool | None = None) -> bool:
    """Whether values that a call depends on are checked: always on the CPU, where reading is free.

    On a CUDA device a check waits for the device, so it is made where it is asked for: by ``validate``, or where that
    is None by the environment variable ``BYTEKERNELS_VALIDATE=1``. Never while a CUDA graph is captured.
    """
    if tensor.device.type == "cpu":
        return True
    wanted = os.environ.get("BYTEKERNELS_VALIDATE") == "1" if validate is None else validate
    return wanted and tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


def check_bytes(ids: Tensor) -> None:
    """Refuse what is not uint8.

    Raises:
        TypeError: another dtype.
    """
    if ids.dtype != torch.uint8:
        raise TypeError(f"ids must be uint8, one byte a row, got {ids.dtype}: use ids.to(torch.uint8)")


def check_chunked(ids: Tensor, boundary: Tensor) -> None:
    """Refuse what are not the bytes of a text and the ends of its chunks.

    Args:
        ids: uint8 [T].
        boundary: bool [T].

    Raises:
        TypeError: other dtypes.
        ValueError: other shapes.
    """
    check_bytes(ids)
    if boundary.dtype != torch.bool:
        raise TypeError(f"boundary must be bool, got {boundary.dtype}: compare it with a threshold first")
    if ids.dim() != 1 or boundary.shape != ids.shape:
        raise ValueError(f"ids and boundary must have one shape [T], got {list(ids.shape)} and {list(boundary.shape)}")


def check_cu_seqlens(cu_seqlens: Tensor, total: int, name: str = "cu_seqlens", *, validate: bool | None = None) -> None:
    """Refuse offsets that do not cut ``total`` rows into sequences.

    Args:
        cu_seqlens: int32 [S+1], ``cu[0] = 0``, non-decreasing, ``cu[S] = total``. Empty sequences are legal.
        total: T, the number of rows that are cut.
        name: the argument's name in messages.
        validate: whether offsets on a CUDA device are read (:func:`validates`).

    Raises:
        TypeError: not int32.
        ValueError: not one-dimensional or empty, or (where they are read) offsets out of order or range.
    """
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}: use {name}.to(torch.int32)")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"{name} must have shape [S+1] with S >= 0, got {list(cu_seqlens.shape)}")
    if not validates(cu_seqlens, validate):
        return
    if cu_seqlens.is_cuda:
        wrong = (cu_seqlens[1:] < cu_seqlens[:-1]).any() | (cu_seqlens[0] != 0) | (cu_seqlens[-1] != total)
        if not bool(wrong):  # the one wait
            return
        cu_seqlens = cu_seqlens.cpu()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total:
        raise ValueError(
            f"{name} must start at 0 and end at {total}, the number of rows; "
            f"got {int(cu_seqlens[0])} and {int(cu_seqlens[-1])}"
        )
    falls = cu_seqlens[1:] < cu_seqlens[:-1]
    if bool(falls.any()):
        index = int(falls.nonzero()[0])
        raise ValueError(
            f"{name} must not decrease, got {int(cu_seqlens[index])} > {int(cu_seqlens[index + 1])} at index {index}"
        )


def check_indices(indices: Tensor, name: str, shape: str, least: int, end: int, what: str) -> None:
    """Refuse indices that are not int32, one-dimensional and in [least, end).

    Args:
        indices: int32 [...]. On a CUDA device their values are read where that is asked for (:func:`validates`).
        name: the argument's name in messages.
        shape: the letter of its length.
        least: the smallest index allowed.
        end: how many there are of what is indexed.
        what: that, in messages.

    Raises:
        TypeError: not int32.
        ValueError: not one-dimensional, or (where they are read) an index out of range.
    """
    if indices.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {indices.dtype}: use {name}.to(torch.int32)")
    if indices.dim() != 1:
        raise ValueError(f"{name} must have shape [{shape}], got {list(indices.shape)}")
    if not validates(indices):
        return
    wrong = (indices < least) | (indices >= end)
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} must be in [{least}, {end}), as there are {end} {what}, got {int(indices[index])} at index {index}"
        )


def lengths_of(cu_seqlens: Tensor) -> Tensor:
    """Length of each sequence: int32 [S]."""
    return cu_seqlens[1:] - cu_seqlens[:-1]


def cu_seqlens_of(lengths: Tensor) -> Tensor:
    """Offsets of sequences of the given lengths [S]: int32 [S+1]."""
    cu = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu[1:])
    return cu


def segment_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """Number of the sequence that each row belongs to: int64 [T]."""
    rows = torch.arange(total, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].to(torch.int64), rows, right=True)


def positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Position of each row within its sequence, from 0: int64 [T]."""
    rows = torch.arange(total, device=cu_seqlens.device)
    return rows - cu_seqlens[segment_ids(cu_seqlens, total)].to(torch.int64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are carried in: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)
