"""How often a model writes the word that follows: ``python -m evals.next_word MODEL --text FILES``.

From places in documents (:func:`evals.tasks.read_continuations`) the model goes on greedily, jointly and, where it has
a draft head, by multi-byte prediction, and is right where it writes the text's own next word.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from evals.metrics import Estimate, Metric
from evals.questions import Question
from evals.report import table, write_whole
from evals.tasks import read_continuations
from models import ByteLM, generate
from models.command import CommandParser, add_model_arguments, load_model
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
    words = [question.pairs[0][1].split()[0] for question in questions]
    right = []
    for start in range(0, len(questions), AT_ONCE):
        wanted = words[start : start + AT_ONCE]
        contexts = [question.pairs[0][0] for question in questions[start : start + AT_ONCE]]
        longest = max(len(word.encode()) for word in wanted) + 2  # white space before, and what ends it
        written = generate(model, contexts, max_new_bytes=longest, mode=mode)
        right += [text.new_text.split()[:1] == [word] for text, word in zip(written, wanted, strict=True)]
    return Metric(np.array(right, dtype=float), np.ones(len(right))).estimate()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = CommandParser(
        prog="python -m evals.next_word", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="files or globs")
    parser.add_argument("--limit", type=int, default=200, help="places (default: 200)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.limit < 1:
        parser.error(f"--limit must be >= 1, got {options.limit}")
    try:
        model = load_model(options)
        questions = read_continuations(options.text, limit=options.limit)
        modes = get_args(Mode) if model.config.draft_head else ("joint",)
        found = {mode: next_words(model, questions, mode) for mode in modes}
    except (UserError, ValueError) as error:
        parser.error(str(error))
    rows = [[mode, f"{100 * value:.1f} ± {100 * error:.1f}"] for mode, (value, error) in found.items()]
    print("\n".join(table(["mode", "next words, %"], rows)))
    if options.json:
        write_whole(options.json, json.dumps({"places": len(questions), "next words": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
