"""A run's result as a Hugging Face folder: ``python training/export.py RUN OUT``."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch
from torch import Tensor

from models import ByteLM
from training.checkpoint import read_summary, write_folder
from training.errors import UserError
from training.parallel import Ranks
from training.recipe import recipe_from
from training.run_folder import checkpoint_of
from training.snapshot import Saved, Snapshots
from training.stage_recipe import KNOWN_STAGES, STAGES
from training.student import load_student

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("out", type=Path, help="the folder to be made")
    parser.add_argument("--stage", choices=KNOWN_STAGES, help="whose result (default: the last finished stage's)")
    parser.add_argument(
        "--checkpoint", action="store_true", help="the newest checkpoint of --stage, which has not finished"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    return parser.parse_args(arguments)


def finished(run: Path) -> list[str]:
    """The stages of a run that have a result, in the order of its curriculum."""
    kept = run / "recipe.json"
    order = recipe_from(json.loads(kept.read_text())).order if kept.is_file() else STAGES
    return [name for name in order if read_summary(run / "stages" / name) is not None]


def model_of(run: Path, stage: str | None, checkpoint: bool) -> ByteLM:
    """The model to be exported.

    Raises:
        UserError: the run has no such result, or no such checkpoint.
    """
    done = finished(run)
    if not checkpoint:
        if stage is None and not done:
            raise UserError(f"{run} has no finished stage: give a run's folder, or --checkpoint with --stage")
        name = stage or done[-1]
        if name not in done:
            raise UserError(f"stage {name} of {run} is not finished (finished: {', '.join(done) or 'none'})")
        return load_student(run / "stages" / name)
    if stage is None:
        raise UserError("--checkpoint needs --stage: whose checkpoint is it to be?")
    snapshots = Snapshots(checkpoint_of(run / "stages" / stage), Ranks(0, 1, torch.device("cpu")))
    origin = snapshots.about().get("origin", "")
    if not origin:
        raise UserError(f"stage {stage} of {run} has no checkpoint")
    start = Path(origin) if Path(origin).is_absolute() else run / "stages" / origin.removeprefix("stage ")
    if read_summary(start) is None and not (start / "config.json").is_file():
        raise UserError(f"stage {stage} began with {origin}, which is not there any more: let it finish")
    model = load_student(start)
    parameters = {f"model/{name}": value for name, value in model.state_dict().items()}

    def blank(saved: Mapping[str, Saved]) -> dict[str, Tensor]:
        learnt = [name for name in saved if name.startswith("model/")]
        if unknown := [name for name in learnt if name not in parameters]:
            raise UserError(f"the checkpoint has {unknown[0]}, which {start} has not: let the stage finish")
        return {name: parameters[name] for name in learnt}

    snapshots.load(blank)
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.out.exists() and not options.overwrite:
            raise UserError(f"{options.out} is there already: --overwrite to replace it")
        model = model_of(options.run, options.stage, options.checkpoint)
        if model.config.token_head_is_spare:
            model.drop_token_head()
        write_folder(options.out, model.to(DTYPES[options.dtype]).save_pretrained, {})
    except (UserError, OSError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
