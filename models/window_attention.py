"""Windowed causal self-attention over packed bytes: the blocks of ``encoder="attention"``."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

import bytekernels
from bytekernels.ragged import accumulation_dtype, lengths_of, positions
from models.config import ByteLMConfig
from models.packed_attention import attend_by_sequence, attend_in_one_call, attend_to_cache

ROTARY_BASE = 10_000.0


@dataclass
class WindowState:
    """The newest W keys and values of each of S sequences, in a ring: the byte at position p is in slot ``p mod W``.

    Attributes:
        keys: [S, W, heads, head_dim], rotated to their own positions.
        values: [S, W, heads, head_dim].
        position: int64 [S], of the byte that comes next.
    """

    keys: Tensor
    values: Tensor
    position: Tensor

    @classmethod
    def after(cls, keys: Tensor, values: Tensor, cu_seqlens: Tensor, window: int) -> Self:
        """The state from which steps continue a forward pass over packed sequences.

        Args:
            keys, values: [T, heads, head_dim].
            cu_seqlens: int32 [S+1].
            window: W.
        """
        lengths = lengths_of(cu_seqlens).long()[:, None]
        slots = torch.arange(window, device=keys.device)
        place = lengths - 1 - (lengths - 1 - slots) % window  # [S, W], the newest position that the slot has held
        rows = (cu_seqlens[:-1].long()[:, None] + place).clamp(min=0)
        unused = (place < 0)[..., None, None]
        return cls(keys[rows].masked_fill(unused, 0), values[rows].masked_fill(unused, 0), lengths[:, 0])

    def add(self, key: Tensor, value: Tensor, active: Tensor | None) -> Tensor:
        """Put in the next byte of each active sequence (bool [S], None for all), and say which slots it sees.

        Args:
            key, value: [S, heads, head_dim].

        Returns:
            bool [S, W].
        """
        sequences, window = self.keys.shape[:2]
        slots = torch.arange(window, device=self.keys.device)
        seen = (self.position[:, None] - slots) % window <= self.position[:, None]
        at = torch.arange(sequences, device=self.keys.device), self.position % window
        for ring, new in ((self.keys, key), (self.values, value)):
            ring[at] = new if active is None else torch.where(active[:, None, None], new, ring[at])
        self.position += 1 if active is None else active
        return seen


class WindowAttention(nn.Module):
    """Each byte attends to itself and the ``window - 1`` bytes of its sequence before it.

    Positions are rotary (Su et al. 2021, arXiv 2104.09864) and count from the sequence's start.
    """

    def __init__(self, config: ByteLMConfig, num_layers: int) -> None:
        super().__init__()
        self.window, self.head_dim = config.attention_window, config.head_dim
        self.heads = config.width // config.head_dim
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(2 * num_layers)

    def forward(
        self, hidden: Tensor, cu_seqlens: Tensor, ids: Tensor | None = None, states: list[WindowState] | None = None
    ) -> Tensor:
        """Mix each sequence of a packed batch: [T, d] to [T, d].

        With ``ids`` (uint8 [T]) hidden is a table [256, d] of rows by byte value, and qkv runs over it alone. To
        ``states`` the state is added from which :meth:`step` goes on.
        """
        qkv = self.qkv(hidden)
        if ids is not None:
            qkv = bytekernels.byte_table(ids, qkv)
        query, key, value = self._rotated(qkv, positions(cu_seqlens, qkv.shape[0]))
        if states is not None:
            states.append(WindowState.after(key, value, cu_seqlens, self.window))
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return self.out_proj(self.attend(query, key, value, cu_seqlens)[0].flatten(1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[1, heads, T, head_dim] to [1, T, heads, head_dim]."""
        # Flash attention takes heads of a multiple of 8.
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and self.head_dim % 8 == 0:
            rows = query.shape[2]  # of all sequences, which the host knows, bounds those of the longest
            return attend_in_one_call(query, key, value, cu_seqlens, longest=rows, window=self.window)
        return attend_by_sequence(query, key, value, cu_seqlens, window=self.window)

    def step(self, hidden: Tensor, state: WindowState, active: Tensor | None = None) -> Tensor:
        """Mix one more row of each of S sequences, [S, d] to [S, d]; active ones' state is updated in place."""
        query, key, value = self._rotated(self.qkv(hidden), state.position)
        mask = state.add(key, value, active)[:, None, None]
        keys, values = (ring.transpose(1, 2) for ring in (state.keys, state.values))
        return self.out_proj(attend_to_cache(query[:, :, None], keys, values, mask).flatten(1))

    def empty_state(self, sequences: int) -> WindowState:
        weight = self.qkv.weight
        ring = weight.new_zeros(sequences, self.window, self.heads, self.head_dim)
        return WindowState(ring, ring.clone(), torch.zeros(sequences, dtype=torch.int64, device=weight.device))

    def _rotated(self, qkv: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys turned by their positions, int64 [T], and values: each [T, heads, head_dim]."""
        query, key, value = qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(1)
        wide = accumulation_dtype(qkv.dtype)
        exponent = torch.arange(0, self.head_dim, 2, device=qkv.device, dtype=wide) / self.head_dim
        angle = place[:, None, None].to(wide) * ROTARY_BASE**-exponent  # [T, 1, head_dim / 2]
        cos, sin = angle.cos(), angle.sin()

        def turn(x: Tensor) -> Tensor:
            one, two = x.chunk(2, dim=-1)
            return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(x.dtype)

        return turn(query), turn(key), value
