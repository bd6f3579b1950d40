"""longest_suffix as a torch.library op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.ragged import check_cu_seqlens
from bytekernels.trie import ByteTrie

_longest_suffix = dispatch.Dispatch("longest_suffix", reference=dispatch.reference("suffix"))


class SuffixTrie(ByteTrie):
    """A vocabulary read backwards: the :class:`~bytekernels.trie.ByteTrie` of its reversed strings."""

    def __init__(self, strings: Sequence[bytes]) -> None:
        super().__init__([string[::-1] for string in strings])


@torch.library.custom_op("bytekernels::longest_suffix", mutates_args=())
def longest_suffix_op(ids: Tensor, cu_seqlens: Tensor, edges: Tensor, string_ids: Tensor) -> Tensor:
    return _longest_suffix(ids, cu_seqlens, edges, string_ids)


@longest_suffix_op.register_fake
def _(ids: Tensor, cu_seqlens: Tensor, edges: Tensor, string_ids: Tensor) -> Tensor:
    return torch.empty_like(ids, dtype=torch.int32)


def longest_suffix(ids: Tensor, cu_seqlens: Tensor, trie: SuffixTrie) -> Tensor:
    """The vocabulary id of the longest string that ends at each byte, within its sequence.

    Args:
        ids: uint8 [T].
        cu_seqlens: int32 [S+1].
        trie: of the vocabulary, on the same device.

    Returns:
        int32 [T]; -1 where no string ends. Of ids with equal strings the smallest is given.

    Raises:
        TypeError: ids that are not uint8, or cu_seqlens that is not int32.
        ValueError: ids that are not one-dimensional, or offsets that do not cut T.
    """
    if ids.dtype != torch.uint8:
        raise TypeError(f"ids must be uint8, one byte a row, got {ids.dtype}: use ids.to(torch.uint8)")
    if ids.dim() != 1:
        raise ValueError(f"ids must have shape [T], got {list(ids.shape)}")
    check_cu_seqlens(cu_seqlens, ids.shape[0])
    return longest_suffix_op(ids, cu_seqlens, trie.edges, trie.ids)
