"""What the commands share: a mistake told in one line, text from anywhere as bytes, a model from a folder."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn, TextIO

import torch
import transformers

from models.byte_lm import ByteLM
from models.utf8 import to_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CommandParser(argparse.ArgumentParser):
    """Tells a mistake in one line on stderr and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def whole_number(text: str) -> int:
    """An argument that counts something.

    Raises:
        argparse.ArgumentTypeError: not a whole number, or less than 0.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text!r}")
    return int(text)


def counting_number(text: str) -> int:
    """An argument that counts what there must be at least one of.

    Raises:
        argparse.ArgumentTypeError: not a whole number, or less than 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that :func:`load_model` reads."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a byte-level model's folder: runs/quickstart/model")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")


def add_replace_argument(parser: argparse.ArgumentParser) -> None:
    """``--replace``, for :func:`input_bytes`."""
    parser.add_argument("--replace", action="store_true", help="bytes 0xFE and 0xFF in the text become '?'")


def standard_input() -> TextIO:
    """``sys.stdin``.

    Raises:
        ValueError: it is closed.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed: give the text as an argument or in a file")
    return sys.stdin


def input_bytes(text: str | bytes | None, file: str | None, *, replace: bool) -> bytes:
    """The bytes of a command's argument, or of a file; ``-`` as the file is standard input.

    Raises:
        ValueError: the file can't be read, standard input is closed, or a byte is one of the model's own marks
            (:func:`models.utf8.to_bytes`).
    """
    if text is not None:
        content = os.fsencode(text)  # an argument that is not UTF-8 keeps its bytes
    elif file == "-":
        content = standard_input().buffer.read()
    else:
        try:
            content = Path(file or "").read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error.strerror}") from None
    try:
        return to_bytes(content, replace=replace)
    except ValueError as error:
        raise ValueError(f"{error} (--replace)") from None


def load_model(options: argparse.Namespace) -> ByteLM:
    """The model of :func:`add_model_arguments`, in evaluation mode.

    Raises:
        ValueError: no folder, no whole byte-level model in it, or a device that is not there.
    """
    folder = options.model
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give one with a byte-level model, such as runs/quickstart/model")
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {options.device} is no device: give cuda or cpu") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {options.device}: {torch.cuda.device_count()} GPUs are there; give --device cpu")
    transformers.utils.logging.disable_progress_bar()
    try:
        model = ByteLM.from_pretrained(folder, local_files_only=True, dtype=DTYPES[options.dtype])
    except OSError as error:
        raise ValueError(str(error)) from error
    torch.nn.Module.to(model, device)
    return model.eval()


def end_quietly_with_the_pipe() -> None:
    """Let the process end without a word when nobody reads its output any longer, as other commands do."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
