"""The launches of one call of the scan or of its backward, and what they share."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from bytekernels.launch import compute_capability, row_pieces, search_steps, sum_parts, with_dense_rows
from bytekernels.ssd.triton.backward import gate_kernel, inputs_kernel, outer_kernel
from bytekernels.ssd.triton.configurations import chunk_length, configuration
from bytekernels.ssd.triton.forward import scan_kernel
from bytekernels.ssd.triton.states import carry_kernel, walk_kernel

SEGMENT = 8192  # bytes; a multiple of a span


@dataclass
class Call:
    """The inputs, and how Delta is made of dt. Its methods launch kernels, whose outputs may have strided rows."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    cu_seqlens: Tensor
    D: Tensor | None
    bias: Tensor | None
    softplus: bool
    limits: tuple[float, float]

    def __post_init__(self) -> None:
        self.x, self.dt, self.B, self.C = (with_dense_rows(value) for value in (self.x, self.dt, self.B, self.C))
        self.D, self.bias = (None if value is None else value.contiguous() for value in (self.D, self.bias))
        self.A, self.cu_seqlens = self.A.contiguous(), self.cu_seqlens.contiguous()

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return (*self.x.shape[1:], self.B.shape[2])

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def chunk(self) -> int:
        return chunk_length(self.x.dtype, compute_capability(self.x))

    def tiles(self, length: int) -> int:
        """Numbers that tiles of ``length`` bytes take at most."""
        return len(self.x) // length + self.sequences

    def scan(self, z: Tensor | None, initial_states: Tensor | None, y: Tensor, final_states: Tensor) -> None:
        if not self.sequences:
            return
        carry = self._carry(None, initial_states)
        options = self._options("scan", gated=z is not None)
        scan_kernel[self._segments(options)](
            self.x,
            self.dt,
            self.A,
            self.B,
            self.C,
            self.cu_seqlens,
            self.D,
            z,
            self.bias,
            initial_states,
            carry,
            y,
            final_states,
            *self._scalars,
            *self._strides,
            0 if z is None else z.stride(0),
            SEGMENT=SEGMENT,
            **self._constants,
            **options,
        )

    def gate(self, dy: Tensor, z: Tensor, y: Tensor, dz: Tensor) -> None:
        """y, that of before the gate, becomes its gradient; dz is written."""
        rows, width = len(y), y[:1].numel()
        block_t, block_d, options = row_pieces(width)
        if rows:
            gate_kernel[(triton.cdiv(rows, block_t), triton.cdiv(width, block_d))](
                dy, y, z, dz, rows, z.stride(0), WIDTH=width, BLOCK_T=block_t, BLOCK_D=block_d, **options
            )

    def walk(self, dy: Tensor | None, start: Tensor | None, spans: Tensor, end: Tensor | None) -> None:
        """The states that spans are entered with: forward, or with dy their gradients, from the end; and the last."""
        if self.sequences:
            self._walk(dy, start, self._carry(dy, start), spans, end, None, None)

    def inputs(self, dy: Tensor, states: Tensor, costates: Tensor, dx: Tensor, ddt: Tensor) -> Tensor:
        """dx and ddt are written. Returns the gradients of A, D and the bias, float32 [3, H]."""
        heads, spans = self.x.shape[1], len(states)
        parts = self.x.new_empty(2 * spans, 3 * heads, dtype=torch.float32)
        if spans:
            inputs_kernel[(2 * spans * heads,)](
                dy,
                self.x,
                self.dt,
                self.A,
                self.B,
                self.C,
                self.cu_seqlens,
                self.D,
                self.bias,
                states,
                costates,
                dx,
                ddt,
                parts,
                *self._scalars,
                *self._strides,
                dx.stride(0),
                ddt.stride(0),
                **self._constants,
                **self._options("inputs"),
            )
        return sum_parts(parts, torch.float32).view(3, heads)

    def outer(self, dy: Tensor, states: Tensor, costates: Tensor, dB: Tensor, dC: Tensor) -> None:
        """dB and dC are written."""
        groups, d_state = self.B.shape[1:]
        options = self._options("outer")
        if len(states):
            outer_kernel[(4 * triton.cdiv(d_state, options["BLOCK_N"]) * groups * len(states),)](
                dy,
                self.x,
                self.dt,
                self.A,
                self.B,
                self.C,
                self.cu_seqlens,
                self.bias,
                states,
                costates,
                dB,
                dC,
                *self._scalars,
                *self._strides,
                dB.stride(0),
                dC.stride(0),
                **self._constants,
                **options,
            )

    @property
    def _scalars(self) -> tuple[int, int, float, float]:
        return self.sequences, search_steps(self.sequences), *self.limits

    @property
    def _strides(self) -> list[int]:
        return [value.stride(0) for value in (self.x, self.dt, self.B, self.C)]

    @property
    def _constants(self) -> dict[str, int | bool]:
        (heads, headdim), (groups, d_state) = self.x.shape[1:], self.B.shape[1:]
        return dict(H=heads, P=headdim, N=d_state, GROUPS=groups, SOFTPLUS=self.softplus)

    def _options(self, kernel: str, gated: bool = False) -> dict[str, Any]:
        _, headdim, d_state = self.state_shape
        return configuration(kernel, self.x.dtype, compute_capability(self.x), headdim, d_state, gated)

    def _segments(self, options: dict[str, Any]) -> tuple[int, int]:
        """The grid of a kernel that walks segments."""
        return self.tiles(SEGMENT) * self.x.shape[1], triton.cdiv(self.x.shape[2], options["BLOCK_P"])

    def _carry(self, dy: Tensor | None, start: Tensor | None) -> Tensor | None:
        """The state that each segment is entered with, float32 [segments, H, P, N]; None where all have but one."""
        if len(self.x) <= SEGMENT:
            return None
        heads, headdim, d_state = self.state_shape
        gain = self.x.new_empty(self.tiles(SEGMENT), *self.state_shape, dtype=torch.float32)
        keep = self.x.new_empty(self.tiles(SEGMENT), heads, dtype=torch.float32)
        self._walk(dy, None, None, None, None, gain, keep)
        block = min(4096, triton.next_power_of_2(headdim * d_state))
        carry_kernel[(self.sequences * heads, triton.cdiv(headdim * d_state, block))](
            self.cu_seqlens,
            start,
            gain,
            keep,
            H=heads,
            PN=headdim * d_state,
            REVERSE=dy is not None,
            SEGMENT=SEGMENT,
            BLOCK=block,
            num_warps=4,
        )
        return gain

    def _walk(
        self,
        dy: Tensor | None,
        start: Tensor | None,
        carry: Tensor | None,
        spans: Tensor | None,
        end: Tensor | None,
        gain: Tensor | None,
        keep: Tensor | None,
    ) -> None:
        rows, outer = (self.x, self.B) if dy is None else (dy, self.C)
        options = self._options("walk")
        walk_kernel[self._segments(options)](
            rows,
            outer,
            self.dt,
            self.A,
            self.bias,
            self.cu_seqlens,
            start,
            carry,
            spans,
            end,
            gain,
            keep,
            *self._scalars,
            rows.stride(0),
            outer.stride(0),
            self.dt.stride(0),
            REVERSE=dy is not None,
            SEGMENT=SEGMENT,
            SPAN=2 * self.chunk,
            **self._constants,
            **options,
        )
