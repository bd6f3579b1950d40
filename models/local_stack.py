"""The byte-level stacks: residual blocks over packed bytes, of Mamba2 mixers (Dao & Gu 2024) or windowed attention."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import bytekernels
from bytekernels import MixerState
from bytekernels.ragged import accumulation_dtype
from models.config import ByteLMConfig
from models.decoding import BlockState
from models.layers import RMSNorm, SwiGLU
from models.window_attention import WindowAttention


class Mamba2Mixer(nn.Module):
    """Mamba2's sequence mixer. Parameters are named as in the public ``Mamba2`` module, so its state dicts load."""

    def __init__(self, config: ByteLMConfig, num_layers: int) -> None:
        super().__init__()
        self.inner, self.heads, self.head_dim = config.inner_width, config.num_heads, config.head_dim
        self.groups, self.state_size, self.eps = config.num_groups, config.state_size, config.norm_eps
        conv_channels = self.inner + 2 * self.groups * self.state_size
        self.in_proj = nn.Linear(config.width, self.inner + conv_channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(conv_channels, conv_channels, config.conv_kernel, groups=conv_channels)
        # Step sizes start log-uniform in [1e-3, 1e-1], decay rates uniform in [1, 16], as the source has them.
        step = torch.exp(torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.inner, self.eps)  # as conv1d, a place for parameters: the op applies them
        self.out_proj = nn.Linear(self.inner, config.width, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(num_layers)

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        A = -torch.exp(self.A_log.float())
        return self.conv1d.weight[:, 0], self.conv1d.bias, A, self.D, self.dt_bias, self.norm.weight

    def forward(
        self, hidden: Tensor, cu_seqlens: Tensor, ids: Tensor | None = None, states: list[MixerState] | None = None
    ) -> Tensor:
        """Mix each sequence of a packed batch: [T, d] to [T, d].

        With ``ids`` (uint8 [T]) hidden is a table [256, d] of rows by byte value, and in_proj runs over it alone. To
        ``states`` the state is added from which :meth:`step` goes on.
        """
        mixed, final = bytekernels.mamba2_mixer(
            self.in_proj(hidden),
            *self._weights(),
            cu_seqlens,
            head_dim=self.head_dim,
            num_groups=self.groups,
            eps=self.eps,
            ids=ids,
            return_final_states=True,
        )
        if states is not None:
            states.append(MixerState.after(final))
        return self.out_proj(mixed)

    def step(self, hidden: Tensor, state: MixerState, active: Tensor | None = None) -> Tensor:
        """Mix one more row of each of S sequences, [S, d] to [S, d]; active ones' state is updated in place."""
        mixed = bytekernels.mamba2_mixer_step(
            self.in_proj(hidden),
            *self._weights(),
            state,
            head_dim=self.head_dim,
            num_groups=self.groups,
            eps=self.eps,
            active=active,
        )
        return self.out_proj(mixed)

    def empty_state(self, sequences: int) -> MixerState:
        channels, taps, dtype = self.conv1d.in_channels, self.conv1d.kernel_size[0], accumulation_dtype(self.D.dtype)
        sizes = (self.heads, self.head_dim, self.state_size)
        return MixerState.empty(sequences, channels, taps, *sizes, device=self.D.device, dtype=dtype)


class Block(GradientCheckpointingLayer):
    """``residual + mixer(norm(residual))``; the residual sum is carried in fp32 and fused into the next norm."""

    mixer_type: type[Mamba2Mixer] | type[WindowAttention] = Mamba2Mixer

    def __init__(self, config: ByteLMConfig, num_layers: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = self.mixer_type(config, num_layers)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cu_seqlens: Tensor,
        ids: Tensor | None = None,
        states: list[Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output [T, d], and the sum before it, which it is still to be added to.

        With ``ids`` (uint8 [T]) x is a table [256, d], and row t is ``x[ids[t]]``; there is no residual then. To
        ``states`` the mixer adds the state from which :meth:`step` goes on.
        """
        x, residual = self.norm(x, residual)
        if ids is not None:
            residual = bytekernels.byte_table(ids, residual)
        return self.after_mixer(self.mixer(x, cu_seqlens, ids, states), residual)

    def step(self, x: Tensor, residual: Tensor | None, state: Any, active: Tensor | None) -> tuple[Tensor, Tensor]:
        x, residual = self.norm(x, residual)
        return self.after_mixer(self.mixer.step(x, state, active), residual)

    def after_mixer(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What follows the mixer in a block of this kind."""
        return x, residual


class AttentionBlock(Block):
    """A pre-norm transformer block.

    Its MLP is as wide as a Mamba2 block of the same configuration has parameters for
    (:attr:`models.ByteLMConfig.attention_inner`).
    """

    mixer_type = WindowAttention

    def __init__(self, config: ByteLMConfig, num_layers: int) -> None:
        super().__init__(config, num_layers)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.attention_inner, config.width)
        with torch.no_grad():
            self.mlp.down.weight /= math.sqrt(2 * num_layers)

    def after_mixer(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual


BLOCKS = {"mamba2": Block, "attention": AttentionBlock}


class LocalStack(nn.Module):
    """Blocks of a kind (a key of :data:`BLOCKS`) and a last norm over packed bytes."""

    def __init__(self, config: ByteLMConfig, num_layers: int, kind: str = "mamba2") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BLOCKS[kind](config, num_layers) for _ in range(num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, ids: Tensor | None = None, states: list[BlockState] | None = None
    ) -> Tensor:
        """[T, d] to [T, d], each sequence by itself.

        With ``ids`` (uint8 [T]) x is a table [256, d], and row t is ``x[ids[t]]``: the first norm and projection, which
        see nothing but the byte, then run over 256 rows in place of T. To ``states`` each block adds the state from
        which :meth:`step` goes on.
        """
        residual = None
        if ids is not None and not self.blocks:
            x = bytekernels.byte_table(ids, x)
        for block in self._typed_blocks:
            x, residual = block(x, residual, cu_seqlens, ids, states)
            ids = None
        return self.norm(x, residual)[0]

    def step(self, x: Tensor, states: list[BlockState], active: Tensor | None = None) -> Tensor:
        """One more row of each of S sequences, [S, d] to [S, d].

        Args:
            x: [S, d].
            states: updated in place.
            active: bool [S] or None for all; the others' states stay, and their rows mean nothing.
        """
        residual = None
        for block, state in zip(self._typed_blocks, states, strict=True):
            x, residual = block.step(x, residual, state, active)
        return self.norm(x, residual)[0]

    def empty_state(self, sequences: int) -> list[BlockState]:
        return [block.mixer.empty_state(sequences) for block in self._typed_blocks]

    @property
    def _typed_blocks(self) -> list[Any]:
        return cast(list[Any], self.blocks)
