"""The numbers of one stage."""

from dataclasses import dataclass, field

from training.errors import UserError
from training.tables import check_not_negative, check_one_of, check_positive, check_share

STAGES = ("1.1", "1.2", "1.3", "2.1", "2.2")  # the paper's curriculum
JOINT = "joint"
KNOWN_STAGES = (JOINT, *STAGES)
NOISE_KINDS = ("upper", "random_case", "drop", "repeat", "no_spaces", "spaces", "antspeak")


@dataclass(frozen=True)
class StageRecipe:
    """One stage.

    Attributes:
        lr: peak learning rate.
        warmup: share of the stage over which it rises from 0.
        floor: share of the peak that it falls to.
        decay: ``linear`` or ``cosine``.
        bytes: training bytes; or
        seconds: training time (the schedule then follows the clock).
        lr_scale: factor on the rate of parameters whose name begins with a key.
        global_batch_bytes: bytes in one optimizer step, where this stage wants others than the run.
        alignment_weight: of the embedding alignment beside the distillation of stage 1.2 or joint.
        direction: of that distillation's KL: ``reverse`` is KL(student || teacher).
        boundary_weight: of the boundary loss beside stage 2.2's cross-entropy, or joint's distillation.
        end_weight: of a token end against a byte that ends none, in the boundary loss.
        distill_weight: of a KL to the teacher's next-token distribution that stays in stage 2.2.
        draft_weight: of the draft head's cross-entropy in stages 2.1 and 2.2, where the model has such a head. It is
            positive: to go without, leave ``model.draft_head`` off.
        anchor_weight: of a KL to the model that stage 2.2 starts from, frozen, at the tokenizer's ends.
        byte_marginals: share of the cross-entropy of stages 2.1 and 2.2 that is against the teacher's own distribution
            of the next byte and chunk end, with the tokenizer's chunks (:mod:`training.marginals`).
        remember_bytes: stage 2.1 learns from so many bytes of text, drawn by the seed and seen again and again, and
            what frozen models make of them is computed once (:mod:`training.remembered`); None for all text.
        noise_share: share of the sequences whose characters are noised (:mod:`training.noise`).
        noise_kinds: each of them is noised in one of these ways.
        noise_rate: share of the characters that ``drop``, ``repeat`` and ``spaces`` act on.
        consistency_weight: of a KL between the router's probabilities on the noised bytes and on the clean ones, in
            stages with a boundary loss.
        vocabulary_share: share of stage 1.1's sequences that have tokens replaced by others, drawn from the whole
            vocabulary (:mod:`training.vocabulary`).
        vocabulary_rate: share of the tokens in such a sequence that are replaced.
        vocabulary_power: a token is drawn in proportion to ``(its count in the text + 1)`` to this power.
    """

    lr: float
    warmup: float = 0.01
    floor: float = 0.1
    decay: str = "cosine"
    bytes: int | None = None
    seconds: float | None = None
    lr_scale: dict[str, float] = field(default_factory=dict)
    global_batch_bytes: int | None = None
    alignment_weight: float = 1.0
    direction: str = "reverse"
    boundary_weight: float = 1.0
    end_weight: float = 1.0
    distill_weight: float = 0.0
    draft_weight: float = 0.3
    anchor_weight: float = 0.0
    byte_marginals: float = 0.0
    remember_bytes: int | None = None
    noise_share: float = 0.0
    noise_kinds: tuple[str, ...] = NOISE_KINDS
    noise_rate: float = 0.1
    consistency_weight: float = 0.0
    vocabulary_share: float = 0.0
    vocabulary_rate: float = 0.5
    vocabulary_power: float = 0.5


def check_stage(where: str, name: str, stage: StageRecipe, *, needs_length: bool = True) -> None:
    """Refuse numbers that are out of range, or that the stage called ``name`` has no use for.

    Raises:
        UserError: naming the first of them.
    """
    if needs_length and (stage.bytes is None) == (stage.seconds is None):
        raise UserError(f"{where}: give bytes or seconds, one of them")
    check_positive(where, stage, "bytes", "seconds", "lr", "global_batch_bytes", "end_weight", "draft_weight")
    check_positive(where, stage, "remember_bytes")
    check_positive(where, stage, "noise_rate")
    check_not_negative(where, stage, "anchor_weight", "consistency_weight", "vocabulary_power")
    check_share(
        where,
        stage,
        "warmup",
        "floor",
        "noise_share",
        "noise_rate",
        "byte_marginals",
        "vocabulary_share",
        "vocabulary_rate",
    )
    check_one_of(where, stage, "decay", ("linear", "cosine"))
    check_one_of(where, stage, "direction", ("reverse", "forward"))
    if not stage.noise_kinds:
        raise UserError(f"{where}: noise_kinds is empty: name some of {', '.join(NOISE_KINDS)}, or leave it out")
    for kind in stage.noise_kinds:
        if kind not in NOISE_KINDS:
            raise UserError(f"{where}: noise_kinds must be some of {', '.join(NOISE_KINDS)}, got {kind!r}")
    if stage.anchor_weight and name != "2.2":
        raise UserError(f"{where}: anchor_weight is for stage 2.2 alone, got {stage.anchor_weight}: leave it out")
    if stage.consistency_weight and name in ("1.1", "1.2", "2.1"):
        raise UserError(f"{where}: consistency_weight is for stages that train the router: leave it out")
    if stage.consistency_weight and not stage.noise_share:
        raise UserError(f"{where}: consistency_weight compares noised bytes with clean ones: give a noise_share too")
    if stage.vocabulary_share and name != "1.1":
        raise UserError(f"{where}: vocabulary_share is for stage 1.1 alone, got {stage.vocabulary_share}: leave it out")
    if stage.vocabulary_share and stage.noise_share:
        raise UserError(f"{where}: vocabulary_share and noise_share change the same text: leave one of them out")
    if stage.byte_marginals and name not in ("2.1", "2.2"):
        raise UserError(f"{where}: byte_marginals is for stages 2.1 and 2.2, got {stage.byte_marginals}: leave it out")
    if stage.remember_bytes and name != "2.1":
        raise UserError(f"{where}: remember_bytes is for stage 2.1, whose core is frozen, alone: leave it out")
    if stage.byte_marginals and stage.noise_share:
        raise UserError(
            f"{where}: byte_marginals are the teacher's of clean text, and noise_share changes it: leave one out"
        )
