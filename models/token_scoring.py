"""Log-likelihoods by tokens, for what is no byte-level model yet: teachers and models of stage 1."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bytekernels.ragged import cu_seqlens_of
from models.byte_lm import ByteLM
from models.core import run_packed, use_packed
from models.likelihood import token_log_probs
from models.padding import PADDING, pack_with_padding
from models.scoring import (
    ContinuationScore,
    batches,
    check_batch_bytes,
    numbered,
    positions_of,
    window_limit,
)
from models.utf8 import to_bytes


class Tokens(Protocol):
    """A text as n tokens, each of which ends on a byte of its own."""

    @property
    def ids(self) -> np.ndarray:
        """int32 [n]."""

    @property
    def lengths(self) -> np.ndarray:
        """int32 [n], bytes of each token, at least 1; their sum is the text's."""


Encode = Callable[[Sequence[str]], Sequence[Tokens | None]]


class TokenScorer:
    """Scores texts by tokens: a teacher, or a model of stage 1, whose token head reads the core at tokens' ends.

    A text is worth ``sum_i log P(token_i | tokens before)`` along the tokenizer's own tokens, BOS first: as for bits,
    one path among many. A continuation's tokens are those of the whole text behind its context; where a token reaches
    from the context into the continuation, both are tokenized alone. ``is_greedy`` says that each token is the
    likeliest.

    Args:
        model: a :class:`ByteLM` with its token head, or a causal language model of transformers, which is set to packed
            attention (:func:`models.core.use_packed`); in evaluation mode.
        encode: tokenizes texts without special tokens, None for one whose tokens' bytes are not its own:
            ``training.alignment.TokenBytes(tokenizer).encode``.
        bos_id: what a teacher's sequences begin with; its configuration's BOS, else EOS, where it is None. A model of
            stage 1 begins with byte 0xFE instead.
        batch_bytes: most bytes of one forward pass; a longer sequence has one of its own.
        truncate: drop the first tokens of a context that does not fit into the core's positions, instead of an error.

    Raises:
        ValueError: no token head, no BOS token, or a value out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encode: Encode,
        *,
        bos_id: int | None = None,
        batch_bytes: int = 65536,
        truncate: bool = False,
    ) -> None:
        check_batch_bytes(batch_bytes)
        self.model, self.encode, self.batch_bytes, self.truncate = model, encode, batch_bytes, truncate
        if isinstance(model, ByteLM):
            if not model.config.token_head:
                raise ValueError("this model has no token head (stage 2 drops it): score its bytes with Scorer")
            self.bos_id = 0  # never a target, and BOS is read as a byte
            self.head = model.token_head.weight
            self.positions = positions_of(model.config.core_config())
        else:
            self.bos_id = _bos_of(model) if bos_id is None else bos_id
            self.head = use_packed(model).get_output_embeddings().weight
            self.positions = positions_of(model.config.get_text_config())

    def score(self, pairs: Sequence[tuple[str | bytes, str | bytes]]) -> list[ContinuationScore]:
        """Log-likelihoods of continuations, each given its context: as :meth:`Scorer.score`, of UTF-8 text.

        Raises:
            ValueError: an empty continuation, text that is not UTF-8 or has no exact tokens, or more tokens than the
                core has positions.
        """
        texts = [(_to_str(context), _to_str(continuation)) for context, continuation in pairs]
        whole = self._tokens([context + continuation for context, continuation in texts])
        sequences = []
        for number, ((context, continuation), tokens) in enumerate(zip(texts, whole, strict=True)):
            with numbered(number):
                if not continuation:
                    raise ValueError("the continuation is empty: give at least one byte to score")
                ends = np.cumsum(tokens.lengths)
                given = int(np.searchsorted(ends, len(context.encode()), "right"))
                if context and (given == 0 or ends[given - 1] != len(context.encode())):
                    before, after = self._tokens([context, continuation])
                    tokens, given = before.followed_by(after), len(before.ids)
                sequences.append(self._fitted(tokens, given))
        return self._scored(sequences)

    def rolling(self, texts: Sequence[str | bytes], *, window: int | None = None) -> list[ContinuationScore]:
        """Log-likelihoods of whole texts given BOS: as :meth:`Scorer.rolling`, cut into windows of tokens.

        Args:
            texts: of any length.
            window: most tokens of a window, BOS included; as many as the core has positions where it is None.

        Raises:
            ValueError: as :meth:`score`, or a window of less than 2 tokens or more than the core has positions.
        """
        limit = window_limit(window, self.positions)
        pieces = []
        for tokens in self._tokens([_to_str(text) for text in texts]):
            size = len(tokens.ids) if limit is None else limit - 1
            starts = range(0, len(tokens.ids), max(1, size))
            pieces.append([(tokens.part(start, start + size), 0) for start in starts])
        scores = iter(self._scored([piece for text in pieces for piece in text]))
        return [ContinuationScore.joined([next(scores) for _ in text]) for text in pieces]

    def _tokens(self, texts: Sequence[str]) -> "list[_Tokens]":
        found = []
        for text, tokens in zip(texts, self.encode(texts), strict=True):
            if tokens is None:
                raise ValueError(
                    f"the tokens of {text[:60]!r} are not its bytes (a tokenizer that normalises, or a special token "
                    "in the text): leave this text out"
                )
            found.append(_Tokens(text.encode(), np.asarray(tokens.ids), np.asarray(tokens.lengths)))
        return found

    def _fitted(self, tokens: "_Tokens", given: int) -> "tuple[_Tokens, int]":
        """The tokens if the core has positions for them, else with fewer of the context."""
        excess = 0 if self.positions is None else max(0, len(tokens.ids) + 1 - self.positions)
        if excess and not self.truncate:
            raise ValueError(
                f"{len(tokens.ids) + 1} tokens, BOS included, are more than the core's {self.positions} positions: "
                "shorten the context, or use truncate=True"
            )
        if excess > given:
            raise ValueError(
                f"the continuation alone has more tokens than the core's {self.positions} positions: "
                "score it in pieces, or by rolling()"
            )
        return tokens.part(excess, len(tokens.ids)), given - excess

    @torch.no_grad()
    def _scored(self, sequences: "Sequence[tuple[_Tokens, int]]") -> list[ContinuationScore]:
        found: dict[int, ContinuationScore] = {}
        for batch in batches([len(tokens.data) + 1 for tokens, _ in sequences], self.batch_bytes):
            log_probs, greedy = self._evaluate([sequences[i][0] for i in batch])
            start = 0
            for i in batch:
                tokens, given = sequences[i]
                rows = slice(start + given, start + len(tokens.ids))
                num_bytes = int(tokens.lengths[given:].sum())
                found[i] = ContinuationScore(math.fsum(log_probs[rows]), num_bytes, bool(greedy[rows].all()))
                start += len(tokens.ids) + 1
        return [found[i] for i in range(len(sequences))]

    def _evaluate(self, texts: "Sequence[_Tokens]") -> tuple[np.ndarray, np.ndarray]:
        """Of packed texts, BOS before each, row by row: log-probability of the next token, and is it the likeliest."""
        device = self.model.device
        bos = np.array([self.bos_id])
        flat = np.concatenate([*(part for text in texts for part in (bos, text.ids)), bos.repeat(len(PADDING))])
        token_ids = torch.from_numpy(flat.astype(np.int64)).to(device)
        counts = torch.tensor([*(len(text.ids) + 1 for text in texts), len(PADDING)])
        token_cu = cu_seqlens_of(counts).to(device)
        if isinstance(self.model, ByteLM):
            hidden = _stage_1_hidden(self.model, texts)
        else:
            embeddings = self.model.get_input_embeddings()(token_ids)
            hidden = run_packed(cast(PreTrainedModel, self.model.base_model), embeddings, token_cu)
        log_probs, greedy = token_log_probs(hidden, self.head, token_ids, token_cu)
        return log_probs.cpu().numpy(), greedy.cpu().numpy()


@dataclass(frozen=True)
class _Tokens:
    """A text, its n tokens and their lengths in bytes."""

    data: bytes
    ids: np.ndarray
    lengths: np.ndarray

    def part(self, start: int, stop: int) -> "_Tokens":
        """Tokens start ... stop - 1."""
        before, within = int(self.lengths[:start].sum()), int(self.lengths[start:stop].sum())
        return _Tokens(self.data[before : before + within], self.ids[start:stop], self.lengths[start:stop])

    def followed_by(self, other: "_Tokens") -> "_Tokens":
        return _Tokens(
            self.data + other.data,
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.lengths, other.lengths]),
        )


def _stage_1_hidden(model: ByteLM, texts: "Sequence[_Tokens]") -> Tensor:
    """The core's states at BOS and at each token's end: [M, d_core]."""
    device = model.device
    ids, cu_seqlens = pack_with_padding([text.data for text in texts], device)
    one = np.ones(1, dtype=np.int64)
    sizes = [part for text in texts for part in (one, text.lengths)]
    ends = np.cumsum(np.concatenate([*sizes, one.repeat(len(PADDING))])) - 1
    boundary = torch.zeros(len(ids), dtype=torch.bool, device=device)
    boundary[torch.from_numpy(ends).to(device)] = True
    return model.token_hidden(model.encoder(ids, cu_seqlens), ids, boundary, cu_seqlens)


def _bos_of(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    found = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    if found is None:
        raise ValueError("the teacher's configuration has neither bos_token_id nor eos_token_id: give bos_id")
    return int(found[0] if isinstance(found, list) else found)


def _to_str(text: str | bytes) -> str:
    """Text that a tokenizer can read."""
    data = to_bytes(text)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}: a tokenizer reads text, only Scorer reads any bytes") from None
