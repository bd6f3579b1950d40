"""Folders that are whole or not there: the results of stages, the cache."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
                sync(file)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the disk says
        raise UserError(f"cannot write {folder}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What went wrong, in a line."""
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
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
