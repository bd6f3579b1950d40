"""The scan's Triton kernels: their launchers.

Three tilings of each sequence, all from its first byte: *chunks* of Q bytes, the unit of matrix products; *spans* of
two chunks, at which the backward pass keeps states; *segments* of SEGMENT bytes, one program each and head. Sequences
longer than a segment get a walk over states alone beforehand. Tiles are numbered as ``launch.sequence_of_tile`` says.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from bytekernels.launch import compute_capability, on_device, search_steps, sum_parts, with_dense_rows
from bytekernels.ssd.triton.backward import inputs_kernel, outer_kernel
from bytekernels.ssd.triton.configurations import chunk_length, configuration
from bytekernels.ssd.triton.forward import scan_kernel
from bytekernels.ssd.triton.states import carry_kernel, walk_kernel
from bytekernels.ssd.triton.step import mamba2_step

__all__ = ["GREATEST_HEADDIM", "GREATEST_STATE", "mamba2_step", "ssd_scan", "ssd_scan_backward"]

SEGMENT = 8192  # bytes; a multiple of a span
GREATEST_HEADDIM, GREATEST_STATE = 128, 256


@dataclass(frozen=True)
class _Call:
    """What the launches of one call share: inputs with strided rows, sizes, block sizes, options."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    cu_seqlens: Tensor
    z: Tensor | None
    bias: Tensor | None
    softplus: bool
    limits: tuple[float, float]

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def search(self) -> tuple[int, int]:
        return self.sequences, search_steps(self.sequences)

    @property
    def sizes(self) -> dict[str, int]:
        groups, d_state = self.B.shape[1:]
        return dict(H=self.x.shape[1], P=self.x.shape[2], N=d_state, GROUPS=groups)

    @property
    def chunk(self) -> int:
        return chunk_length(self.x.dtype, compute_capability(self.x))

    def configuration(self, kernel: str) -> dict[str, Any]:
        arch, gated = compute_capability(self.x), self.z is not None
        return configuration(kernel, self.x.dtype, arch, self.x.shape[2], self.B.shape[2], gated)

    def segments_by_heads(self, options: dict[str, Any]) -> tuple[int, int]:
        """The grid of a kernel that walks segments."""
        return self.tiles(SEGMENT) * self.sizes["H"], triton.cdiv(self.sizes["P"], options["BLOCK_P"])

    def tiles(self, length: int) -> int:
        """Numbers that tiles of ``length`` bytes take at most."""
        return len(self.x) // length + self.sequences

    def walk(
        self, dy: Tensor | None, start: Tensor | None, *, spans: Tensor | None = None, end: Tensor | None = None
    ) -> None:
        """Walk all segments, forward with x and B, or back with dy and C."""
        carry = self.carry(dy, start)
        self._walk(dy, start, carry, spans, end, None, None)

    def carry(self, dy: Tensor | None, start: Tensor | None) -> Tensor | None:
        """The state that each segment is entered with: float32 [segments, H, P, N], or None where none is long enough.

        Forward by default; with dy the states' gradients, from the end.
        """
        if len(self.x) <= SEGMENT:
            return None
        heads, headdim, d_state = (self.sizes[name] for name in "HPN")
        segments = self.tiles(SEGMENT)
        gain = self.x.new_empty(segments, heads, headdim, d_state, dtype=torch.float32)
        keep = self.x.new_empty(segments, heads, dtype=torch.float32)
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
        reverse = dy is not None
        rows, outer = (self.x, self.B) if dy is None else (dy, self.C)
        gate = self.z if reverse else None
        if not self.sequences:
            return
        options = self.configuration("walk")
        walk_kernel[self.segments_by_heads(options)](
            rows,
            gate,
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
            *self.search,
            *self.limits,
            rows.stride(0),
            0 if gate is None else gate.stride(0),
            outer.stride(0),
            self.dt.stride(0),
            **self.sizes,
            SOFTPLUS=self.softplus,
            REVERSE=reverse,
            SEGMENT=SEGMENT,
            SPAN=2 * self.chunk,
            **options,
        )


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    call = _call(x, dt, A, B, C, cu_seqlens, z, dt_bias, dt_softplus, dt_min, dt_max)
    D, initial_states = _dense(D), _dense(initial_states)
    y = x.new_empty(x.shape)
    final_states = x.new_empty(call.sequences, *x.shape[1:], B.shape[2], dtype=torch.float32)
    with on_device(x):
        carry = call.carry(None, initial_states)
        if call.sequences:
            options = call.configuration("scan")
            scan_kernel[call.segments_by_heads(options)](
                call.x,
                call.dt,
                call.A,
                call.B,
                call.C,
                call.cu_seqlens,
                D,
                call.z,
                call.bias,
                initial_states,
                carry,
                y,
                final_states,
                *call.search,
                *call.limits,
                call.x.stride(0),
                call.dt.stride(0),
                call.B.stride(0),
                call.C.stride(0),
                0 if call.z is None else call.z.stride(0),
                **call.sizes,
                SOFTPLUS=dt_softplus,
                SEGMENT=SEGMENT,
                **options,
            )
    return y, final_states


