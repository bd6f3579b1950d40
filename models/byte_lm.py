"""The byte-level language model: encoder, router, core, dechunk, decoder, joint head."""

from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import bytekernels
from bytekernels import BOS, MixerState, Routing
from bytekernels.ragged import check_cu_seqlens
from models.config import ByteLMConfig
from models.core import Core
from models.dechunk import Dechunk
from models.layers import ByteEmbedding, SwiGLU
from models.local_stack import LocalStack
from models.router import Router

JOINT = 512  # next byte x "does a chunk end on it": entry b for going on, 256 + b for an end


class Encoder(nn.Module):
    """Bytes to states of the core's width: embedding, Mamba2 blocks, SwiGLU."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.embed = ByteEmbedding(config.width)
        self.stack = LocalStack(config, config.encoder_layers)
        self.bridge = SwiGLU(config.width, config.bridge_inner, config.core_width)

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.bridge(self.stack(self.embed.weight, cu_seqlens, ids))

    def step(self, ids: Tensor, states: list[MixerState]) -> Tensor:
        return self.bridge(self.stack.step(self.embed(ids), states))


class Decoder(nn.Module):
    """Dechunked states back to the byte-level width, the byte itself added again, Mamba2 blocks, the joint head."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.bridge = SwiGLU(config.core_width, config.bridge_inner, config.width)
        self.embed = ByteEmbedding(config.width)
        self.stack = LocalStack(config, config.decoder_layers)
        self.head = nn.Linear(config.width, JOINT, bias=False)

    def enter(self, u: Tensor, ids: Tensor) -> Tensor:
        return self.bridge(u) + self.embed(ids)

    def forward(self, u: Tensor, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.head(self.stack(self.enter(u, ids), cu_seqlens))

    def step(self, u: Tensor, ids: Tensor, states: list[MixerState]) -> Tensor:
        return self.head(self.stack.step(self.enter(u, ids), states))


class ByteLMOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: [T, 512]; row t predicts byte t+1 jointly with whether a chunk ends on it.
        routing: the chunks that were used, and the router's probabilities.
        h: [T, d_core], the encoder's output.
        chunks: [M, d_core], the core's output.
    """

    logits: Tensor
    routing: Routing
    h: Tensor
    chunks: Tensor


@dataclass
class DecodingState:
    """What the model remembers of S sequences between two bytes."""

    encoder: list[MixerState]
    decoder: list[MixerState]
    caches: list[DynamicCache]
    held: Tensor | None = None  # [S, d_core], the newest finished chunk
    chunks_seen: list[int] = field(default_factory=list)


class ByteLM(PreTrainedModel):
    """A byte-level language model around a token-trained transformer (arXiv 2602.01007).

    All inputs are packed: ``ids`` uint8 [T], each sequence beginning with BOS (0xFE), and ``cu_seqlens`` int32 [S+1].
    """

    config_class = ByteLMConfig
    config: ByteLMConfig
    base_model_prefix = "model"
    main_input_name = "ids"

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.router = Router(config)
        self.core = Core(config)
        if config.token_head:
            self.token_head = nn.Linear(config.core_width, config.core_config().vocab_size, bias=False)
        self.dechunk = Dechunk(config)
        self.decoder = Decoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves when they are made."""

    @classmethod
    def from_teacher(cls, teacher: PreTrainedModel, config: ByteLMConfig) -> Self:
        """A byte-level model whose core and token head are copies of the teacher's.

        Args:
            teacher: a causal language model of transformers that accepts ``inputs_embeds``.
            config: sizes of the byte-level parts; its ``core`` is replaced by the teacher's configuration.
        """
        settings = {**config.to_dict(), "core": core_settings(teacher)}
        model = cls(ByteLMConfig.from_dict(settings))
        source = {name: value for name, value in teacher.base_model.state_dict().items() if "embed_tokens" not in name}
        model.core.backbone.load_state_dict(source)
        if config.token_head:
            model.token_head.weight.data.copy_(teacher.get_output_embeddings().weight)
        return model

    def forward(self, ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None = None) -> ByteLMOutput:
        """Predict the byte after each byte.

        Args:
            ids: uint8 [T].
            cu_seqlens: int32 [S+1].
            boundary: bool [T], where chunks end (always at BOS); the router decides where it is None.

        Raises:
            TypeError, ValueError: ``cu_seqlens`` does not cut ``ids`` into sequences.
        """
        check_cu_seqlens(cu_seqlens, ids.shape[0])
        h = self.encoder(ids, cu_seqlens)
        routing = self.router(h, ids, cu_seqlens)
        if boundary is not None:
            routing = bytekernels.routing_of(boundary | (ids == BOS), cu_seqlens, routing.prob)
        chunks = self.core(bytekernels.gather_chunks(h, routing), routing.cu_chunks)
        logits = self.decoder(self.dechunk(chunks, h, routing), ids, cu_seqlens)
        return ByteLMOutput(logits, routing, h, chunks)

    def drop_token_head(self) -> None:
        """Forget the teacher's token head, which no stage after distillation reads."""
        self.config.token_head = False
        del self.token_head

    def token_hidden(self, h: Tensor, boundary: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The core's states at given chunk ends, which the token head reads (stage 1): [M, d_core]."""
        routing = bytekernels.routing_of(boundary, cu_seqlens)
        return self.core(bytekernels.gather_chunks(h, routing), routing.cu_chunks)

    def empty_state(self, sequences: int) -> DecodingState:
        """The decoding state of S sequences that have not begun."""
        return DecodingState(
            self.encoder.stack.empty_state(sequences),
            self.decoder.stack.empty_state(sequences),
            [self.core.empty_cache() for _ in range(sequences)],
            chunks_seen=[0] * sequences,
        )

    @torch.no_grad()
    def step(self, ids: Tensor, boundary: Tensor, state: DecodingState) -> Tensor:
        """One more byte for each of S sequences, together with the bit that was drawn with it.

        Args:
            ids: uint8 [S].
            boundary: bool [S], whether a chunk ends on the byte (always True for BOS).
            state: updated in place.

        Returns:
            Logits [S, 512] of the byte that follows.
        """
        h = self.encoder.step(ids, state.encoder)
        rows = (boundary | (ids == BOS)).nonzero().flatten().tolist()
        first = [state.chunks_seen[row] == 0 for row in rows]
        chunks = self.core.step(h[rows], [state.caches[row] for row in rows])
        for row in rows:
            state.chunks_seen[row] += 1
        state.held = self.dechunk.step(state.held, chunks, h, rows, first)
        return self.decoder.step(state.held + self.dechunk.residual(h), ids, state.decoder)


def core_settings(teacher: PreTrainedModel) -> dict:
    """The teacher's configuration as :class:`ByteLMConfig` keeps it."""
    settings = teacher.config.get_text_config().to_dict()
    return {key: value for key, value in settings.items() if not key.startswith(("_", "architectures", "torch_dtype"))}


AutoConfig.register(ByteLMConfig.model_type, ByteLMConfig)
AutoModelForCausalLM.register(ByteLMConfig, ByteLM)
