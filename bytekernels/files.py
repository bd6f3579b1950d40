"""Files that are whole or not there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written beside its place and moved there; its folder is made if need be.

    Args:
        path: of the file.
        write: is given the path to write to.

    Raises:
        OSError: it can't be written; nothing is left behind, and what stood at the path still does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON, which has no NaN, as :func:`write_whole` does.

    Raises:
        OSError: as there.
        ValueError: a number is not finite.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))
