"""Where a stage's numbers are written: JSON lines, TensorBoard, Weights & Biases."""

import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from bytekernels.files import write_json
from training.errors import UserError

JSONL = "metrics.jsonl"
LINE = ("step", "bytes", "seconds", "time", "nonfinite")  # a line's keys beside the values
WANDB = "wandb.json"


class Sink(Protocol):
    """Takes the numbers of one step. An OSError from ``write`` means that they could not be kept."""

    def write(self, step: int, values: dict[str, float], num_bytes: int, seconds: float) -> None: ...

    def close(self) -> None: ...


class Jsonl:
    """``metrics.jsonl``: an object a line for each logged step, complete on disk as soon as it is written.

    Keys are ``step``, ``bytes`` and ``seconds`` (both since the stage began), ``time`` (of the clock, Unix seconds) and
    the values by name. A value that is not finite is ``null``, and the line's ``nonfinite`` says what it was:
    ``{"loss": null, "nonfinite": {"loss": "nan"}}``.

    Args:
        folder: that the file lies in.
        step: resumed from: later lines, and a half line that a kill has left, are removed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / JSONL
        if path.exists():
            partial = folder / f".{JSONL}.partial"
            with partial.open("wb") as kept:
                kept.writelines(_lines_until(path, step))
                kept.flush()
                os.fsync(kept.fileno())
            partial.replace(path)
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, values: dict[str, float], num_bytes: int, seconds: float) -> None:
        line: dict[str, Any] = {"step": step, "bytes": num_bytes, "seconds": round(seconds, 3)}
        line["time"] = round(time.time(), 3)
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        if odd := {name: str(value) for name, value in values.items() if not math.isfinite(value)}:
            line["nonfinite"] = odd
        rest = json.dumps(line, allow_nan=False).encode() + b"\n"
        while rest:  # a disk that fills up takes a part first, and raises at the next
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()


def _lines_until(path: Path, step: int) -> Iterator[bytes]:
    return (line for line, values in _whole_lines(path) if values["step"] <= step)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The steps of a ``metrics.jsonl``, without a half line that a kill has left; ``None`` is a value not finite."""
    return [values for _, values in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as file:
        for line in file:
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if line.endswith(b"\n") and isinstance(values, dict) and "step" in values:
                yield line, values


class TensorBoard:
    """An event file in ``folder``; a tag for each value.

    Args:
        folder: that TensorBoard knows as one run.
        step: resumed from: later points of an earlier attempt are hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=step + 1)

    def write(self, step: int, values: dict[str, float], num_bytes: int, seconds: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases. Its id is kept in ``wandb.json``, so a resumed stage goes on in the same run.

    Steps that are repeated after a resume stay as they were logged first: Weights & Biases takes no earlier step.

    Args:
        folder: for ``wandb.json`` and its own files.
        project: as Weights & Biases knows it.
        name: of a new run.
        config: shown beside the run.
    """

    def __init__(self, folder: Path, project: str, name: str, config: dict[str, Any]) -> None:
        check_wandb(project)
        import wandb

        mark = folder / WANDB
        kept = json.loads(mark.read_text()) if mark.is_file() else {}
        run_id = kept.get("id") if kept.get("project") == project else None
        try:
            self._run = wandb.init(
                project=project, name=name, id=run_id, resume="allow", dir=str(folder), config=config
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases refuses project {project!r} ({error}): mend that, set WANDB_MODE=offline, or leave "
                "log.wandb out"
            ) from None
        write_json(mark, {"project": project, "id": self._run.id})

    def write(self, step: int, values: dict[str, float], num_bytes: int, seconds: float) -> None:
        self._run.log({**values, "bytes": num_bytes, "seconds": seconds}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_wandb(project: str | None) -> None:
    """Find out, without importing it, whether Weights & Biases is there for a recipe that asks for it.

    Raises:
        UserError: it is not installed.
    """
    if project is None:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # none at all, or a folder of runs that looks like a package
        raise UserError(
            f"log.wandb = {project!r} asks for Weights & Biases, which is not installed: pip install wandb, or leave "
            "log.wandb out"
        )
