"""The numbers of one stage."""

from dataclasses import dataclass, field

from training.errors import UserError
from training.tables import check_one_of, check_positive, check_share

STAGES = ("1.1", "1.2", "1.3", "2.1", "2.2")


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
        alignment_weight: of the embedding alignment beside stage 1.2's distillation.
        direction: of stage 1.2's KL: ``reverse`` is KL(student || teacher).
        boundary_weight: of the boundary loss beside stage 2.2's cross-entropy.
        end_weight: of a token end against a byte that ends none, in the boundary loss.
        distill_weight: of a KL to the teacher's next-token distribution that stays in stage 2.2.
        draft_weight: of the draft head's cross-entropy in stages 2.1 and 2.2, where the model has such a head. It is
            positive: to go without, leave ``model.draft_head`` off.
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


def check_stage(where: str, stage: StageRecipe, *, needs_length: bool = True) -> None:
    if needs_length and (stage.bytes is None) == (stage.seconds is None):
        raise UserError(f"{where}: give bytes or seconds, one of them")
    check_positive(where, stage, "bytes", "seconds", "lr", "global_batch_bytes", "end_weight", "draft_weight")
    check_share(where, stage, "warmup", "floor")
    check_one_of(where, stage, "decay", ("linear", "cosine"))
    check_one_of(where, stage, "direction", ("reverse", "forward"))
