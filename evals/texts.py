"""The texts that commands hold a model's chunks against its teacher's tokens on: beginnings of documents."""

import argparse
from itertools import islice
from pathlib import Path

from models.command import counting_number
from training.text import read_documents


def add_text_arguments(parser: argparse.ArgumentParser, *, limit: int, length: int) -> None:
    """``--teacher``, ``--text``, ``--limit`` and ``--length``, with these defaults."""
    parser.add_argument("--teacher", type=Path, required=True, help="whose tokenizer says where tokens end")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="files or globs")
    parser.add_argument("--limit", type=counting_number, default=limit, help=f"documents (default: {limit})")
    parser.add_argument(
        "--length", type=counting_number, default=length, help=f"characters of each document (default: {length})"
    )


def texts_of(options: argparse.Namespace) -> list[str]:
    """The beginnings that were asked for.

    Raises:
        UserError: a file that is not there or cannot be read.
    """
    return [
        document.text.decode()[: options.length] for document in islice(read_documents(options.text), options.limit)
    ]
