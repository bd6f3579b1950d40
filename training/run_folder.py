"""A run's folder: whose it is, and what stands in it."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bytekernels.files import write_json
from training.errors import UserError
from training.recipe import Recipe, recipe_from
from training.stage_recipe import KNOWN_STAGES


def claim_folder(
    recipe: Recipe, folder: Path, names: Sequence[str], *, resume: bool, overwrite: bool, start: Path | None
) -> None:
    """Make a folder this run's own: check what stands there, and remove what ``overwrite`` gives up.

    Overwriting a stage removes what was made from it too: the stages after it, the control, the report and the model;
    and what another curriculum has left. Other stages that stand there keep the lengths that they
    were run for, and those that do not may have any.

    Raises:
        UserError: it holds results of these stages and neither ``resume`` nor ``overwrite`` is asked for, results of
            another recipe, or the very model that the stage is to start from.
    """
    order = recipe.order
    others = [name for name in KNOWN_STAGES if name not in order]
    doomed = [*order[order.index(names[0]) :], *others, "control"] if overwrite else []
    kept = [name for name in (*order, *others, "control") if name not in doomed and _pieces(folder, name)]
    mark, wanted = folder / "recipe.json", json.loads(json.dumps(dataclasses.asdict(recipe)))
    if kept and mark.is_file():
        written = _as_it_would_be_written(mark)
        for name in written["stage"].keys() & wanted["stage"].keys():
            mine, theirs = wanted["stage"][name], written["stage"][name]
            for length in ("seconds", "bytes"):
                if name not in kept and "control" not in kept:
                    theirs[length] = mine[length]
                elif name in kept and name not in names:
                    mine[length] = theirs[length]
    if kept and mark.is_file() and (found := _decisive(written)) != _decisive(wanted):
        raise UserError(
            f"stage {kept[0]} in {folder} was made with other numbers ({first_difference(found, _decisive(wanted))}): "
            "repeat the flags it was started with, give another --out, or start all stages anew with --overwrite"
        )
    taken = [name for name in names if name in kept]
    if taken and not resume:
        raise UserError(
            f"{folder} already holds stage {taken[0]}: --resume to go on, --overwrite to start anew, or another --out"
        )
    pieces = [piece for name in doomed for piece in _pieces(folder, name)]
    if start is not None and any(start.resolve() == piece.resolve() for piece in pieces):
        raise UserError(f"--overwrite would remove {start}, which --from starts from: copy it elsewhere first")
    for piece in pieces:
        shutil.rmtree(piece)
    if overwrite:
        shutil.rmtree(folder / "model", ignore_errors=True)
        for name in ("report.json", "curves.png"):
            (folder / name).unlink(missing_ok=True)
    write_json(mark, wanted)


def _as_it_would_be_written(mark: Path) -> dict[str, Any]:
    """A run's recipe, with the keys that have come since at their defaults."""
    return json.loads(json.dumps(dataclasses.asdict(recipe_from(json.loads(mark.read_text())))))


def checkpoint_of(result: Path) -> Path:
    """Where the snapshots of a stage lie until its result, a folder of that name, is whole."""
    return result.with_name(f"{result.name}.checkpoint")


def logs_of(folder: Path, stage: str) -> Path:
    """Where a run keeps the logs of a stage."""
    return folder / "logs" / stage


# What has no part in a run's result, and may change when it is resumed.
_IDLE = ("log", "parallel", "checkpoint_seconds", "keep_checkpoints", "data.workers", "data.shuffle_bytes",
         "data.download", "optimizer.max_skipped")  # fmt: skip


def _decisive(recipe: dict[str, Any], at: str = "") -> dict[str, Any]:
    """A recipe, or the part of it called ``at``, without what has no part in the result."""
    return {
        name: _decisive(value, f"{at}{name}.") if isinstance(value, dict) else value
        for name, value in recipe.items()
        if f"{at}{name}" not in _IDLE
    }


def _pieces(folder: Path, name: str) -> list[Path]:
    """All that a stage has left: its result or halves of it, its checkpoints, its logs."""
    result = folder / "stages" / name
    halves = [result.with_name(f".{name}.{form}") for form in ("partial", "old")]
    return [path for path in (result, *halves, checkpoint_of(result), logs_of(folder, name)) if path.exists()]


def first_difference(found: Any, wanted: Any, at: str = "") -> str:
    """Where two nested settings differ first, in words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            if found.get(key) != wanted.get(key):
                return first_difference(found.get(key), wanted.get(key), f"{at}.{key}")
    return f"{at.lstrip('.')}: {found!r} then, {wanted!r} now"
