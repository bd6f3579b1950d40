"""Folders that are whole or not there: checkpoints inside a stage, results at its end."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from training.errors import UserError

COMPLETE = "complete.json"


def write_folder(folder: Path, write: Callable[[Path], None], summary: dict[str, Any]) -> None:
    """Make a folder by ``write`` so that it appears complete or not at all.

    ``write`` fills a folder beside the target; its completion mark, with ``summary`` in it, is written last; then it
    takes the target's place.

    Raises:
        UserError: the disk is full or not writable. What stood there before is left as it was.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        (partial / COMPLETE).write_text(json.dumps(summary, indent=1))
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the disk says
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {folder}: {reason}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a complete folder; None where there is none.

    A folder that was being replaced when the process died still stands under its old name, and is put back.
    """
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and (old / COMPLETE).is_file():
        old.rename(folder)
    mark = folder / COMPLETE
    return json.loads(mark.read_text()) if mark.is_file() else None


def save_state(folder: Path, state: dict[str, Any], summary: dict[str, Any]) -> None:
    """Write a training state (tensors and plain values) as a complete folder."""
    write_folder(folder, lambda partial: torch.save(state, partial / "state.pt"), summary)


def load_state(folder: Path) -> dict[str, Any] | None:
    """A training state that was written whole; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    if read_summary(folder) is None:
        return None
    try:
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"checkpoint {folder} is damaged ({error}); remove it to start its stage anew") from None
