"""longest_suffix and its step as torch.library ops."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.extension import cuda, native
from bytekernels.ragged import check_bytes, check_cu_seqlens, check_indices
from bytekernels.suffix.state import SuffixState
from bytekernels.trie import ByteTrie

_implementations = dict(native=native("suffix"), cuda=cuda("suffix"), reference=dispatch.reference("suffix"))
_longest_suffix = dispatch.Dispatch("longest_suffix", **_implementations)
_longest_suffix_step = dispatch.Dispatch("longest_suffix_step", **_implementations)


class SuffixTrie(ByteTrie):
    """A vocabulary read backwards: the :class:`~bytekernels.trie.ByteTrie` of its reversed strings."""

    def __init__(self, strings: Sequence[bytes]) -> None:
        super().__init__([string[::-1] for string in strings])


@torch.library.custom_op("bytekernels::longest_suffix", mutates_args=())
def longest_suffix_op(
    ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None, edges: Tensor, children: Tensor, string_ids: Tensor
) -> Tensor:
    check_cu_seqlens(cu_seqlens, ids.shape[0])
    if rows is not None:
        check_indices(rows, "rows", "R", 0, ids.shape[0], "bytes")
    return _longest_suffix(ids, cu_seqlens, rows, edges, children, string_ids)


@longest_suffix_op.register_fake
def _(ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None, *_: Tensor) -> Tensor:
    return ids.new_empty(ids.shape if rows is None else rows.shape, dtype=torch.int32)


def _take_step(
    ids: Tensor,
    active: Tensor | None,
    recent: Tensor,
    counts: Tensor,
    edges: Tensor,
    children: Tensor,
    string_ids: Tensor,
) -> Tensor:
    return _longest_suffix_step(ids, active, recent, counts, edges, children, string_ids)


# Defined by hand: torch.library.custom_op would take longer than the step of a small batch does on a CPU.
_STEP = "bytekernels::longest_suffix_step"
torch.library.define(
    _STEP,
    torch.library.infer_schema(_take_step, mutates_args=("recent", "counts")),
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl(_STEP, "default", _take_step)
longest_suffix_step_op = torch.ops.bytekernels.longest_suffix_step.default


@torch.library.register_fake(_STEP)
def _(ids: Tensor, *_: Any) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.int32)


def longest_suffix(ids: Tensor, cu_seqlens: Tensor, trie: SuffixTrie, *, rows: Tensor | None = None) -> Tensor:
    """The vocabulary id of the longest string that ends at each byte, within its sequence.

    Args:
        ids: uint8 [T].
        cu_seqlens: int32 [S+1].
        trie: of the vocabulary, on the same device.
        rows: int32 [R], the bytes of the T to answer for, in any order; None for all. (Byte by byte:
            :func:`longest_suffix_step`.)

    Returns:
        int32 [R], or [T]; -1 where no string ends. Of ids with equal strings the smallest is given.

    Raises:
        TypeError: ids that are not uint8, cu_seqlens or rows that are not int32.
        ValueError: ids or rows that are not one-dimensional, offsets that do not cut T, or a row that is not one of T
            (on a CUDA device it has -1, unless ``BYTEKERNELS_VALIDATE=1`` is set).
    """
    _check_ids(ids, "T")
    return longest_suffix_op(ids, cu_seqlens, rows, trie.edges, trie.children, trie.ids)


def longest_suffix_step(ids: Tensor, state: SuffixState, trie: SuffixTrie, *, active: Tensor | None = None) -> Tensor:
    """:func:`longest_suffix` of the next byte of each of S sequences; the state is updated in place.

    Args:
        ids: uint8 [S], the new bytes.
        state: on the same device.
        trie: of the vocabulary, the one that the state was made for, on the same device.
        active: bool [S] or None for all. Where it is False the state keeps its bits, whatever ids holds.

    Returns:
        int32 [S]; -1 where no string ends and where a sequence is not active.

    Raises:
        TypeError: ids that are not uint8, an active that is not bool, or a state of other dtypes.
        ValueError: shapes that do not match, or a state that is not contiguous.
    """
    _check_ids(ids, "S")
    for name, value, dtype, shape in (
        ("state.recent", state.recent, torch.uint8, [len(ids), trie.depth]),
        ("state.counts", state.counts, torch.int32, [len(ids)]),
        ("active", active, torch.bool, [len(ids)]),
    ):
        if value is None:
            continue
        if value.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
        if list(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
    if not (state.recent.is_contiguous() and state.counts.is_contiguous()):
        raise ValueError("the state's tensors must be contiguous, as SuffixState.empty makes them: use .contiguous()")
    return longest_suffix_step_op(ids, active, state.recent, state.counts, trie.edges, trie.children, trie.ids)


def _check_ids(ids: Tensor, shape: str) -> None:
    check_bytes(ids)
    if ids.dim() != 1:
        raise ValueError(f"ids must have shape [{shape}], got {list(ids.shape)}")
