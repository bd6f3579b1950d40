"""How the router's chunks lean on spaces: ``python -m evals.boundaries MODEL --teacher TEACHER --text FILES``.

A byte's *distance* is the number of bytes between it and the next white space: 0 where white space follows at once, as
it does where most tokens end. For each distance, on clean and on noised text: how often the tokenizer ends a token
there, how often the router ends a chunk, and how often both do. A router that has learnt spaces in place of tokens is
right at distance 0 and wrong elsewhere.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bytekernels.files import write_json
from evals.noise import NOISES, noised
from evals.report import table
from evals.texts import add_text_arguments, texts_of
from models import ByteLM
from models.command import CommandParser, add_model_arguments, load_model
from models.padding import pack_with_padding
from training.alignment import TokenBytes
from training.errors import UserError
from training.teacher import load_teacher

FURTHEST = 8  # greater distances are counted together
SPACE = np.isin(np.arange(256), list(b" \n\r\t"))


@dataclass
class Counts:
    """What lies at one distance, or at several together.

    Attributes:
        num_bytes: all bytes but the last of each text, whose bit the router does not know.
        tokenizer: of these, ends of tokens.
        router: ends of chunks.
        both: the two at once.
    """

    num_bytes: int = 0
    tokenizer: int = 0
    router: int = 0
    both: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def rates(self) -> dict[str, float]:
        """Ends per byte of both, and the router's precision, recall and F1; 0 where there is nothing to divide by."""
        return {
            "bytes": self.num_bytes,
            "tokenizer's rate": self.tokenizer / max(1, self.num_bytes),
            "router's rate": self.router / max(1, self.num_bytes),
            "precision": self.both / max(1, self.router),
            "recall": self.both / max(1, self.tokenizer),
            "f1": 2 * self.both / max(1, self.router + self.tokenizer),
        }


def distances(text: bytes) -> np.ndarray:
    """Bytes between each byte and the next white space, or the text's end where there is none: int64 [n]."""
    places = np.arange(len(text))
    spaces = np.flatnonzero(SPACE[np.frombuffer(text, dtype=np.uint8)])
    following = np.append(spaces, len(text))[np.searchsorted(spaces, places, "right")]
    return following - places - 1


def count(text: bytes, tokenizer: np.ndarray, router: np.ndarray) -> list[Counts]:
    """Counts at distances 0 ... FURTHEST, the last for it and all beyond.

    Args:
        text: of n bytes.
        tokenizer, router: bool [n], where tokens and chunks end.
    """
    at = np.minimum(distances(text), FURTHEST)[:-1]
    found = []
    for distance in range(FURTHEST + 1):
        rows = at == distance
        a, b = tokenizer[:-1][rows], router[:-1][rows]
        found.append(Counts(len(a), int(a.sum()), int(b.sum()), int((a & b).sum())))
    return found


@torch.no_grad()
def router_ends(model: ByteLM, texts: Sequence[bytes]) -> list[np.ndarray]:
    """Where the router ends chunks: bool [n] for each text of n bytes.

    Raises:
        ValueError: a router that does not look ahead, which says where chunks start.
    """
    if not model.config.lookahead:
        raise ValueError("this model's router says where chunks start (lookahead=False), not where they end")
    ids, cu_seqlens = pack_with_padding(texts, model.device)
    boundary = model.route(ids, cu_seqlens).boundary.cpu().numpy()
    starts = cu_seqlens.tolist()
    return [boundary[start + 1 : start + 1 + len(text)] for start, text in zip(starts, texts, strict=False)]


def measure(
    model: ByteLM, tokens: TokenBytes, texts: Sequence[str], change: Callable[[str], str]
) -> tuple[list[Counts], int]:
    """Counts by distance over all texts after a change, and how many were left out: tokens that are not their bytes."""
    total, left_out = [Counts() for _ in range(FURTHEST + 1)], 0
    for text in filter(None, map(change, texts)):
        (found,) = tokens.encode([text])
        if found is None:
            left_out += 1
            continue
        data = text.encode()
        ends = np.zeros(len(data), dtype=bool)
        ends[np.cumsum(found.lengths) - 1] = True
        (chunks,) = router_ends(model, [data])
        total = [a + b for a, b in zip(total, count(data, ends, chunks), strict=True)]
    return total, left_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = CommandParser(
        prog="python -m evals.boundaries", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add_text_arguments(parser, limit=100, length=2000)
    parser.add_argument("--noises", nargs="*", default=list(NOISES), choices=NOISES, help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of noise (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        model = load_model(options)
        tokens = TokenBytes(load_teacher(options.teacher)[1])
        texts = texts_of(options)
        rows = {"clean": measure(model, tokens, texts, str)}
        for name in options.noises:
            rows[name] = measure(model, tokens, texts, partial(noised, name=name, seed=options.seed))
    except (UserError, ValueError) as error:
        parser.error(str(error))
    rates = {name: _rows(counts) for name, (counts, _) in rows.items()}
    left_out = {name: number for name, (_, number) in rows.items()}
    columns = [(place, what) for place in ("0", "elsewhere") for what in ("tokenizer's rate", "router's rate", "f1")]
    head = ["text", *(f"{what} {'at spaces' if place == '0' else place}" for place, what in columns)]
    lines = table(
        head, [[name, *(f"{row[place][what]:.3f}" for place, what in columns)] for name, row in rates.items()]
    )
    print("\n".join(lines))
    if options.json:
        settings = {"documents": len(texts), "length": options.length, "seed": options.seed}
        write_json(options.json, {**settings, "left out": left_out, "by distance": rates})
    return 0


def _rows(counts: Sequence[Counts]) -> dict[str, dict[str, float]]:
    """Rates at each distance, at all but 0 (``elsewhere``), and everywhere (``all``)."""
    found = {str(distance): each.rates() for distance, each in enumerate(counts)}
    found["elsewhere"] = sum(counts[1:], Counts()).rates()
    found["all"] = sum(counts, Counts()).rates()
    return found


if __name__ == "__main__":
    sys.exit(main())
