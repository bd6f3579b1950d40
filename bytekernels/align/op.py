"""Aligned batches: a function of the host, as it takes a corpus in files and draws no gradient."""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytekernels import dispatch, extension
from bytekernels.align.batch import AlignedBatch
from bytekernels.ragged import BOS, EOS

_align_pack = dispatch.Dispatch("align_pack", native=extension.native("align"), reference=dispatch.reference("align"))


def align_pack(
    text: np.ndarray | Tensor,
    token_ids: np.ndarray | Tensor,
    token_lengths: np.ndarray | Tensor,
    spans: np.ndarray | Tensor,
    *,
    bos_id: int,
    eos_id: int | None = None,
    ends: np.ndarray | Tensor | None = None,
    bos: int = BOS,
    eos: int = EOS,
    targets: bool = True,
    pin: bool = False,
    threads: int | None = None,
) -> AlignedBatch:
    """A batch of training data: windows of a corpus's bytes, the ends of its tokens, their ids, and the targets.

    Sequence s is ``bos``, ``text[first_byte : first_byte + bytes]``, and ``eos`` where ``ends[s]``; its tokens are
    ``bos_id``, ``token_ids[first_token : first_token + tokens]``, and ``eos_id`` where ``ends[s]``, in each span
    ``(first_byte, bytes, first_token, tokens)``. The lengths of a span's tokens sum to its bytes. Spans may overlap,
    come in any order and be empty.

    Arguments are NumPy arrays or CPU tensors, contiguous, and are read where they lie: memory maps need not be
    loaded.

    Args:
        text: uint8 [N].
        token_ids: int32 [n].
        token_lengths: uint16 or int32 [n], bytes of each token, each at least 1.
        spans: int64 [S, 4], columns first_byte, bytes, first_token, tokens.
        bos_id: the token id at BOS, in [0, 2^31).
        eos_id: the token id at EOS; needed where any of ``ends`` is true.
        ends: bool [S], which sequences end with EOS; None for none.
        bos: the byte that begins each sequence.
        eos: the byte that ends those of ``ends``.
        targets: make the targets too, as ``next_byte_targets(ids, cu_seqlens, token_end)`` does.
        pin: put the batch in page-locked memory, from which ``.to(device, non_blocking=True)`` does not block.
        threads: of the native code, whose result does not depend on it; None for torch's number, 1 for the calling
            thread alone.

    Returns:
        The batch on the CPU, in one allocation.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes that do not match, an array that is not contiguous, aligned and on the CPU; a span that is
            negative or not within the text and the tokens, tokens of no or negative length, or whose lengths do not
            sum to their span's bytes; a missing eos_id, bytes and ids out of range; 2^31 bytes or tokens and more.
        RuntimeError: pin without CUDA.
    """
    text = _host_array(text, "text", "N", "uint8")
    token_ids = _host_array(token_ids, "token_ids", "n", "int32")
    token_lengths = _host_array(token_lengths, "token_lengths", "n", "uint16", "int32")
    if len(token_lengths) != len(token_ids):
        raise ValueError(
            f"token_lengths must have a length for each of the {len(token_ids)} token_ids, got {len(token_lengths)}"
        )
    spans = _host_array(spans, "spans", "S, 4", "int64")
    if spans.shape[1] != 4:
        raise ValueError(
            f"spans must have shape [S, 4], columns first_byte, bytes, first_token and tokens, got {list(spans.shape)}"
        )
    if ends is not None:
        ends = _host_array(ends, "ends", "S", "bool")
        if len(ends) != len(spans):
            raise ValueError(f"ends must have a flag for each of the {len(spans)} spans, got {len(ends)}")
    bos_id = _integer(bos_id, "bos_id", 2**31 - 1)
    eos_id = None if eos_id is None else _integer(eos_id, "eos_id", 2**31 - 1)
    bos, eos = _integer(bos, "bos", 255), _integer(eos, "eos", 255)
    if threads is None:
        threads = extension.threads()
    threads = _integer(threads, "threads", 2**31 - 1, least=1)
    if pin and not torch.cuda.is_available():
        raise RuntimeError("pin=True needs CUDA, which torch does not find here: use pin=False")
    return _align_pack.on_host(
        text, token_ids, token_lengths, spans, ends, bos_id, eos_id, bos, eos, targets, pin, threads
    )


def _host_array(values: Any, name: str, shape: str, *dtypes: str) -> np.ndarray:
    """An argument as a NumPy array of one of these dtypes, without copying it."""
    wanted, widest = " or ".join(dtypes), dtypes[-1]
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {values.device}: use {name}.cpu()")
        if str(values.dtype).removeprefix("torch.") not in dtypes:
            raise TypeError(f"{name} must be {wanted}, got {values.dtype}: use {name}.to(torch.{widest})")
        values = values.detach().numpy()
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array or a CPU tensor of {wanted}, got {type(values).__name__}")
    if values.dtype not in dtypes:
        raise TypeError(f"{name} must be {wanted}, got {values.dtype}: use {name}.astype('{widest}')")
    if values.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape [{shape}], got {list(values.shape)}")
    if not (values.flags.c_contiguous and values.flags.aligned):
        raise ValueError(
            f"{name} must be contiguous and aligned, got strides {values.strides} for shape {list(values.shape)} of "
            f"{values.dtype}: copy it with np.array({name}, order='C')"
        )
    return values


def _integer(value: Any, name: str, most: int, least: int = 0) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not least <= number <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], got {number}")
    return number
