"""Writing with a token head, byte by byte: models of stage 1, and the training-free baseline.

What the head says of the next token is, exactly, a distribution of (next byte, does a chunk end on it) at every byte of
that token (:func:`bytekernels.byte_marginals`). So a model that has no decoder yet can write bytes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import bytekernels
from bytekernels import BOS, EOS
from models.byte_lm import ByteLM
from models.decoding import BlockState, DecodingState
from models.marginal_head import MarginalState
from models.padding import pack_with_padding
from models.sampling import Draws, Sampling
from models.stops import Stops, stops_for_each
from models.suffix import Vocabulary
from models.token_scoring import Encode
from models.utf8 import to_bytes, to_text
from models.written import Generation


class TokenHeadWriter:
    """Writes after prompts whose chunks are the tokenizer's; the chunks of what it writes are its own draws.

    Args:
        model: with its token head, in evaluation mode.
        vocabulary: the teacher's.
        encode: tokenizes prompts, as :class:`models.TokenScorer` has it.

    Raises:
        ValueError: a model without a token head.
    """

    def __init__(self, model: ByteLM, vocabulary: Vocabulary, encode: Encode) -> None:
        if not model.config.token_head:
            raise ValueError("this model has no token head (stage 2 drops it): write with models.generate")
        self.model, self.encode = model, encode
        self.vocabulary = vocabulary.by_prefix(model.token_head.out_features).to(model.device)

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[str | bytes],
        *,
        max_new_bytes: int = 200,
        sampling: Sampling | None = None,
        stop: Stops = (),
    ) -> list[Generation]:
        """Continue prompts.

        Args:
            prompts: UTF-8 text; may be empty.
            max_new_bytes: for each prompt, unless its text ends before, or the core has no position for a chunk more.
            sampling: for all prompts; greedy by default.
            stop: strings that end a text, for all prompts, or a sequence of them for each.

        Raises:
            ValueError: a prompt that is not UTF-8, has no exact tokens, or more of them than the core has positions.
        """
        if not prompts:
            return []
        texts = [to_bytes(prompt) for prompt in prompts]
        stops = stops_for_each(stop, len(texts))
        state, bits = self._read(texts)
        draws = Draws([sampling or Sampling()] * len(texts), self.model.device)
        if draws.seen is not None:
            for slot, text in enumerate(texts):
                draws.seen[slot, list(text)] = True
        new = [bytearray() for _ in texts]
        reasons: list[str | None] = [None if max_new_bytes else "length" for _ in texts]
        ended_by: list[bytes | None] = [None] * len(texts)
        kept = MarginalState(
            self.model.token_head(state.held), torch.zeros_like(state.cache.lengths, dtype=torch.int32)
        )
        while None in reasons:
            active = torch.tensor([reason is None for reason in reasons], device=self.model.device)
            pair = draws.pairs(kept.marginals(self.vocabulary), active)
            byte, ends = (pair % 256).to(torch.uint8), pair >= 256
            draws.saw(byte, active)
            for slot, (value, end) in enumerate(zip(byte.tolist(), ends.tolist(), strict=True)):
                if reasons[slot] is not None:
                    continue
                if value == EOS:
                    reasons[slot] = "eos"
                    continue
                new[slot].append(value)
                bits[slot].append(end)
                ended_by[slot] = next((one for one in stops[slot] if new[slot].endswith(one)), None)
                if ended_by[slot] is not None:
                    reasons[slot] = "stop"
                elif len(new[slot]) == max_new_bytes:
                    reasons[slot] = "length"
            going = torch.tensor([reason is None for reason in reasons], device=self.model.device)
            full = (going & ends & (state.cache.lengths >= self.model.core.max_chunks)).tolist()
            reasons = ["length" if no_room else reason for no_room, reason in zip(full, reasons, strict=True)]
            self._step(byte, ends, state, kept, going & ~torch.tensor(full, device=going.device))
        return [
            _generation(text, bytes(written), marks, str(reason), by)
            for text, written, marks, reason, by in zip(texts, new, bits, reasons, ended_by, strict=True)
        ]

    def _read(self, texts: Sequence[bytes]) -> tuple[DecodingState, list[list[bool]]]:
        """The state after prompts, ``held`` the core's of their last tokens, and the bits of their bytes."""
        model = self.model
        ids, cu_seqlens = pack_with_padding(texts, model.device, most_chunks=model.core.max_chunks - 1)
        boundary = torch.zeros(len(ids), dtype=torch.bool)
        bits = []
        for start, text, found in zip(
            cu_seqlens.tolist(), texts, self.encode([to_text(text) for text in texts]), strict=False
        ):
            if found is None or int(found.lengths.sum()) != len(text):
                raise ValueError(f"the tokens of {text[:60]!r} are not its bytes: leave this prompt out")
            mine = boundary[start + 1 : start + 1 + len(text)]
            mine[torch.from_numpy(found.lengths.cumsum().astype("int64")) - 1] = True
            bits.append(mine.tolist())
        blocks: list[BlockState] = []
        h = model.encoder(ids, cu_seqlens, blocks)
        ends = boundary.to(ids.device) | (ids == BOS)
        routing = bytekernels.routing_of(ends, cu_seqlens)
        cache = model.core.empty_cache(len(cu_seqlens) - 1)
        chunks = model.core.prefill(model.encoder.chunks(ids, cu_seqlens, routing, h), routing.cu_chunks, cache)
        last = routing.cu_chunks[1:].long() - 1
        model.encoder.open_chunks(ids, cu_seqlens, ends, blocks)
        model.encoder.close(h[routing.index[last]], torch.ones_like(last, dtype=torch.bool), blocks)
        state = DecodingState(blocks, [], [], cache, chunks[last])
        return state.select(torch.arange(len(texts), device=ids.device)), bits

    def _step(self, byte: Tensor, ends: Tensor, state: DecodingState, kept: MarginalState, active: Tensor) -> None:
        """Take in a byte of each active sequence."""
        h = self.model.encoder.step(byte, state.encoder, active)
        closed = ends & active
        if bool(closed.any()):
            chunks = self.model.core.step(self.model.encoder.close(h, closed, state.encoder), state.cache, closed)
            kept.close(self.model.token_head(chunks), closed)
        kept.read(byte, self.vocabulary, active)


def _generation(prompt: bytes, written: bytes, bits: list[bool], reason: str, stop: bytes | None) -> Generation:
    """What is left of it without the stop string that ended it."""
    new = written.removesuffix(stop or b"")
    return Generation(prompt, new, tuple(bits[: len(prompt) + len(new)]), reason, stop)
