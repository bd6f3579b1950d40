"""What a text costs by where its chunks end: ``python -m evals.chunk_cost MODEL --teacher TEACHER --text FILES``.

The same model and text along three paths: the router's own chunks, the likeliest by the router that are all strings of
the vocabulary (:meth:`models.ByteLM.hold_to_vocabulary`), and the tokenizer's. The bits of every path are paid for, so
each is a lower bound of the likelihood. Beside bits per byte stand the chunks that are no string of the vocabulary, and
what they cost.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import bytekernels
from bytekernels import BOS
from bytekernels.files import write_json
from evals.report import table
from evals.texts import add_text_arguments, texts_of
from models import ByteLM
from models.command import CommandParser, add_model_arguments, load_model
from models.likelihood import path_log_probs, refuse_leaks
from training.alignment import TokenBytes
from training.errors import UserError
from training.teacher import load_teacher


@dataclass
class Cost:
    """Of a text's chunks, or of some of them.

    Attributes:
        chunks: how many.
        num_bytes: in them.
        bits: ``-log2`` of the probability of these bytes and of the bits beside them.
    """

    chunks: int = 0
    num_bytes: int = 0
    bits: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.chunks + other.chunks, self.num_bytes + other.num_bytes, self.bits + other.bits)


def cost(text: bytes, ends: np.ndarray, bits: np.ndarray, strings: frozenset[bytes]) -> tuple[Cost, Cost]:
    """Of the chunks of a text that are strings, and of those that are none.

    Args:
        text: of n bytes.
        ends: bool [n], where chunks end; what follows the last end is a chunk too.
        bits: float64 [n], what each byte and its bit cost.
        strings: the vocabulary.
    """
    found = [Cost(), Cost()]
    cuts = sorted({0, len(text), *(np.flatnonzero(ends) + 1).tolist()})
    for start, stop in pairwise(cuts):
        kind = text[start:stop] not in strings
        found[kind] += Cost(1, stop - start, float(bits[start:stop].sum()))
    return found[0], found[1]


@torch.no_grad()
def measure(model: ByteLM, tokens: TokenBytes, texts: Sequence[str]) -> tuple[dict[str, tuple[Cost, Cost]], int]:
    """:func:`cost` along each path, over all texts, and how many were left out: their tokens are not their bytes.

    Raises:
        ValueError: a model without suffix features, whose vocabulary is not known; or whose dechunk weight leaks.
        UserError: all texts are left out.
    """
    features = model.encoder.suffix
    if features is None or not model.config.lookahead:
        raise ValueError(
            "this model holds no vocabulary, or no chunk ends: it needs suffix features and lookahead=True"
        )
    refuse_leaks(model)
    strings = frozenset(filter(None, features.strings()))
    total: dict[str, tuple[Cost, Cost]] = {}
    left_out = 0
    for text in filter(None, texts):
        (found,) = tokens.encode([text])
        if found is None:
            left_out += 1
            continue
        data = text.encode()
        ids, cu_seqlens = (tensor.to(model.device) for tensor in bytekernels.pack_bytes([data]))
        for name, boundary in _paths(model, ids, cu_seqlens, np.cumsum(found.lengths)).items():
            log_probs = path_log_probs(model(ids, cu_seqlens, boundary).logits, ids, cu_seqlens, boundary)
            bits = -log_probs[:-1].cpu().numpy() / math.log(2)
            before = total.get(name, (Cost(), Cost()))
            added = cost(data, boundary[1:].cpu().numpy(), bits, strings)
            total[name] = before[0] + added[0], before[1] + added[1]
    if not total:
        raise UserError("the tokenizer's tokens are the bytes of no text: give other --text, or another teacher")
    return total, left_out


def _paths(model: ByteLM, ids: Tensor, cu_seqlens: Tensor, token_ends: np.ndarray) -> dict[str, Tensor]:
    """Bool [T] each, of one text after BOS; token_ends: int [n], its bytes up to each token's end."""
    own = model.router(model.encoder(ids, cu_seqlens), ids, cu_seqlens)
    tokenizer = ids == BOS
    tokenizer[torch.from_numpy(token_ends)] = True
    return {
        "router": own.boundary,
        "held to the vocabulary": model.hold_to_vocabulary(own.prob, ids, cu_seqlens),
        "tokenizer": tokenizer,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = CommandParser(
        prog="python -m evals.chunk_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add_text_arguments(parser, limit=20, length=1500)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        model = load_model(options)
        tokens = TokenBytes(load_teacher(options.teacher)[1])
        texts = texts_of(options)
        found, left_out = measure(model, tokens, texts)
    except (UserError, ValueError) as error:
        parser.error(str(error))
    head = ["path", "bits/byte", "chunks", "no strings", "bytes in these", "bits of each", "bits/byte of all in these"]
    print("\n".join(table(head, [[name, *_row(*both)] for name, both in found.items()])))
    if left_out:
        print(f"{left_out} of {len(texts)} texts left out: their tokens are not their bytes")
    if options.json:
        rows = {name: dict(zip(("strings", "others"), map(asdict, both), strict=True)) for name, both in found.items()}
        write_json(options.json, {"documents": len(texts), "length": options.length, "left out": left_out} | rows)
    return 0


def _row(strings: Cost, others: Cost) -> list[str]:
    whole = strings + others
    each = f"{others.bits / others.chunks:.1f}" if others.chunks else ""
    return [
        f"{whole.bits / whole.num_bytes:.4f}",
        *map(str, (whole.chunks, others.chunks, others.num_bytes)),
        each,
        f"{others.bits / whole.num_bytes:.4f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
