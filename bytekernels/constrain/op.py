"""constrain_ends as a torch.library op."""

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.extension import cuda, native
from bytekernels.ragged import check_chunked, check_cu_seqlens
from bytekernels.trie import ByteTrie

_constrain_ends = dispatch.Dispatch(
    "constrain_ends", native=native("constrain"), cuda=cuda("constrain"), reference=dispatch.reference("constrain")
)


@torch.library.custom_op("bytekernels::constrain_ends", mutates_args=())
def constrain_ends_op(
    ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, edges: Tensor, children: Tensor, string_ids: Tensor
) -> Tensor:
    check_cu_seqlens(cu_seqlens, ids.shape[0])
    return _constrain_ends(ids, cu_seqlens, boundary, edges, children, string_ids)


@constrain_ends_op.register_fake
def _(ids: Tensor, *_: Tensor) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.bool)


def constrain_ends(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, vocabulary: ByteTrie) -> Tensor:
    """Chunk ends that leave chunks which are strings of a vocabulary, as far as one byte of lookahead can tell.

    Along each sequence, from its first byte on: a chunk ends where its bytes and the next one together begin no string,
    and otherwise where ``boundary`` says so and its bytes are a string. A byte that begins none is a chunk of its own.
    A chunk is no string only where it had to end, and was not ended at a string before.

    Whether a chunk ends on byte t depends on the bytes up to t+1, and on ``boundary`` up to t. The last bit of a
    sequence is left as it is, since what follows is not known.

    Args:
        ids: uint8 [T].
        cu_seqlens: int32 [S+1].
        boundary: bool [T], where chunks are wanted to end.
        vocabulary: on the same device.

    Returns:
        bool [T].

    Raises:
        TypeError: ids that are not uint8, a boundary that is not bool, or cu_seqlens that is not int32.
        ValueError: shapes that do not match, or offsets that do not cut T.
    """
    check_chunked(ids, boundary)
    return constrain_ends_op(ids, cu_seqlens, boundary, vocabulary.edges, vocabulary.children, vocabulary.ids)
