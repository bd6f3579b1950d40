"""The byte-level language model: encoder, router, core, dechunk, decoder, joint head."""

from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import bytekernels
from bytekernels import BOS, Routing, SortedVocabulary
from bytekernels.ragged import check_cu_seqlens
from models.config import ByteLMConfig
from models.core import Core
from models.dechunk import Dechunk
from models.decoding import BlockState, DecodingState
from models.encoder import ByteReader, Encoder
from models.hub import HubModel
from models.layers import ByteEmbedding, SwiGLU
from models.local_stack import LocalStack
from models.marginal_head import MarginalState, added, head_marginals
from models.router import Router
from models.suffix import SuffixFeatures, Vocabulary

CERTAIN = 1e-6  # nearer to 0 or 1 a router's probability counts as this near, where chunks are held to a vocabulary
JOINT = 512  # next byte x "does a chunk end on it": entry b for going on, 256 + b for an end


class Decoder(nn.Module):
    """Dechunked states back to the byte-level width, the byte itself added again, Mamba2 blocks, the joint head.

    Where the configuration asks for one, a second head on the same states drafts the byte after the next.
    """

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.bridge = SwiGLU(config.core_width, config.bridge_inner, config.width)
        self.embed = ByteEmbedding(config.width)
        self.stack = LocalStack(config, config.decoder_layers)
        self.head = nn.Linear(config.width, JOINT, bias=False)
        if config.marginal_head:
            nn.init.zeros_(self.head.weight)  # the token head's marginals alone, which are to be corrected
        self.draft_head = nn.Linear(config.width, 256, bias=False) if config.draft_head else None

    def enter(self, u: Tensor, ids: Tensor) -> Tensor:
        return self.bridge(u) + self.embed(ids)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Joint logits [T, 512], and the drafts [T, 256] of the byte after the next where there is a head for them."""
        return self.head(x), None if self.draft_head is None else self.draft_head(x)

    def forward(
        self, u: Tensor, ids: Tensor, cu_seqlens: Tensor, states: list[BlockState] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' logits; the blocks' states after each sequence are added to ``states``."""
        return self.heads(self.stack(self.enter(u, ids), cu_seqlens, states=states))

    def step(
        self, u: Tensor, ids: Tensor, states: list[BlockState], active: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return self.heads(self.stack.step(self.enter(u, ids), states[: len(self.stack.blocks)], active))


class ByteLMOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: [T, 512]; row t predicts byte t+1 jointly with whether a chunk ends on it.
        routing: the chunks that were used, and the router's probabilities.
        h: [T, d_core], the encoder's output.
        chunks: [M, d_core], the core's output.
        draft: [T, 256]; row t predicts byte t+2 from what row t of ``logits`` knows. None without a draft head.
    """

    logits: Tensor
    routing: Routing
    h: Tensor
    chunks: Tensor
    draft: Tensor | None = None


class Prefill(NamedTuple):
    """S sequences, read but for the bits of their last bytes.

    Attributes:
        state: encoder and router have seen all bytes, core and decoder all but each sequence's last.
        h: [S, d_core], the encoder's states of the last bytes.
        router_read: [S, d_r], what the router reads of them: h, or its own encoder's states.
        logits: [S, 512], what the byte before the last predicts; zeros where there is none.
        draft: [S, 256], likewise the draft head's; None without one.
        boundary: bool [T], the bits; the last bytes' are the router's, or False where it would have to look ahead
            (True for BOS).
    """

    state: DecodingState
    h: Tensor
    router_read: Tensor
    logits: Tensor
    draft: Tensor | None
    boundary: Tensor


class ByteLM(HubModel):
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
    def from_teacher(cls, teacher: PreTrainedModel, config: ByteLMConfig, vocabulary: Vocabulary | None = None) -> Self:
        """A byte-level model whose core and token head are copies of the teacher's.

        Args:
            teacher: a causal language model of transformers that accepts ``inputs_embeds``.
            config: sizes of the byte-level parts; its ``core`` is replaced by the teacher's configuration.
            vocabulary: of the teacher's tokenizer, which suffix features match.

        Raises:
            ValueError: suffix features without a vocabulary, or with one of another size.
        """
        settings = {**config.to_dict(), "core": core_settings(teacher)}
        model = cls(ByteLMConfig.from_dict(settings))
        source = {name: value for name, value in teacher.base_model.state_dict().items() if "embed_tokens" not in name}
        model.core.backbone.load_state_dict(source)
        if config.token_head:
            model.token_head.weight.data.copy_(teacher.get_output_embeddings().weight)
        if model.encoder.suffix is not None:
            if vocabulary is None:
                raise ValueError(f"suffix_bytes={config.suffix_bytes} needs the vocabulary of the teacher's tokenizer")
            model.encoder.suffix.fill(vocabulary, cast(Tensor, teacher.get_input_embeddings().weight))
        return model

    def forward(
        self, ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None = None, context: Tensor | None = None
    ) -> ByteLMOutput:
        """Predict the byte after each byte.

        Args:
            ids: uint8 [T].
            cu_seqlens: int32 [S+1].
            boundary: bool [T], where chunks end (always at BOS); the router decides where it is None.
            context: int64 [S], how many bytes after BOS are given; none where it is None. Their chunks' ends, but for
                the bit of the last of them, are decided as if nothing followed.

        Raises:
            TypeError, ValueError: ``cu_seqlens`` does not cut ``ids`` into sequences.
        """
        check_cu_seqlens(cu_seqlens, ids.shape[0])
        h, routing = self.read(ids, cu_seqlens, boundary, context)
        chunks = self.core(self.encoder.chunks(ids, cu_seqlens, routing, h), routing.cu_chunks)
        return self.predict(chunks, h, routing, ids, cu_seqlens)

    def read(
        self, ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """What comes before the core: the encoder's states [T, d_core] and the chunks; arguments of :meth:`forward`."""
        h = self.encoder(ids, cu_seqlens)
        read = self.router.read(h, ids, cu_seqlens)
        if boundary is None:
            return h, self._route(read, ids, cu_seqlens, context)
        prob = self.router.route(read, ids, cu_seqlens, capacity=0).prob
        return h, bytekernels.routing_of(boundary | (ids == BOS), cu_seqlens, prob)

    def _route(self, read: Tensor, ids: Tensor, cu_seqlens: Tensor, context: Tensor | None = None) -> Routing:
        """The chunks, from what the router has read: its own, or held to the vocabulary. The probabilities are its."""
        if not self.config.constrain_chunks:
            return self.router.route(read, ids, cu_seqlens)
        prob = self.router.route(read, ids, cu_seqlens, capacity=0).prob  # other chunks will be laid out
        return bytekernels.routing_of(self.hold_to_vocabulary(prob, ids, cu_seqlens, context), cu_seqlens, prob)

    @torch.no_grad()
    def hold_to_vocabulary(
        self, prob: Tensor, ids: Tensor, cu_seqlens: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """The likeliest ends whose chunks are strings of the vocabulary (:func:`bytekernels.constrain_ends`): bool [T].

        Args:
            prob: [T], the router's probabilities.
            ids, cu_seqlens, context: as in :meth:`forward`.
        """
        log_odds = prob.double().logit(CERTAIN).float() - self.config.chunk_cost
        rows = None if context is None else context + 1
        return bytekernels.constrain_ends(ids, cu_seqlens, log_odds, self.prefixes, rows)

    def predict(self, chunks: Tensor, h: Tensor, routing: Routing, ids: Tensor, cu_seqlens: Tensor) -> ByteLMOutput:
        """What comes after it, from its output [M, d_core] and what :meth:`read` gave."""
        logits, draft = self.decoder(self.dechunk(chunks, h, routing), ids, cu_seqlens)
        if self.config.marginal_head:
            prefix = bytekernels.token_prefix(ids, cu_seqlens, routing.boundary, self.prefixes)
            head = self.token_head.weight
            logits = added(logits, head_marginals(chunks, head, routing.chunk_of, prefix, self.prefixes))
        return ByteLMOutput(logits, routing, h, chunks, draft)

    @property
    def prefixes(self) -> SortedVocabulary:
        """The teacher's vocabulary, which a marginal head reads, and chunks may be held to."""
        return cast(SuffixFeatures, self.encoder.suffix).prefixes

    def route(self, ids: Tensor, cu_seqlens: Tensor, context: Tensor | None = None) -> Routing:
        """The chunks alone, as :meth:`forward` has them, from no more than the router reads; arguments as there.

        Gradients reach the router, and not an encoder that is not its own.
        """
        h = None
        if self.router.encoder is None:
            with torch.no_grad():
                h = self.encoder(ids, cu_seqlens)
        return self._route(self.router.read(h, ids, cu_seqlens), ids, cu_seqlens, context)

    def router_source(self, state: DecodingState) -> tuple[ByteReader, list[BlockState]]:
        """What the router reads bytes with, the encoder or one of its own, and its part of a decoding state."""
        if self.router.encoder is None:
            return self.encoder, state.encoder
        return self.router.encoder, state.router

    def drop_token_head(self) -> None:
        """Forget the teacher's token head, which no stage after distillation reads.

        Raises:
            ValueError: the marginal head reads it.
        """
        if self.config.marginal_head:
            raise ValueError("marginal_head=True reads the token head at every chunk: keep it")
        self.config.token_head = False
        del self.token_head

    def token_hidden(self, h: Tensor, ids: Tensor, boundary: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The core's states at given chunk ends, which the token head reads (stage 1): [M, d_core].

        Args:
            h: [T, d_core], the encoder's states.
            ids: uint8 [T].
            boundary: bool [T], the chunk ends.
            cu_seqlens: int32 [S+1].
        """
        routing = bytekernels.routing_of(boundary, cu_seqlens)
        return self.core(self.encoder.chunks(ids, cu_seqlens, routing, h), routing.cu_chunks)

    def empty_state(self, sequences: int) -> DecodingState:
        """The decoding state of S sequences that have not begun."""
        marginals = [MarginalState.empty(sequences, self.token_head.weight)] if self.config.marginal_head else []
        return DecodingState(
            self.encoder.empty_state(sequences),
            [] if self.router.encoder is None else self.router.encoder.empty_state(sequences),
            [*self.decoder.stack.empty_state(sequences), *marginals],
            self.core.empty_cache(sequences),
            self.dechunk.null.detach().repeat(sequences, 1),
        )

    @torch.no_grad()
    def prefill(self, ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None = None) -> Prefill:
        """Read whole sequences at once, up to the decision whether a chunk ends on each one's last byte.

        Args:
            ids: uint8 [T], each sequence beginning with BOS; none may be empty.
            cu_seqlens: int32 [S+1].
            boundary: bool [T], where chunks end (always at BOS); the router decides where it is None.

        Raises:
            TypeError, ValueError: ``cu_seqlens`` does not cut ``ids`` into sequences that are not empty; a sequence has
                more chunks than the core has positions; the dechunk weight is ``lookahead``.
        """
        check_cu_seqlens(cu_seqlens, ids.shape[0])
        sequences, ends = cu_seqlens.shape[0] - 1, cu_seqlens[1:].long() - 1
        if bool((ends < cu_seqlens[:-1]).any()):
            raise ValueError(
                f"every sequence must begin with BOS, got cu_seqlens {cu_seqlens.tolist()} with an empty one"
            )
        self.dechunk.check_causal()
        state = self.empty_state(sequences)
        state.encoder.clear()
        state.router.clear()
        h = self.encoder(ids, cu_seqlens, state.encoder)
        seen = self.router.read(h, ids, cu_seqlens, state.router)
        if boundary is None:
            boundary = self._route(seen, ids, cu_seqlens).boundary.clone()
            if self.config.lookahead:
                boundary[ends] = ids[ends] == BOS
        before = torch.ones_like(boundary)  # all but the last byte of each sequence
        before[ends] = False
        read = ids[before]
        cu_read = cu_seqlens - torch.arange(sequences + 1, dtype=torch.int32, device=ids.device)
        routing = bytekernels.routing_of((boundary | (ids == BOS))[before], cu_read)
        read_chunks = self.encoder.chunks(read, cu_read, routing, h[before])
        chunks = self.core.prefill(read_chunks, routing.cu_chunks, state.cache)
        self.encoder.open_chunks(ids, cu_seqlens, boundary, state.encoder)
        held = self.dechunk.held(chunks, h[before], routing)
        state.decoder.clear()
        u = held + self.dechunk.residual(h[before])
        logits, draft = self.decoder(u, read, cu_read, state.decoder)
        last, some = (cu_read[1:].long() - 1).clamp(min=0), cu_read[1:] > cu_read[:-1]
        if read.numel():
            state.held = torch.where(some[:, None], held[last], state.held)
        newest = [None if x is None else _rows_of(x, last, some) for x in (logits, draft)]
        if self.config.marginal_head:
            kept = MarginalState.empty(sequences, self.token_head.weight)
            if read.numel():
                newest_chunks = chunks[(routing.cu_chunks[1:].long() - 1).clamp(min=0)]
                prefix = bytekernels.token_prefix(read, cu_read, routing.boundary, self.prefixes)
                kept = MarginalState(self.token_head(newest_chunks), torch.where(some, prefix[last], kept.node))
            state.decoder.append(kept)
            joint = added(cast(Tensor, newest[0]), kept.marginals(self.prefixes))
            newest[0] = joint.masked_fill(~some[:, None], 0)
        return Prefill(state, h[ends], seen[ends], cast(Tensor, newest[0]), newest[1], boundary)

    @torch.no_grad()
    def step(self, ids: Tensor, boundary: Tensor, state: DecodingState, active: Tensor | None = None) -> Tensor:
        """One more byte for each of S sequences, together with the bit that was drawn with it.

        Args:
            ids: uint8 [S].
            boundary: bool [S], whether a chunk ends on the byte (always True for BOS).
            state: updated in place.
            active: bool [S], whose turn it is; None for all. The others' state stays, and their logits mean nothing.

        Returns:
            Logits [S, 512] of the byte that follows.

        Raises:
            ValueError: a sequence has as many chunks as the core has positions; the dechunk weight is ``lookahead``.
        """
        h, _ = self.step_encoder(ids, state, active)
        closed = boundary | (ids == BOS)
        if active is not None:
            closed = closed & active
        if bool(closed.any()):
            self.close_chunks(h, closed, state)
        return self.step_decoder(h, ids, state, active)[0]

    def step_encoder(self, ids: Tensor, state: DecodingState, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The beginning of a step: the encoder's states [S, d_core] of bytes, and what the router reads of them."""
        h = self.encoder.step(ids, state.encoder, active)
        own = self.router.encoder
        return h, h if own is None else own.step(ids, state.router, active)

    def close_chunks(self, h: Tensor, closed: Tensor, state: DecodingState) -> None:
        """The middle of a step: the core reads a chunk of each sequence in ``closed`` (bool [S]), ended by ``h``."""
        first = state.cache.lengths == 0
        chunks = self.core.step(self.encoder.close(h, closed, state.encoder), state.cache, closed)
        state.held.copy_(self.dechunk.step(state.held, chunks, h, closed, first))
        if self.config.marginal_head:
            cast(MarginalState, state.decoder[-1]).close(self.token_head(chunks), closed)

    def step_decoder(
        self, h: Tensor, ids: Tensor, state: DecodingState, active: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The end of a step: logits [S, 512] after bytes whose chunks are closed, and the draft head's [S, 256]."""
        logits, draft = self.decoder.step(state.held + self.dechunk.residual(h), ids, state.decoder, active)
        if self.config.marginal_head:
            kept = cast(MarginalState, state.decoder[-1])
            kept.read(ids, self.prefixes, active)
            logits = added(logits, kept.marginals(self.prefixes))
        return logits, draft


def _rows_of(x: Tensor, rows: Tensor, given: Tensor) -> Tensor:
    """``x[rows]``, zeros where not given: [S, ...]."""
    if x.shape[0] == 0:
        return x.new_zeros(rows.shape[0], *x.shape[1:])
    return x[rows] * given[:, None]


def core_settings(teacher: PreTrainedModel) -> dict:
    """The teacher's configuration as :class:`ByteLMConfig` keeps it."""
    settings = teacher.config.get_text_config().to_dict()
    return {key: value for key, value in settings.items() if not key.startswith(("_", "architectures", "torch_dtype"))}


AutoConfig.register(ByteLMConfig.model_type, ByteLMConfig)
AutoModelForCausalLM.register(ByteLMConfig, ByteLM)
