"""The byte-level stacks: residual Mamba2 blocks (Dao & Gu 2024) over packed bytes."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import bytekernels
from models.config import ByteLMConfig
from models.layers import GatedRMSNorm, RMSNorm


@dataclass
class MixerState:
    """What one mixer remembers of S sequences: the convolution's last inputs and the state-space state, both fp32."""

    conv: Tensor  # [S, C, K-1]
    ssm: Tensor  # [S, H, P, N]


class Mamba2Mixer(nn.Module):
    """Mamba2's sequence mixer. Parameters are named as in the public ``Mamba2`` module, so its state dicts load."""

    def __init__(self, config: ByteLMConfig, num_layers: int) -> None:
        super().__init__()
        self.inner, self.heads, self.head_dim = config.inner_width, config.num_heads, config.head_dim
        self.groups, self.state_size = config.num_groups, config.state_size
        conv_channels = self.inner + 2 * self.groups * self.state_size
        self.in_proj = nn.Linear(config.width, self.inner + conv_channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(conv_channels, conv_channels, config.conv_kernel, groups=conv_channels)
        # Step sizes start log-uniform in [1e-3, 1e-1], decay rates uniform in [1, 16], as the source has them.
        step = torch.exp(torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(self.inner, self.inner // self.groups, config.norm_eps)
        self.out_proj = nn.Linear(self.inner, config.width, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(num_layers)

    def _split(self, conved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = conved.split([self.inner, *[self.groups * self.state_size] * 2], dim=-1)
        x = x.unflatten(-1, (self.heads, self.head_dim))  # [T, H, P]
        return x, B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.in_proj(hidden).split([self.inner, self.conv1d.in_channels, self.heads], dim=-1)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Mix each sequence of a packed batch: [T, d] to [T, d]."""
        z, xbc, dt = self._project(hidden)
        xbc = bytekernels.causal_conv1d(xbc, self.conv1d.weight[:, 0], self.conv1d.bias, cu_seqlens)
        x, B, C = self._split(xbc)
        A = -torch.exp(self.A_log.float())
        y = bytekernels.ssd_scan(x, dt, A, B, C, cu_seqlens, D=self.D, dt_bias=self.dt_bias, dt_softplus=True)
        return self.out_proj(self.norm(y.flatten(1), z))

    def step(self, hidden: Tensor, state: MixerState) -> Tensor:
        """Mix one more row of each of S sequences, [S, d] to [S, d]; the state is updated in place."""
        z, xbc, dt = self._project(hidden)
        xbc = bytekernels.causal_conv1d_step(xbc, state.conv, self.conv1d.weight[:, 0], self.conv1d.bias)
        x, B, C = self._split(xbc)
        A = -torch.exp(self.A_log.float())
        y = bytekernels.mamba2_step(x, dt, A, B, C, state.ssm, D=self.D, dt_bias=self.dt_bias, dt_softplus=True)
        return self.out_proj(self.norm(y.flatten(1), z))

    def empty_state(self, sequences: int) -> MixerState:
        kernel, device = self.conv1d.kernel_size[0], self.D.device
        return MixerState(
            torch.zeros(sequences, self.conv1d.in_channels, kernel - 1, device=device),
            torch.zeros(sequences, self.heads, self.head_dim, self.state_size, device=device),
        )


class Block(nn.Module):
    """``residual + mixer(norm(residual))``; the residual sum is carried in fp32 and fused into the next norm."""

    def __init__(self, config: ByteLMConfig, num_layers: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = Mamba2Mixer(config, num_layers)

    def forward(self, x: Tensor, residual: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """The mixer's output [T, d], and the sum before it, which it is still to be added to."""
        x, residual = self.norm(x, residual)
        return self.mixer(x, cu_seqlens), residual

    def step(self, x: Tensor, residual: Tensor | None, state: MixerState) -> tuple[Tensor, Tensor]:
        x, residual = self.norm(x, residual)
        return self.mixer.step(x, state), residual


class LocalStack(nn.Module):
    """Mamba2 blocks and a last norm over packed bytes."""

    def __init__(self, config: ByteLMConfig, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, num_layers) for _ in range(num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T, d] to [T, d], each sequence by itself."""
        residual = None
        for block in self._typed_blocks:
            x, residual = block(x, residual, cu_seqlens)
        return self.norm(x, residual)[0]

    def step(self, x: Tensor, states: list[MixerState]) -> Tensor:
        """One more row of each of S sequences, [S, d] to [S, d]; the states are updated in place."""
        residual = None
        for block, state in zip(self._typed_blocks, states, strict=True):
            x, residual = block.step(x, residual, state)
        return self.norm(x, residual)[0]

    def empty_state(self, sequences: int) -> list[MixerState]:
        return [block.mixer.empty_state(sequences) for block in self._typed_blocks]

    @property
    def _typed_blocks(self) -> list[Block]:
        return cast(list[Block], self.blocks)
