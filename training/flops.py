"""What an optimizer step must compute, in floating-point operations, from the model's sizes alone.

Counted: matrix products (2 m n k), attention (the pairs that its causal mask and window let through, not the square),
and the project's own ops as their rooms' ``roofline.py`` have them. Not counted: what the core does element by element
(norms, rotations, activations, residual sums), losses, the optimizer, collectives, and what activation checkpointing
computes a second time. The backward pass holds gradients to weights where they are trained and to inputs where
something trained lies before them; attention's forms its scores again, as flash attention does, and as
torch.utils.flop_counter counts it. A head's gradients in :func:`bytekernels.linear_kl` count as backward, wherever
they are computed.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from bytekernels.byte_table import roofline as table_room
from bytekernels.dechunk import roofline as dechunk_room
from bytekernels.mixer import roofline as mixer_room
from bytekernels.norm import roofline as norm_room
from bytekernels.route import roofline as route_room
from models.byte_lm import JOINT
from models.config import ByteLMConfig
from training.stage_recipe import StageRecipe
from training.stages import CONTROL, STAGES

TABLE = 256  # rows of a byte table
_ANY = torch.bfloat16  # rooflines ask for a dtype, which their FLOPs do not depend on


@dataclass(frozen=True)
class Rows:
    """The size of a packed batch, or of several together: T bytes, M chunks (or tokens), S sequences."""

    bytes: int
    chunks: int
    sequences: int


@dataclass(frozen=True)
class Flops:
    """Operations of the forward and of the backward pass."""

    forward: float = 0
    backward: float = 0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class CoreSizes:
    """A dense transformer's sizes.

    Attributes:
        width: d_core.
        linear: elements of all its layers' weight matrices.
        query_width: query heads times head_dim.
        windows: of each layer, how many positions back it attends to; None for all.
        vocab: V, of its head.
    """

    width: int
    linear: int
    query_width: int
    windows: tuple[int | None, ...]
    vocab: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        """The sizes of a configuration, its matrices counted on the meta device."""
        with torch.device("meta"):
            backbone = AutoModel.from_config(config)
        linear = sum(part.weight.numel() for part in backbone.modules() if isinstance(part, nn.Linear))
        layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        return cls(config.hidden_size, linear, heads * head_dim, windows, config.vocab_size)


@dataclass(frozen=True)
class Sizes:
    """A byte-level model's sizes, as :class:`models.ByteLMConfig` names them, in plain numbers."""

    core: CoreSizes
    width: int
    encoder: str
    encoder_layers: int
    decoder_layers: int
    state_size: int
    head_dim: int
    num_heads: int
    num_groups: int
    conv_kernel: int
    attention_window: int
    attention_inner: int
    router: str
    router_layers: int
    suffix_bytes: int
    bridge_inner: int
    router_inner: int
    dechunk: str
    draft_head: bool
    marginal_head: bool

    @classmethod
    def of(cls, config: ByteLMConfig) -> Self:
        """The sizes of a configuration. Takes a fraction of a second: make them once, not in each step."""
        own = {name: getattr(config, name) for name in cls.__dataclass_fields__ if name != "core"}
        return cls(core=CoreSizes.of(config.core_config()), **own)


@dataclass(frozen=True)
class Extras:
    """Options of a stage that compute more than it does without them.

    Attributes:
        distill: the teacher's distribution stays in stage 2.2's loss.
        anchor: so does that of the model that stage 2.2 began with.
        marginals: the teacher's distributions are stage 2's soft targets.
        remembered: what frozen transformers make of the text is computed once in all, and is not counted.
        consistency: encoder and router read the clean bytes beside the noised ones.
    """

    distill: bool = False
    anchor: bool = False
    consistency: bool = False
    marginals: bool = False
    remembered: bool = False

    @classmethod
    def of(cls, stage: str, recipe: StageRecipe) -> Self:
        """Those that a recipe asks of a stage, or of the control."""
        last = stage in ("2.2", CONTROL.name)
        return cls(
            distill=last and recipe.distill_weight > 0,
            anchor=last and recipe.anchor_weight > 0,
            consistency=recipe.consistency_weight > 0,
            marginals=recipe.byte_marginals > 0,
            remembered=recipe.remember_bytes is not None,
        )


PLAIN = Extras()


def stage_flops(sizes: Sizes, stage: str, rows: Rows, extras: Extras = PLAIN) -> Flops:
    """Operations of a stage's forward and backward pass over a batch.

    Args:
        sizes: of the student; the teacher is as large as its core.
        stage: one of :data:`training.stages.STAGES`, or ``control``.
        rows: the batch. Its sequences are taken to be of one length, which understates attention where they differ.
        extras: what is computed besides.
    """
    return sum(stage_parts(sizes, stage, rows, extras).values(), Flops())


