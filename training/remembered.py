"""What frozen models make of a fixed text, computed once and kept in host memory.

A sequence's rows depend on its bytes and its chunk ends alone, whatever batch it is in, so they are kept by a digest of
these. The memory is for one process: under FSDP a layer's parameters are gathered by all processes together, and one
that remembers its sequences would leave the others waiting.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import pairwise

import torch
from torch import Tensor

from bytekernels import AlignedBatch
from bytekernels.ragged import cu_seqlens_of, segment_ids


class Remembered:
    """Rows of sequences, by what made them and by the sequences' digests. They have no gradients."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, bytes], Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Of all rows."""
        return sum(rows.nbytes for rows in self._rows.values())

    @torch.no_grad()
    def rows(
        self, kind: str, batch: AlignedBatch, ends: Tensor, cu: Tensor, make: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The rows of a batch's sequences, [M, d]; those of sequences that are new are made.

        Args:
            kind: what ``make`` computes.
            batch: S sequences.
            ends: bool [T], where chunks end: a sequence that is cut otherwise has other rows.
            cu: int32 [S+1], the rows of each sequence.
            make: of bool [M], which rows are wanted, and their own offsets int32 [N+1], to these rows [m, d].
        """
        keys = [(kind, digest) for digest in _digests(batch, ends)]
        new = [number for number, key in enumerate(keys) if key not in self._rows]
        if new:
            wanted = torch.zeros(len(keys), dtype=torch.bool, device=cu.device)
            wanted[new] = True
            lengths = cu.diff()[wanted]
            made = make(wanted[segment_ids(cu, int(cu[-1]))], cu_seqlens_of(lengths))
            for number, rows in zip(new, made.cpu().split(lengths.tolist()), strict=True):
                self._rows[keys[number]] = rows
        return torch.cat([self._rows[key] for key in keys]).to(cu.device)


def _digests(batch: AlignedBatch, ends: Tensor) -> Sequence[bytes]:
    """One of the bytes and chunk ends of each sequence."""
    ids, cut = batch.ids.cpu().numpy(), ends.cpu().numpy()
    return [
        blake2b(ids[first:last].tobytes() + cut[first:last].tobytes(), digest_size=16).digest()
        for first, last in pairwise(batch.cu_seqlens.tolist())
    ]
