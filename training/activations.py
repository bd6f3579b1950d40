"""What a forward pass leaves in memory for the backward pass, without running either.

A stage's model and losses run on the meta device, where tensors have shapes and no data, and every tensor that autograd
saves is added up. So nothing is assumed about what a layer keeps: the layers themselves say it. Two things are not run
as they are: attention, which keeps its inputs, its output and a float32 for each row and head, as flash attention does;
and autocast, which has no meta device: matrix products take and give its dtype, which is all that it changes here.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

import bytekernels
from bytekernels import BOS, Routing
from models import ByteLM
from models.byte_lm import JOINT
from models.window_attention import WindowAttention
from training.flops import PLAIN, Extras, Rows
from training.parallel import blocks_of
from training.stages import Stage

ATTENTION = "bytekernels_planned"


@dataclass(frozen=True)
class Activations:
    """Bytes of memory between a forward and a backward pass, in all that grows with the batch.

    Attributes:
        saved: what autograd keeps, logits left out.
        blocks: the part of ``saved`` that lies inside blocks.
        block_inputs: what activation checkpointing keeps of it.
        largest_block: of one block, which checkpointing computes anew.
        logits: what the byte-wise loss keeps of [T, 512].
        widest: the largest output of a matrix product.
    """

    saved: int = 0
    blocks: int = 0
    block_inputs: int = 0
    largest_block: int = 0
    logits: int = 0
    widest: int = 0

    def scaled(self, factor: float) -> "Activations":
        """Those of a batch ``factor`` times as large."""
        return Activations(**{name: round(factor * size) for name, size in asdict(self).items()})

    def peak(self, checkpoint: bool) -> int:
        """The most at any time, gradients of the widest output and of its neighbour included; logits left out."""
        kept = self.saved - self.blocks + self.block_inputs + self.largest_block if checkpoint else self.saved
        return kept + 2 * self.widest


def activations(model: ByteLM, stage: Stage, rows: Rows, dtype: torch.dtype, extras: Extras = PLAIN) -> Activations:
    """What a stage's forward pass over a batch keeps.

    Args:
        model: on the meta device; its parameters are frozen or not as the stage has it.
        stage: whose objective is run.
        rows: the batch.
        dtype: of matrix products: bfloat16 under autocast, else float32.
        extras: what is computed besides.
    """
    stage.freeze_others(model)
    model.core.backbone.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.attend = _window_attention  # type: ignore[method-assign]
    # Copies of weights are saved too, and do not grow: what a batch of this size adds to one is what it takes.
    one, two = (
        _run(model, stage, Rows(n * rows.bytes, n * rows.chunks, n * rows.sequences), dtype, extras) for n in (1, 2)
    )
    names = Activations.__dataclass_fields__
    return Activations(**{name: getattr(two, name) - getattr(one, name) for name in names})


def _run(model: ByteLM, stage: Stage, rows: Rows, dtype: torch.dtype, extras: Extras) -> Activations:
    ledger = _Ledger()
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_Products(dtype))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(ledger.save, lambda tensor: tensor))
        for handle in ledger.watch(model):
            stack.callback(handle.remove)
        _objective(model, stage, rows, dtype, extras, ledger)
    return ledger.result()


class _Ledger:
    """Tensors that autograd saves, each memory counted once, and where they come from."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}  # alive, so that no address is used twice
        self.sums = dict.fromkeys(Activations.__dataclass_fields__, 0)
        self.part = "saved"

    def save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.kept:
            self.kept[storage._cdata] = tensor
            self.sums[self.part] += storage.nbytes()
        return tensor

    def watch(self, model: ByteLM) -> Iterator[Any]:
        for parameter in model.parameters():
            self.kept[parameter.untyped_storage()._cdata] = parameter
        for module in model.modules():
            if isinstance(module, nn.Linear):
                yield module.register_forward_hook(self._see_output)
        for block in blocks_of(model):
            yield block.register_forward_pre_hook(self._enter, with_kwargs=True)
            yield block.register_forward_hook(self._leave)

    def _see_output(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.sums["widest"] = max(self.sums["widest"], output.untyped_storage().nbytes())

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad]
        self._begun = self.sums["saved"], sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def _leave(self, *_: Any) -> None:
        before, inputs = self._begun
        inside = self.sums["saved"] - before
        self.sums["blocks"] += inside
        self.sums["block_inputs"] += min(inputs, inside)
        self.sums["largest_block"] = max(self.sums["largest_block"], inside)

    def result(self) -> Activations:
        return Activations(**self.sums)