def stage_parts(sizes: Sizes, stage: str, rows: Rows, extras: Extras = PLAIN) -> dict[str, Flops]:
    """:func:`stage_flops` in three parts: ``products``, ``attention`` and ``kernels`` (the project's own ops)."""
    chosen = CONTROL if stage == CONTROL.name else STAGES[stage]
    learns = {name: f"{name}." in chosen.trains for name in ("encoder", "router", "core", "token_head", "dechunk")}
    tally = _Tally(sizes, rows)
    if stage != "1.3" or sizes.router == "integrated":
        tally.encoder(learns["encoder"], by_token=stage in ("1.1", "1.2"))
    if stage in ("1.2", "joint"):
        tally.distillation(learns["core"], learns["token_head"])
        if stage == "joint":
            tally.router(learns["router"], learns["encoder"])
    elif stage == "1.3":
        tally.router(learns["router"], learns["encoder"])
    elif stage != "1.1":
        tally.router(learns["router"], learns["encoder"])
        if not extras.remembered:
            tally.core(learns["core"])
        tally.dechunk(learns["dechunk"], learns["encoder"])
        tally.decoder()
        if extras.marginals:
            if not extras.remembered:
                tally.core(False)
            tally.product(rows.chunks, sizes.core.width, sizes.core.vocab, False, False)
        if extras.distill or extras.anchor:
            tally.core(learns["core"])
        if extras.distill:
            tally.core(False)
            tally.heads(learns["token_head"], learns["core"])
        if extras.anchor:
            tally.encoder(False, by_token=True)
            tally.core(False)
            tally.heads(learns["token_head"], learns["core"])
    if extras.consistency:
        if sizes.router == "integrated":
            tally.encoder(False)
        tally.router(False, False)
    return tally.parts


def next_token_flops(core: CoreSizes, rows: Rows) -> Flops:
    """Operations of a token model's own training, forward and backward: ``rows.chunks`` tokens."""
    return sum(next_token_parts(core, rows).values(), Flops())


def next_token_parts(core: CoreSizes, rows: Rows) -> dict[str, Flops]:
    """:func:`next_token_flops` in the parts of :func:`stage_parts`."""
    tally = _CoreTally(core, rows)
    tally.core(learns=True)
    tally.product(rows.chunks, core.width, core.vocab)
    return tally.parts


def attended_pairs(length: float, window: int | None) -> float:
    """Pairs of query and key in a causal sequence, at most ``window`` keys for each query."""
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) / 2 + (length - reach) * reach


class _CoreTally:
    """Adds up the operations of a transformer over one batch."""

    def __init__(self, core: CoreSizes, rows: Rows) -> None:
        self.core_sizes, self.rows = core, rows
        self.parts = {"products": Flops(), "attention": Flops(), "kernels": Flops()}

    def add(self, part: str, forward: float, backward: float) -> None:
        self.parts[part] += Flops(forward, backward)

    def product(self, rows: int, d_in: int, d_out: int, weight: bool = True, inputs: bool = True) -> None:
        """[rows, d_in] x [d_in, d_out], and the gradients that are wanted of it."""
        one = 2 * rows * d_in * d_out
        self.add("products", one, one * (weight + inputs))

    def attention(self, rows: int, width: int, window: int | None, learns: bool) -> None:
        """Of a layer whose query heads are ``width`` wide together."""
        sequences = self.rows.sequences
        pairs = sequences * attended_pairs(rows / max(sequences, 1), window)
        each = 2 * width * pairs  # one of the two products forward, of the five backward
        self.add("attention", 2 * each, 5 * each * learns)

    def core(self, learns: bool) -> None:
        core, rows = self.core_sizes, self.rows
        one = 2 * rows.chunks * core.linear
        self.add("products", one, 2 * one * learns)
        for window in core.windows:
            self.attention(rows.chunks, core.query_width, window, learns)


