"""The stages: which parameters learn, from which objective, measured by what."""

from dataclasses import dataclass

from torch import nn

from training import objectives
from training.objectives import Measure, Objective


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    Attributes:
        name: as in recipes and on the command line.
        title: for people.
        trains: prefixes of the parameters that learn; all others are frozen.
        objective: what is minimised.
        measures: what is read on held-out text before and after.
    """

    name: str
    title: str
    trains: tuple[str, ...]
    objective: Objective
    measures: tuple[Measure, ...]

    def freeze_others(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Let only this stage's parameters learn; returns them by name."""
        trained = []
        for name, parameter in model.named_parameters():
            learns = name.startswith(self.trains)
            parameter.requires_grad_(learns)
            parameter.grad = None
            if learns:
                trained.append((name, parameter))
        return trained


TEACHER = Stage("teacher", "the teacher", ("",), objectives.next_token, (objectives.NEXT_TOKEN,))

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "joint",
            "stages 1.1 to 1.3 at once",
            ("encoder.", "core.", "token_head.", "router."),
            objectives.joint,
            (objectives.KL, objectives.ALIGNMENT, objectives.BOUNDARY),
        ),
        Stage("1.1", "embedding alignment", ("encoder.",), objectives.alignment, (objectives.ALIGNMENT,)),
        Stage(
            "1.2",
            "joint distillation",
            ("encoder.", "core.", "token_head."),
            objectives.distillation,
            (objectives.KL, objectives.ALIGNMENT),
        ),
        Stage("1.3", "boundary learning", ("router.",), objectives.boundary, (objectives.BOUNDARY,)),
        Stage("2.1", "head adaptation", ("dechunk.", "decoder."), objectives.next_byte, (objectives.NEXT_BYTE,)),
        Stage(
            "2.2",
            "end to end",
            ("encoder.", "router.", "core.", "dechunk.", "decoder."),
            objectives.end_to_end,
            (objectives.NEXT_BYTE, objectives.BOUNDARY),
        ),
    )
}

CONTROL = Stage(
    "control",
    "fresh core, stage 2.2's loss",
    STAGES["2.2"].trains,
    objectives.end_to_end,
    (objectives.NEXT_BYTE, objectives.BOUNDARY),
)