class _Products(TorchFunctionMode):
    """Matrix products in one dtype, as under autocast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = [value.to(self.dtype) if isinstance(value, Tensor) else value for value in args]
        return func(*args, **(kwargs or {}))


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


class _KeptGradient(torch.autograd.Function):
    """What linear_kl keeps: the gradient of its rows. (The weight's is as large for any batch.)"""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(hidden))
        return hidden.new_empty(())


def _attention(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
    """[1, heads, M, head_dim] to [1, M, heads, head_dim], in the dtype of ``value``, which no rotation has widened."""
    out = _FlashAttention.apply(query.to(value.dtype), key.to(value.dtype), value)
    return out.transpose(1, 2).to(query.dtype), None


def _window_attention(query: Tensor, key: Tensor, value: Tensor, _: Tensor) -> Tensor:
    """[1, heads, T, head_dim] to [1, T, heads, head_dim]."""
    return _FlashAttention.apply(query, key, value).transpose(1, 2)


AttentionInterface.register(ATTENTION, _attention)


# ---------------------------------------------------------------------- training/objectives.py on shapes


def _objective(model: ByteLM, stage: Stage, rows: Rows, dtype: torch.dtype, extras: Extras, ledger: _Ledger) -> None:
    """The forward pass of the stage's objective, as :mod:`training.objectives` has it, with M fixed beforehand."""
    ids, flags = torch.empty(rows.bytes, dtype=torch.uint8), torch.empty(rows.bytes, dtype=torch.bool)
    cu_seqlens = torch.empty(rows.sequences + 1, dtype=torch.int32)
    by_token = bytekernels.routing_of(flags, cu_seqlens, capacity=rows.chunks)
    h = None
    if stage.name not in ("1.1", "1.2") and (stage.name != "1.3" or model.router.encoder is None):
        h = model.encoder(ids, cu_seqlens)
    if stage.name in ("1.1", "1.2", "joint"):
        if stage.name == "joint":
            ends = model.encoder.chunks(ids, cu_seqlens, by_token, h)
        else:
            ends = model.encoder.chunks(ids, cu_seqlens, by_token)
        F.mse_loss(ends.float(), torch.empty(ends.shape))
        if stage.name != "1.1":
            _KeptGradient.apply(_core(model, ends).to(dtype))
        if stage.name != "joint":
            return
    read = model.router.read(h, ids, cu_seqlens)
    routing = bytekernels.route(
        model.router.q_proj(read), model.router.k_proj(read), cu_seqlens, required=ids == BOS, capacity=rows.chunks
    )
    if stage.name != "2.1":
        _boundary_loss(routing, flags)
    if extras.consistency:
        _consistency_loss(routing, flags)
    if stage.name in ("1.3", "joint"):
        return
    chunks = _core(model, model.encoder.chunks(ids, cu_seqlens, routing, h))
    logits, draft = model.decoder(model.dechunk(chunks, h, routing), ids, cu_seqlens)
    if model.config.dechunk == "causal":
        F.binary_cross_entropy_with_logits(model.dechunk.weight_logits(h), flags.float())
    if extras.distill or extras.anchor:
        hidden = _core(model, model.encoder.chunks(ids, cu_seqlens, by_token, h)).to(dtype)
        for _ in range(extras.distill + extras.anchor):
            _KeptGradient.apply(hidden)
    ledger.part = "logits"
    targets = torch.empty(rows.bytes, dtype=torch.int64)
    assert logits.shape == (rows.bytes, JOINT)
    if extras.marginals:
        log_probs = logits.float().log_softmax(-1)
        F.nll_loss(log_probs, targets)
        (torch.empty(logits.shape) * log_probs).sum()
    else:
        F.cross_entropy(logits.float(), targets)
    if draft is not None:
        F.cross_entropy(draft.float(), targets)


def _core(model: ByteLM, chunks: Tensor) -> Tensor:
    embeddings = chunks.to(model.core.backbone.dtype)[None]
    places = torch.empty(1, chunks.shape[0], dtype=torch.int64)
    return cast(Tensor, model.core.backbone(inputs_embeds=embeddings, position_ids=places, use_cache=False)[0][0])


def _boundary_loss(routing: Routing, targets: Tensor) -> None:
    losses = F.binary_cross_entropy(routing.prob.clamp(1e-6, 1 - 1e-6), targets.float(), reduction="none")
    (losses * targets).sum()


def _consistency_loss(routing: Routing, flags: Tensor) -> None:
    found, wanted = routing.prob.clamp(1e-6, 1 - 1e-6), torch.empty(routing.prob.shape)
    kl = wanted * (wanted / found).log() + (1 - wanted) * ((1 - wanted) / (1 - found)).log()
    (kl * flags).sum()
