"""The shape of a byte-level model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

DECHUNK_WEIGHTS = ("hold", "causal", "lookahead")


@strict
class ByteLMConfig(PreTrainedConfig):
    """Configuration of :class:`models.ByteLM`.

    Attributes:
        core: the teacher's own configuration, as a dictionary with its ``model_type``.
        width: d, the width of the byte-level stacks.
        encoder_layers: Mamba2 blocks before the router.
        decoder_layers: Mamba2 blocks after the dechunk.
        state_size: N, the Mamba2 state per channel.
        expand: Mamba2 inner width over ``width``.
        head_dim: P, channels per Mamba2 head.
        num_groups: G, groups that share B and C.
        conv_kernel: K, width of the causal convolution.
        bridge_inner: inner width of the SwiGLUs between ``width`` and the core's width.
        router_inner: inner width of the router's two SwiGLUs.
        lookahead: True for a router of chunk ends that sees the next byte, False for H-Net's chunk starts.
        dechunk: ``hold`` (newest finished chunk), ``causal`` (EMA weight from a head on the byte's own state) or
            ``lookahead`` (EMA weight is the router's probability; leaks the next byte and is refused by the scorer).
        token_head: the model carries the teacher's token head, for stage 1 and for distillation in stage 2.
        norm_eps: epsilon of the byte-level RMS norms.
    """

    model_type = "bytekernels"

    core: dict[str, Any] | None = None
    width: int = 1536
    encoder_layers: int = 4
    decoder_layers: int = 4
    state_size: int = 128
    expand: int = 2
    head_dim: int = 64
    num_groups: int = 1
    conv_kernel: int = 4
    bridge_inner: int = 8192
    router_inner: int = 8192
    lookahead: bool = True
    dechunk: str = "hold"
    token_head: bool = True
    norm_eps: float = 1e-5

    @property
    def inner_width(self) -> int:
        return self.width * self.expand

    @property
    def num_heads(self) -> int:
        return self.inner_width // self.head_dim

    @property
    def core_width(self) -> int:
        return self.core_config().hidden_size

    def core_config(self) -> PreTrainedConfig:
        """The core's configuration as an object of its own class.

        Raises:
            ValueError: there is no core, or it does not say its ``model_type``.
        """
        if not self.core or "model_type" not in self.core:
            raise ValueError(f"config.core must be the teacher's configuration with its model_type, got {self.core}")
        settings = {key: value for key, value in self.core.items() if key != "model_type"}
        return AutoConfig.for_model(self.core["model_type"], **settings)

    def validate_architecture(self) -> None:
        """Refuse sizes that do not fit together (called when the configuration is made)."""
        if self.inner_width % self.head_dim:
            raise ValueError(f"head_dim must divide width x expand = {self.inner_width}, got {self.head_dim}")
        if self.num_groups < 1 or self.num_heads % self.num_groups:
            raise ValueError(f"num_groups must divide the {self.num_heads} heads, got {self.num_groups}")
        if self.conv_kernel < 2:
            raise ValueError(f"conv_kernel must be at least 2, got {self.conv_kernel}")
        if self.dechunk not in DECHUNK_WEIGHTS:
            raise ValueError(f"dechunk must be one of {', '.join(DECHUNK_WEIGHTS)}, got {self.dechunk!r}")
        if self.dechunk == "lookahead" and not self.lookahead:
            raise ValueError("dechunk='lookahead' needs a lookahead router; H-Net's router is causal: use 'causal'")