def ssd_scan_backward(
    dy: Tensor,
    dfinal_states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_states: Tensor | None,
    *,
    dx: Tensor | None = None,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    ddt: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the inputs in their order; dx, dB, dC and ddt are written where given, their rows may be strided."""
    call = _call(x, dt, A, B, C, cu_seqlens, z, dt_bias, dt_softplus, dt_min, dt_max)
    D, initial_states = _dense(D), _dense(initial_states)
    dy, dfinal_states = dy.contiguous(), dfinal_states.contiguous()
    dx, dB, dC, ddt = (
        value.new_empty(value.shape) if out is None else out for value, out in ((x, dx), (B, dB), (C, dC), (dt, ddt))
    )
    dz = None if z is None else z.new_empty(z.shape)
    dinitial = None if initial_states is None else torch.empty_like(initial_states, dtype=torch.float32)
    heads, headdim, d_state = (call.sizes[name] for name in "HPN")
    spans = call.tiles(2 * call.chunk)
    states, costates = (x.new_empty(spans, heads, headdim, d_state) for _ in range(2))
    parts = x.new_empty(2 * spans, 3 * heads, dtype=torch.float32)
    strides = [value.stride(0) for value in (call.x, call.dt, call.B, call.C)]
    strides.append(0 if call.z is None else call.z.stride(0))
    with on_device(x):
        call.walk(None, initial_states, spans=states)
        call.walk(dy, dfinal_states, spans=costates, end=dinitial)
        if spans:
            inputs_kernel[(2 * spans * heads,)](
                dy,
                call.x,
                call.dt,
                call.A,
                call.B,
                call.C,
                call.cu_seqlens,
                D,
                call.z,
                call.bias,
                states,
                costates,
                dx,
                ddt,
                dz,
                parts,
                *call.search,
                *call.limits,
                *strides,
                dx.stride(0),
                ddt.stride(0),
                **call.sizes,
                SOFTPLUS=dt_softplus,
                **call.configuration("inputs"),
            )
            options = call.configuration("outer")
            blocks = triton.cdiv(d_state, options["BLOCK_N"])
            outer_kernel[(4 * blocks * call.sizes["GROUPS"] * spans,)](
                dy,
                call.x,
                call.dt,
                call.A,
                call.B,
                call.C,
                call.cu_seqlens,
                call.z,
                call.bias,
                states,
                costates,
                dB,
                dC,
                *call.search,
                *call.limits,
                *strides,
                dB.stride(0),
                dC.stride(0),
                **call.sizes,
                SOFTPLUS=dt_softplus,
                **options,
            )
        sums = sum_parts(parts, torch.float32).view(3, heads)
    dA, dD, dbias = (
        None if like is None else torch.empty_like(like).copy_(part)
        for part, like in zip(sums, (call.A, D, call.bias), strict=True)
    )
    if initial_states is not None and dinitial is not None:
        dinitial = dinitial.to(initial_states.dtype)
    gradients = [dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial]
    return [gradient for gradient in gradients if gradient is not None]


def _call(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> _Call:
    x, dt, B, C = (with_dense_rows(value) for value in (x, dt, B, C))
    z = None if z is None else with_dense_rows(z)
    limits = float(dt_min), float(dt_max)
    return _Call(x, dt, A.contiguous(), B, C, cu_seqlens.contiguous(), z, _dense(dt_bias), dt_softplus, limits)


def _dense(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()