class _Tally(_CoreTally):
    """Adds up the operations of a byte-level model over one batch."""

    def __init__(self, sizes: Sizes, rows: Rows) -> None:
        super().__init__(sizes.core, rows)
        self.sizes = sizes

    def kernel(self, room: object, name: str, *args: object, learns: bool, **options: bool) -> None:
        forward = getattr(room, name)(*args, _ANY, **options).flops
        backward = getattr(room, f"{name}_backward")(*args, _ANY, **options).flops
        self.add("kernels", forward, backward * learns)

    def swiglu(self, rows: int, d_in: int, inner: int, d_out: int, learns: bool, inputs: bool) -> None:
        self.product(rows, d_in, 2 * inner, learns, inputs)
        self.product(rows, inner, d_out, learns, learns or inputs)

    def stack(self, layers: int, learns: bool, *, table: bool) -> None:
        """Mamba2 blocks; with ``table`` the first one's norm and in_proj run over the 256 byte values."""
        sizes, total = self.sizes, self.rows.bytes
        inner = sizes.num_heads * sizes.head_dim
        projected = 2 * inner + 2 * sizes.num_groups * sizes.state_size + sizes.num_heads
        mixer = (total, sizes.num_heads, sizes.head_dim, sizes.state_size, sizes.num_groups, sizes.conv_kernel)
        for layer in range(layers):
            by_value = table and layer == 0
            rows = TABLE if by_value else total
            norm = "add_rms_norm" if layer else "rms_norm"
            self.kernel(norm_room, norm, rows, sizes.width, learns=learns)
            self.product(rows, sizes.width, projected, learns, learns)
            self.kernel(mixer_room, "mamba2_mixer", *mixer, self.rows.sequences, learns=learns, table=by_value)
            self.product(total, inner, sizes.width, learns, learns)
            if by_value:
                self.kernel(table_room, "byte_table", total, sizes.width, learns=learns)
        self.kernel(norm_room, "add_rms_norm" if layers else "rms_norm", total, sizes.width, learns=learns)

    def attention_stack(self, layers: int, learns: bool) -> None:
        """Blocks of windowed attention; the first one's norm and qkv run over the 256 byte values."""
        width, total = self.sizes.width, self.rows.bytes
        for layer in range(layers):
            rows = total if layer else TABLE
            self.kernel(norm_room, "add_rms_norm" if layer else "rms_norm", rows, width, learns=learns)
            self.product(rows, width, 3 * width, learns, learns)
            if not layer:
                for columns in (width, 3 * width):
                    self.kernel(table_room, "byte_table", total, columns, learns=learns)
            self.attention(total, width, self.sizes.attention_window, learns)
            self.product(total, width, width, learns, learns)
            self.kernel(norm_room, "add_rms_norm", total, width, learns=learns)
            self.swiglu(total, width, self.sizes.attention_inner, width, learns, learns)
        self.kernel(norm_room, "add_rms_norm" if layers else "rms_norm", total, width, learns=learns)

    def encoder(self, learns: bool, *, by_token: bool = False) -> None:
        """The blocks, and the SwiGLU over every byte or over the tokens' ends alone."""
        if self.sizes.encoder == "attention":
            self.attention_stack(self.sizes.encoder_layers, learns)
        else:
            self.stack(self.sizes.encoder_layers, learns, table=True)
        rows = self.rows.chunks if by_token else self.rows.bytes
        self.swiglu(rows, self.sizes.width, self.sizes.bridge_inner, self.core_sizes.width, learns, learns)
        if self.sizes.suffix_bytes:
            self.product(rows, self.core_sizes.width, self.core_sizes.width, learns, False)

    def router(self, learns: bool, inputs: bool) -> None:
        width = self.core_sizes.width
        if self.sizes.router == "split":
            width, inputs = self.sizes.width, learns  # it reads its own encoder
            self.stack(self.sizes.router_layers, learns, table=True)
        for _ in ("q", "k"):
            self.swiglu(self.rows.bytes, width, self.sizes.router_inner, width, learns, inputs)
        self.kernel(route_room, "route", self.rows.bytes, width, self.rows.chunks, self.rows.sequences, learns=learns)

    def dechunk(self, learns: bool, inputs: bool) -> None:
        rows, width = self.rows, self.core_sizes.width
        self.product(rows.bytes, width, width, learns, inputs)
        if self.sizes.dechunk == "causal":  # the weight of each chunk, and its loss at each byte
            self.product(rows.chunks + rows.bytes, width, 1, learns, inputs)
        self.kernel(dechunk_room, "dechunk", rows.bytes, width, rows.chunks, rows.sequences, learns=learns)

    def decoder(self) -> None:
        sizes, total = self.sizes, self.rows.bytes
        self.swiglu(total, self.core_sizes.width, sizes.bridge_inner, sizes.width, True, True)
        self.kernel(table_room, "byte_table", total, sizes.width, learns=True)
        self.stack(sizes.decoder_layers, True, table=False)
        self.product(total, sizes.width, JOINT + 256 * sizes.draft_head)
        if sizes.marginal_head:
            self.product(self.rows.chunks, self.core_sizes.width, self.core_sizes.vocab, False, False)

    def distillation(self, core: bool, head: bool) -> None:
        """The core over the tokenizer's chunks, the frozen teacher, and both heads."""
        self.core(core)
        self.core(False)
        self.heads(head, core)

    def heads(self, head: bool, core: bool) -> None:
        """The student's token head, and the one that it is held against, which is frozen."""
        chunks, width, vocab = self.rows.chunks, self.core_sizes.width, self.core_sizes.vocab
        self.product(chunks, width, vocab, head, core)
        self.product(chunks, width, vocab, False, False)
