"""Who learns from whom: the student under its root, the frozen models beside it, the stage's numbers."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import bytekernels
from bytekernels import AlignedBatch, Routing, SortedVocabulary
from models import ByteLM
from models.core import run_packed, use_packed
from training.recipe import StageRecipe
from training.remembered import Remembered


class Teacher(nn.Module):
    """The frozen token-trained model. All of its parameters that are not in blocks are read by way of ``forward``.

    Args:
        model: a causal language model of transformers that accepts ``inputs_embeds``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = use_packed(model).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, batch: AlignedBatch, *, hidden: bool = True) -> Tensor:
        """The last hidden state at every token, or the tokens' input embeddings: [M, d_core]."""
        embeddings = self.model.get_input_embeddings()(batch.token_ids)
        return run_packed(self.model.base_model, embeddings, batch.token_cu) if hidden else embeddings

    def narrow(self, dtype: torch.dtype) -> None:
        """Keep the parameters in a narrower dtype. Buffers stay: rotary frequencies would lose their angles."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    @property
    def head(self) -> Tensor:
        """[V, d_core], the token head's weight, which may be read after a forward pass."""
        return self.model.get_output_embeddings().weight


class Anchor(nn.Module):
    """A student as it is now, as far as its token head: a frozen copy to hold a later one against.

    Args:
        model: with a token head.
    """

    def __init__(self, model: ByteLM) -> None:
        super().__init__()
        self.encoder, self.core, self.token_head = map(deepcopy, (model.encoder, model.core, model.token_head))
        self.eval().requires_grad_(False).zero_grad()

    @torch.no_grad()
    def forward(self, batch: AlignedBatch) -> Tensor:
        """The core's state at every token's end: [M, d_core]. The bytes are the batch's own, noised where they are."""
        routing = bytekernels.routing_of(batch.token_end, batch.cu_seqlens)
        return self.core(self.encoder.chunks(batch.ids, batch.cu_seqlens, routing), routing.cu_chunks)

    @property
    def head(self) -> Tensor:
        """[V, d_core], the token head's weight, which may be read after a forward pass."""
        return self.token_head.weight


@dataclass(frozen=True)
class Context:
    """Who learns from whom, and how.

    Attributes:
        model: the student (a token-trained model while a teacher is being made).
        teacher: None where a stage needs none.
        recipe: the stage's numbers.
        vocabulary: the teacher's, by prefixes, where ``recipe.byte_marginals`` asks for it.
        anchor: what the student was when the stage began, where ``recipe.anchor_weight`` asks for it.
        remembered: what frozen models have made of sequences, where ``recipe.remember_bytes`` asks for it.
    """

    model: PreTrainedModel
    teacher: Teacher | None
    recipe: StageRecipe
    anchor: Anchor | None = None
    vocabulary: SortedVocabulary | None = None
    remembered: Remembered | None = None

    def chunks(self, batch: AlignedBatch, h: Tensor, routing: Routing) -> Tensor:
        """What the student's core makes of a batch's chunks, [M, d_core]: computed, or remembered where it is frozen.

        Args:
            batch: S sequences.
            h: [T, d_core], the encoder's states.
            routing: the chunks.
        """

        def read() -> Tensor:
            return self.model.encoder.chunks(batch.ids, batch.cu_seqlens, routing, h)

        if self.remembered is None:
            return self.model.core(read(), routing.cu_chunks)

        def compute(new: Tensor, cu: Tensor) -> Tensor:
            return self.model.core(read()[new], cu)

        return self.remembered.rows("chunks", batch, routing.boundary, routing.cu_chunks, compute)

    def teacher_states(self, batch: AlignedBatch) -> Tensor:
        """The teacher's last hidden state at every token, [M, d_core]: computed or remembered."""
        if self.remembered is None:
            return self.teacher(batch)

        def compute(new: Tensor, cu: Tensor) -> Tensor:
            return self.teacher(batch._replace(token_ids=batch.token_ids[new], token_cu=cu))

        return self.remembered.rows("teacher", batch, batch.token_end, batch.token_cu, compute)


class Learner(nn.Module):
    """The root under which a stage computes: FSDP2 gathers parameters for what happens inside a forward pass."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.model = context.model
        self._context = (context,)  # in a tuple, so that the teacher is no module of this one

    def forward(self, function: Callable[[Context, AlignedBatch], Any], batch: AlignedBatch) -> Any:
        """``function(context, batch)``: an objective, or a measure's sums."""
        return function(self._context[0], batch)
