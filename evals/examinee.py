"""A model that is examined: a byte-level model, one of stage 1, or a teacher. All are scored in bytes."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from models import ByteLM, Scorer, TokenHeadWriter, TokenScorer, generate
from models.beam import Combine
from models.command import DTYPES, load_model
from models.core import use_packed
from models.writer import Mode, check_mode
from training.alignment import TokenBytes
from training.errors import UserError
from training.teacher import load_teacher
from training.vocabulary import vocabulary_of

BYTES_PER_TOKEN = 4  # what a length that a task gives in tokens is worth


@dataclass(frozen=True)
class Examinee:
    """A model, and what asks it.

    Attributes:
        model: in evaluation mode, on its device.
        scorer: of continuations and texts.
        likelihood: what its scores are, in words.
        tokenizer: the teacher's, where the teacher itself is examined.
        mode: how a byte-level model writes.
        by_token_head: what a model of stage 1 writes with.
    """

    model: PreTrainedModel
    scorer: Scorer | TokenScorer
    likelihood: str
    tokenizer: Any = None
    mode: Mode = "joint"
    by_token_head: TokenHeadWriter | None = None

    def write(self, prompts: Sequence[str], *, max_tokens: int, stop: Sequence[str]) -> list[str]:
        """Greedy texts after the prompts, up to a stop string, which is left out.

        Args:
            prompts: one or more.
            max_tokens: the longest length, in tokens; a byte-level model may write four bytes for each. Prompts that
                leave the core no room for it lose their beginning where the examinee truncates.
            stop: strings that end a text.

        Raises:
            ValueError: no room for so long a text.
        """
        limit = BYTES_PER_TOKEN * max_tokens
        if isinstance(self.scorer, Scorer):
            fitted = [self.scorer.fitted_context(prompt.encode(), spare=max_tokens) for prompt in prompts]
            written = generate(self.scorer.model, fitted, max_new_bytes=limit, stop=tuple(stop), mode=self.mode)
            return [generation.new_text for generation in written]
        if self.by_token_head is not None:
            shortened = [self._shortened(prompt, max_tokens) for prompt in prompts]
            return [one.new_text for one in self.by_token_head.write(shortened, max_new_bytes=limit, stop=tuple(stop))]
        return [self._write_tokens(prompt, max_tokens, stop) for prompt in prompts]

    def _shortened(self, prompt: str, max_tokens: int) -> str:
        """A prompt of a model of stage 1 without its first tokens, where they leave no room for so many more."""
        scorer = cast(TokenScorer, self.scorer)
        while scorer.positions is not None:
            (tokens,) = scorer.encode([prompt])
            excess = 0 if tokens is None else 1 + len(tokens.ids) + max_tokens - scorer.positions
            if tokens is None or excess <= 0:
                break
            if not scorer.truncate or excess >= len(tokens.ids):
                raise ValueError(_no_room(len(tokens.ids), max_tokens, scorer.positions))
            # What is left may be cut otherwise, into more tokens.
            prompt = prompt.encode()[int(tokens.lengths[:excess].sum()) :].decode(errors="ignore")
        return prompt

    @torch.no_grad()
    def _write_tokens(self, prompt: str, max_tokens: int, stop: Sequence[str]) -> str:
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        scorer = cast(TokenScorer, self.scorer)
        if scorer.positions is not None and (excess := 1 + ids.shape[1] + max_tokens - scorer.positions) > 0:
            if not scorer.truncate or excess >= ids.shape[1]:
                raise ValueError(_no_room(ids.shape[1], max_tokens, scorer.positions))
            ids = ids[:, excess:]
        ids = torch.cat([torch.full((1, 1), scorer.bos_id), ids], dim=1).to(self.model.device)
        self.model.set_attn_implementation("sdpa")
        try:
            out = cast(Any, self.model).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                stop_strings=list(stop) or None,
                tokenizer=self.tokenizer,
                pad_token_id=0,
            )
        finally:
            use_packed(self.model)
        text = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return min((text.split(word)[0] for word in stop), key=len, default=text)


def _no_room(tokens: int, more: int, positions: int) -> str:
    return f"{tokens} tokens leave no room for {more} in {positions} positions"


def examinee(
    model: str | Path | ByteLM | None,
    teacher: str | Path | None = None,
    *,
    dtype: str = "float32",
    device: torch.device,
    batch_bytes: int = 65536,
    beam: int = 1,
    combine: Combine = "sum",
    truncate: bool = False,
    mode: Mode = "joint",
) -> Examinee:
    """A byte-level model after stage 2 (``model`` alone), one of stage 1 by its teacher's tokens (both), or a teacher.

    Args:
        model: a folder, or the model itself, in evaluation mode, on its device.
        teacher: a Hugging Face folder or a GGUF file.
        dtype: ``float32`` or ``bfloat16``, of the weights that are read.
        device: where a teacher computes, and a model that is read.
        batch_bytes, beam, combine, truncate: as :class:`models.Scorer` has them.
        mode: how a byte-level model writes.

    Raises:
        UserError: neither is given, a model can't be read or can't be scored so, or a beam for tokens.
    """
    try:
        if teacher is None:
            if model is None:
                raise UserError("no model is given: name a model's folder, such as runs/quickstart/model")
            student = _byte_model(model, dtype, device)
            check_mode(student, mode)
            scorer = Scorer(student, batch_bytes=batch_bytes, beam=beam, combine=combine, truncate=truncate)
            return Examinee(student, scorer, f"lower bound, beam={beam}, combine={combine}", mode=mode)
        if beam > 1:
            raise UserError(f"beam={beam}: with teacher={teacher} bits play no part; leave it out")
        asked, tokenizer = load_teacher(teacher, dtype=DTYPES[dtype])
        if model is None:
            torch.nn.Module.to(asked, device)
        else:
            asked = _byte_model(model, dtype, device)
        tokens = TokenBytes(tokenizer)
        by_tokens = TokenScorer(asked, tokens.encode, bos_id=tokens.bos_id, batch_bytes=batch_bytes, truncate=truncate)
        likelihood = "along the teacher's tokens"
        if model is None:
            return Examinee(asked, by_tokens, likelihood, tokenizer)
        writer = TokenHeadWriter(cast(ByteLM, asked), vocabulary_of(tokens), tokens.encode)
        return Examinee(asked, by_tokens, likelihood, by_token_head=writer)
    except ValueError as error:
        raise UserError(str(error)) from error


def _byte_model(model: str | Path | ByteLM, dtype: str, device: torch.device) -> ByteLM:
    if isinstance(model, ByteLM):
        return model
    return load_model(Namespace(model=Path(model), dtype=dtype, device=str(device)))
