"""constrain_ends as a torch.library op."""

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.extension import cuda, native
from bytekernels.ragged import check_bytes, check_cu_seqlens
from bytekernels.trie import ByteTrie

_constrain_ends = dispatch.Dispatch(
    "constrain_ends", native=native("constrain"), cuda=cuda("constrain"), reference=dispatch.reference("constrain")
)


@torch.library.custom_op("bytekernels::constrain_ends", mutates_args=())
def constrain_ends_op(
    ids: Tensor,
    cu_seqlens: Tensor,
    log_odds: Tensor,
    given: Tensor,
    edges: Tensor,
    children: Tensor,
    string_ids: Tensor,
) -> Tensor:
    check_cu_seqlens(cu_seqlens, ids.shape[0])
    return _constrain_ends(ids, cu_seqlens, log_odds, given, edges, children, string_ids)


@constrain_ends_op.register_fake
def _(ids: Tensor, *_: Tensor) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.bool)


def constrain_ends(
    ids: Tensor, cu_seqlens: Tensor, log_odds: Tensor, vocabulary: ByteTrie, given: Tensor | None = None
) -> Tensor:
    """The likeliest chunk ends that leave chunks which are strings of a vocabulary.

    Each sequence is cut, from its first byte on, in the way that maximises the sum of ``log_odds`` over the bytes that
    chunks end on: with the log-odds of independent bits, ``log p - log(1 - p)``, the likeliest of all ways. No chunk
    has more than 63 bytes. A chunk that is no string costs 10^6, and is as long as it can be: with the next byte, if
    any, it begins no string, or it is one byte that begins none itself. Where all single bytes are strings there is
    none; otherwise there are those without which there is no way, or only one that is worth 10^6 less.

    The last chunk is a string like the others, but whether it ends is left open: the last bit of a sequence is whether
    its log-odds are at least 0, and no part of the sum. Log-odds beyond ±1000 count as that, NaN as 0. Of equally good
    ways the one whose last chunk is the longest is taken, then the longest before it, and so on.

    Whether a chunk ends on a byte depends on the whole sequence. With ``given``, the ends on a sequence's first rows,
    but for the last of these, are those that they would have alone; the rest is cut in the best way that goes on from
    there, and may lengthen the chunk that was left open.

    Args:
        ids: uint8 [T].
        cu_seqlens: int32 [S+1].
        log_odds: [T], floating, of a chunk's end on each byte; they are rounded to float32.
        vocabulary: on the same device.
        given: int64 or int32 [S], on any device, how many rows of each sequence come first; none where it is None.

    Returns:
        bool [T].

    Raises:
        TypeError: ids that are not uint8, log_odds that are not floating, given that is no integer, or cu_seqlens that
            is not int32.
        ValueError: shapes that do not match, or offsets that do not cut T.
    """
    check_bytes(ids)
    if not log_odds.is_floating_point():
        raise TypeError(f"log_odds must be floating, got {log_odds.dtype}: of probabilities they are p.logit()")
    if ids.dim() != 1 or log_odds.shape != ids.shape:
        raise ValueError(f"ids and log_odds must have one shape [T], got {list(ids.shape)} and {list(log_odds.shape)}")
    sequences = max(cu_seqlens.numel() - 1, 0)
    if given is None:
        given = cu_seqlens.new_zeros(sequences)
    elif given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"given must be int64 or int32, got {given.dtype}")
    elif given.shape != (sequences,):
        raise ValueError(f"given must have {sequences} elements, one a sequence, got {list(given.shape)}")
    rows = given.clamp(0, ids.shape[0]).to(ids.device, torch.int32)
    trie = vocabulary.edges, vocabulary.children, vocabulary.ids
    return constrain_ends_op(ids, cu_seqlens, log_odds.float(), rows, *trie)
