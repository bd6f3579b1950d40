"""The shape of a byte-level model."""

import math
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

DECHUNK_WEIGHTS = ("hold", "causal", "lookahead")
ENCODERS = ("mamba2", "attention")
ROUTERS = ("integrated", "split")
SUFFIX_SCOPES = ("sequence", "chunk")
# What transformers itself may write into a config.json beside its own fields.
FOREIGN_SETTINGS = {
    *("attn_implementation", "auto_map", "bos_token_id", "eos_token_id", "experts_implementation", "num_labels"),
    *("pad_token_id", "per_layer_config", "quantization_config", "tie_word_embeddings", "use_cache"),
}


class ByteLMConfig(PreTrainedConfig):
    """Configuration of :class:`models.ByteLM`.

    Attributes:
        core: the teacher's own configuration, as a dictionary with its ``model_type``.
        width: d, the width of the byte-level stacks.
        encoder: the encoder's blocks: ``mamba2``, or ``attention`` for transformer blocks of as many parameters, whose
            bytes attend to the nearest ones before them.
        encoder_layers: blocks before the router.
        decoder_layers: Mamba2 blocks after the dechunk.
        state_size: N, the Mamba2 state per channel.
        expand: Mamba2 inner width over ``width``.
        head_dim: P, channels per head of Mamba2 or attention.
        num_groups: G, groups that share B and C.
        conv_kernel: K, width of the causal convolution.
        attention_window: bytes that one sees in a block of ``encoder="attention"``, itself among them. L blocks reach
            ``L x (attention_window - 1)`` bytes back; a decoding state keeps as many keys and values a block.
        router: ``integrated`` (reads the encoder's states) or ``split`` (an encoder of its own, of Mamba2 blocks).
        router_layers: blocks of a split router's encoder.
        suffix_bytes: bytes of the teacher's vocabulary, whose longest string at each byte is a feature of the encoder
            (:mod:`models.suffix`); 0 for no suffix features.
        suffix_scope: where that string may begin: anywhere in the ``sequence``, or inside the ``chunk`` that it ends.
        bridge_inner: inner width of the SwiGLUs between ``width`` and the core's width.
        router_inner: inner width of the router's two SwiGLUs.
        lookahead: True for a router of chunk ends that sees the next byte, False for H-Net's chunk starts.
        constrain_chunks: the chunks are the likeliest by the router whose bytes are strings of the teacher's vocabulary
            (:func:`bytekernels.constrain_ends`).
        chunk_cost: taken off the router's log-odds of each end where chunks are held to the vocabulary, in nats, 0
            to 10: the higher it is, the fewer and longer they are.
        dechunk: ``hold`` (newest finished chunk), ``causal`` (EMA weight from a head on the byte's own state) or
            ``lookahead`` (EMA weight is the router's probability; leaks the next byte and is refused by the scorer).
        token_head: the model carries the teacher's token head, for stage 1 and for distillation in stage 2.
        draft_head: the decoder has a second head, which drafts the byte after the next (multi-byte prediction).
        marginal_head: what the token head says of the next byte is added to the joint head's logits
            (:mod:`models.marginal_head`). The token head then stays in stage 2 and after, and the vocabulary is that of
            the suffix features.
        norm_eps: epsilon of the byte-level RMS norms.

    Raises:
        ValueError: a value of the wrong type or out of range, sizes that do not fit together, or a setting that neither
            this class nor transformers knows.
    """

    model_type = "bytekernels"

    core: dict[str, Any] | None = None
    width: int = 1536
    encoder: str = "mamba2"
    encoder_layers: int = 4
    decoder_layers: int = 4
    state_size: int = 128
    expand: int = 2
    head_dim: int = 64
    num_groups: int = 1
    conv_kernel: int = 4
    attention_window: int = 256
    router: str = "integrated"
    router_layers: int = 2
    suffix_bytes: int = 0
    suffix_scope: str = "sequence"
    bridge_inner: int = 8192
    router_inner: int = 8192
    lookahead: bool = True
    constrain_chunks: bool = False
    chunk_cost: float = 0.0
    dechunk: str = "hold"
    token_head: bool = True
    draft_head: bool = False
    marginal_head: bool = False
    norm_eps: float = 1e-5

    @property
    def inner_width(self) -> int:
        return self.width * self.expand

    @property
    def num_heads(self) -> int:
        return self.inner_width // self.head_dim

    @property
    def attention_inner(self) -> int:
        """Inner width of the MLP in a block of windowed attention, which then has as many parameters as a Mamba2 block.

        It is the nearest multiple of 16, or 0 where attention takes all of them.
        """
        conv_channels = self.inner_width + 2 * self.num_groups * self.state_size
        projections = self.width * (2 * self.inner_width + conv_channels + self.num_heads)
        mixer = projections + conv_channels * (self.conv_kernel + 1) + 3 * self.num_heads + self.inner_width
        attention = 4 * self.width**2 + self.width  # and the second norm
        return max(0, round((mixer - attention) / (3 * self.width) / 16) * 16)

    @property
    def token_head_is_spare(self) -> bool:
        """Whether the model has a token head that nothing after stage 2 reads."""
        return self.token_head and not self.marginal_head

    @property
    def core_width(self) -> int:
        return self.core_config().hidden_size

    def core_config(self) -> PreTrainedConfig:
        """The core's configuration as an object of its own class.

        Keys that a teacher's config.json brings beside its class's own settings are ignored, as transformers does: real
        ones have many. Only a misspelt one, in place of a setting that is not there, is refused.

        Raises:
            ValueError: there is no core, it does not say its ``model_type``, it is no causal language model's, a
                setting is misspelt, or transformers refuses it.
        """
        if not self.core or "model_type" not in self.core:
            raise ValueError(f"config.core must be the teacher's configuration with its model_type, got {self.core}")
        settings = {key: value for key, value in self.core.items() if key != "model_type"}
        if self.core["model_type"] not in CONFIG_MAPPING:
            raise ValueError(
                f"config.core has model_type={self.core['model_type']!r}, which transformers "
                f"{transformers.__version__} lacks: correct it, or install a version that has it"
            )
        kind = CONFIG_MAPPING[self.core["model_type"]]
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"config.core has model_type={self.core['model_type']!r}, which is no causal language model: "
                "give a teacher's configuration, such as llama's"
            )
        missing = {field.name for field in fields(kind)} - settings.keys()
        for name in settings.keys() - {field.name for field in fields(kind)} - kind.attribute_map.keys():
            if near := get_close_matches(name, missing, n=1, cutoff=0.9):
                raise ValueError(
                    f"config.core: {self.core['model_type']} has no setting {name!r} (got {settings[name]!r}): "
                    f"did you mean {near[0]!r}?"
                )
        try:
            return AutoConfig.for_model(self.core["model_type"], **settings)
        except StrictDataclassError as error:
            raise ValueError(f"config.core is not a {self.core['model_type']} model's: {error.__cause__}") from None

    def __post_init__(self, **others: Any) -> None:
        for name, value in others.items():
            if name not in FOREIGN_SETTINGS and not name.startswith("_") and not hasattr(PreTrainedConfig, name):
                raise ValueError(_unknown_setting(name, value))
        super().__post_init__(**others)
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        if (kind := _own_fields().get(name)) is not None:
            _check_value(name, value, kind)
        super().__setattr__(name, value)

    def validate(self) -> None:
        """Refuse sizes that do not fit together (called when the configuration is made and when it is saved)."""
        if self.inner_width % self.head_dim:
            raise ValueError(f"head_dim must divide width x expand = {self.inner_width}, got {self.head_dim}")
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_groups must divide the {self.num_heads} heads, got {self.num_groups}")
        if self.conv_kernel < 2:
            raise ValueError(f"conv_kernel must be at least 2, got {self.conv_kernel}")
        for name, choices in (
            ("dechunk", DECHUNK_WEIGHTS),
            ("encoder", ENCODERS),
            ("router", ROUTERS),
            ("suffix_scope", SUFFIX_SCOPES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.encoder == "attention":
            if self.width % self.head_dim or self.head_dim % 2:
                raise ValueError(
                    f"encoder='attention' needs an even head_dim that divides width {self.width}, got {self.head_dim}"
                )
            if not self.attention_inner:
                raise ValueError(
                    "encoder='attention' has the parameters of Mamba2 blocks, and too few are left for an MLP with "
                    f"expand={self.expand} and state_size={self.state_size}: raise expand to 2 or more"
                )
        if self.dechunk == "lookahead" and not self.lookahead:
            raise ValueError("dechunk='lookahead' needs a lookahead router; H-Net's router is causal: use 'causal'")
        if self.suffix_scope == "chunk" and not self.lookahead:
            raise ValueError("suffix_scope='chunk' needs lookahead=True: H-Net's chunks have no known last byte")
        if self.marginal_head and not (self.token_head and self.suffix_bytes and self.lookahead):
            raise ValueError(
                "marginal_head=True needs the token head, the vocabulary of suffix features, and chunk ends: "
                f"set token_head=True (got {self.token_head}), suffix features (got suffix_bytes={self.suffix_bytes}) "
                f"and lookahead=True (got {self.lookahead})"
            )
        if self.constrain_chunks and not (self.suffix_bytes and self.lookahead):
            raise ValueError(
                "constrain_chunks=True needs the vocabulary of suffix features, and chunk ends: set suffix features "
                f"(got suffix_bytes={self.suffix_bytes}) and lookahead=True (got lookahead={self.lookahead})"
            )
        if self.constrain_chunks and (self.draft_head or self.dechunk == "lookahead"):
            raise ValueError(
                "constrain_chunks=True goes with no part that asks the router alone: use draft_head=False (got "
                f"draft_head={self.draft_head}) and dechunk='hold' or 'causal' (got dechunk={self.dechunk!r})"
            )
        if self.draft_head and not self.lookahead:
            raise ValueError("draft_head=True needs lookahead=True: with H-Net's causal router a draft serves nothing")


def _own_fields() -> dict[str, Any]:
    """The types of the settings that :class:`ByteLMConfig` adds to transformers' own."""
    return {field.name: field.type for field in fields(ByteLMConfig) if field.name in ByteLMConfig.__annotations__}


def _check_value(name: str, value: Any, kind: Any) -> None:
    if kind is bool:
        fits, wanted = isinstance(value, bool), "True or False"
    elif kind is int:
        least = 0 if name.endswith("_layers") or name == "suffix_bytes" else 1
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        wanted = f"an int of at least {least}"
    elif kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and (0 <= value <= 10 if name == "chunk_cost" else 0 < value < math.inf)
        wanted = "a number from 0 to 10" if name == "chunk_cost" else "a positive number"
    elif kind is str:
        fits, wanted = isinstance(value, str), "a string"
    else:
        fits, wanted = value is None or isinstance(value, dict), "the teacher's configuration as a dictionary"
    if not fits:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _unknown_setting(name: str, value: Any) -> str:
    near = get_close_matches(name, _own_fields(), n=1, cutoff=0.75)
    fix = f"did you mean {near[0]!r}?" if near else f"remove it; the settings are {', '.join(_own_fields())}"
    return f"ByteLMConfig has no setting {name!r} (got {value!r}): {fix}"
