"""How often a model writes the word that follows: ``python -m evals.next_word MODEL --text FILES``.

From places in documents (:func:`evals.tasks.read_continuations`) the model goes on greedily, jointly and, where it has
a draft head, by multi-byte prediction, and is right where it writes the text's own next word, and white space after it.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from bytekernels.files import write_json
from evals.metrics import Estimate, Metric
from evals.questions import Question
from evals.report import cell, table
from evals.tasks import read_continuations
from models import ByteLM, generate
from models.command import CommandParser, add_model_arguments, counting_number, load_model
from models.writer import Mode
from training.errors import UserError

AT_ONCE = 64  # texts that are written together


def next_words(model: ByteLM, questions: Sequence[Question], mode: Mode) -> Estimate:
    """The share of contexts after which the model writes the word that follows there.

    Args:
        model: after stage 2, in evaluation mode.
        questions: contexts, each with its continuation, which begins with white space.
        mode: how it writes.

    Raises:
        ValueError: ``multibyte`` without a draft head.
    """
    right = []
    for start in range(0, len(questions), AT_ONCE):
        batch = questions[start : start + AT_ONCE]
        words = [match[0] for question in batch if (match := re.match(r"\s*\S+", question.pairs[0][1]))]
        # Room for the word, the white space before it and one byte more; what others need makes no difference.
        room = [len(word.encode()) + 1 for word in words]
        written = generate(model, [question.pairs[0][0] for question in batch], max_new_bytes=max(room), mode=mode)
        for text, word, most in zip(written, words, room, strict=True):
            new = text.new[:most].decode(errors="replace")
            ends = len(text.new) < most or new[-1:].isspace() or len(new.split()) > 1
            right.append(ends and new.split()[:1] == word.split())
    return Metric(np.array(right, dtype=float), np.ones(len(right))).estimate()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = CommandParser(
        prog="python -m evals.next_word", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="files or globs")
    parser.add_argument("--limit", type=counting_number, default=200, help="places (default: 200)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        model = load_model(options)
        questions = read_continuations(options.text, limit=options.limit)
        modes = get_args(Mode) if model.config.draft_head else ("joint",)
        found = {mode: next_words(model, questions, mode).plain() for mode in modes}
    except (UserError, ValueError) as error:
        parser.error(str(error))
    rows = [[mode, cell(estimate)] for mode, estimate in found.items()]
    print("\n".join(table(["mode", "next words, %"], rows)))
    if options.json:
        write_json(options.json, {"places": len(questions), "next words": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
