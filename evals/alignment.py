"""How near stage 1.1 comes: ``python -m evals.alignment MODEL --teacher TEACHER --text FILES [--seen FILES]``.

At every token's end of held-out text the encoder's state is held against the teacher's embedding of the token: cosine,
squared error as a share of the embeddings' own variance, and whether the nearest of all the vocabulary's embeddings is
the right one. Rows are occurrences, so that means are weighted by frequency; with ``--seen``, bands of tokens by how
often they occur there show what is learnt from how many examples.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import bytekernels
from bytekernels import AlignedBatch
from bytekernels.files import write_json
from evals.report import table
from models import ByteLM
from models.command import CommandParser, add_model_arguments, counting_number, load_model
from training.alignment import Aligned, TokenBytes
from training.errors import UserError
from training.teacher import load_teacher
from training.text import is_held_out, read_documents

BANDS = (0, 1, 10, 100, 1000, 10_000)  # least occurrences in the text that was seen
WINDOW = 8192  # bytes of a document that are read
ROWS = 2048  # that are held against the vocabulary at once


@dataclass(frozen=True)
class Nearness:
    """N tokens' ends.

    Attributes:
        token_ids: int64 [N].
        cosine: float64 [N], between the state and the token's embedding.
        squared: float64 [N], the squared distance between them.
        nearest: bool [N], no other token's embedding is nearer. Tokens with one and the same embedding are one.
    """

    token_ids: np.ndarray
    cosine: np.ndarray
    squared: np.ndarray
    nearest: np.ndarray


def nearness(states: Tensor, token_ids: Tensor, embeddings: Tensor) -> Nearness:
    """Hold states [N, d] against the embeddings [V, d] of their tokens, int64 [N]."""
    half = embeddings.float().square().sum(1) / 2
    found = [(rows.float() @ embeddings.float().T - half).argmax(1) for rows in states.split(ROWS)]
    wanted, nearest = embeddings[token_ids], torch.cat(found)
    right = (nearest == token_ids) | (embeddings[nearest] == wanted).all(1)
    states, wanted = states.double(), wanted.double()
    cosine, squared = F.cosine_similarity(states, wanted), (states - wanted).square().sum(1)
    return Nearness(*(tensor.cpu().numpy() for tensor in (token_ids, cosine, squared, right)))


@torch.no_grad()
def measure(model: ByteLM, embeddings: Tensor, tokens: TokenBytes, texts: Sequence[str]) -> tuple[Nearness, int]:
    """Of all tokens of the texts, and how many texts were left out: those whose tokens are not their bytes.

    Args:
        model: whose encoder is read, on its device.
        embeddings: [V, d_core], the teacher's input embeddings.
        tokens: of the teacher's tokenizer.
        texts: each is read from BOS on.

    Raises:
        UserError: all of them are left out.
    """
    parts, left_out = [], 0
    for text, found in zip(texts, tokens.encode(texts), strict=True):
        if found is None:
            left_out += 1
            continue
        batch = _batch(text, found).to(model.device)
        routing = bytekernels.routing_of(batch.token_end, batch.cu_seqlens)
        states = model.encoder.chunks(batch.ids, batch.cu_seqlens, routing)[1:]
        parts.append(nearness(states, batch.token_ids, embeddings))
    if not parts:
        raise UserError("the tokenizer's tokens are the bytes of no text: give other --text, or another teacher")
    columns = zip(*((each.token_ids, each.cosine, each.squared, each.nearest) for each in parts), strict=True)
    return Nearness(*map(np.concatenate, columns)), left_out


def _batch(text: str, found: Aligned) -> AlignedBatch:
    """A text and its tokens, without one for BOS."""
    ids, cu_seqlens = bytekernels.pack_bytes([text.encode()])
    token_end = torch.zeros(len(ids), dtype=torch.bool)
    token_end[torch.from_numpy(np.cumsum(found.lengths).astype(np.int64))] = True
    token_end[0] = True
    token_ids = torch.from_numpy(found.ids.astype(np.int64))
    return AlignedBatch(ids, cu_seqlens, token_end, token_ids, torch.tensor([0, len(token_ids)]).int(), None)


def bands(found: Nearness, seen: np.ndarray | None, variance: float) -> dict[str, dict[str, float]]:
    """Means over all occurrences, and over those of tokens that were seen so often.

    Args:
        found: of the held-out text.
        seen: int64 [V], occurrences in the text that was learnt from; None for no bands.
        variance: what the squared error is a share of.
    """

    def row(chosen: np.ndarray) -> dict[str, float]:
        return {
            "occurrences": int(chosen.sum()),
            "tokens": len(np.unique(found.token_ids[chosen])),
            "cosine": float(found.cosine[chosen].mean()),
            "squared error": float(found.squared[chosen].mean() / variance),
            "nearest": float(found.nearest[chosen].mean()),
        }

    rows = {"all": row(np.ones(len(found.token_ids), dtype=bool))}
    if seen is not None:
        counts = seen[found.token_ids]
        for least, most in zip(BANDS, [*BANDS[1:], None], strict=True):
            chosen = (counts >= least) & (counts < (np.inf if most is None else most))
            if chosen.any():
                rows[_band(least, most)] = row(chosen)
    return rows


def _band(least: int, most: int | None) -> str:
    if most is None:
        return f"seen {least} times or more"
    return f"seen {least} to {most - 1} times" if most > 1 else "never seen"


def occurrences(tokens: TokenBytes, paths: Sequence[str], *, trained_on: bool = False) -> np.ndarray:
    """How often each token occurs in files, or in what a run on them does not hold out: int64 [V]."""
    total = np.zeros(len(tokens), np.int64)
    for document in read_documents(paths):
        if trained_on and is_held_out(document.source):
            continue
        (found,) = tokens.encode([document.text.decode()])
        if found is not None:
            total += np.bincount(found.ids, minlength=len(total))
    return total


def beginnings(paths: Sequence[str], limit_bytes: int, *, held_out: bool = False) -> Iterator[str]:
    """The beginnings of documents, about so many bytes of them; ``held_out``: of those that a run on them holds out."""
    for document in read_documents(paths):
        if held_out and not is_held_out(document.source):
            continue
        text = document.text[:WINDOW].decode(errors="ignore")
        if text:
            yield text
        limit_bytes -= len(text)
        if limit_bytes <= 0:
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = CommandParser(
        prog="python -m evals.alignment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--teacher", type=Path, required=True, help="whose tokens and embeddings are learnt")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="held-out files or globs")
    parser.add_argument("--held-out", action="store_true", help="of --text only what a run on these files holds out")
    parser.add_argument("--seen", nargs="+", metavar="FILE", help="files or globs that were learnt from")
    parser.add_argument("--limit-bytes", type=counting_number, default=200_000, help="of --text (default: 200000)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        model = load_model(options)
        teacher, tokenizer = load_teacher(options.teacher)
        tokens = TokenBytes(tokenizer)
        embeddings = cast(Tensor, teacher.get_input_embeddings().weight).detach().to(model.device)
        if embeddings.shape[1] != model.config.core_width:
            raise UserError(
                f"{options.teacher} has embeddings of {embeddings.shape[1]}, but the model's core is "
                f"{model.config.core_width} wide: give the teacher that it was distilled from"
            )
        texts = list(beginnings(options.text, options.limit_bytes, held_out=options.held_out))
        if not texts:
            raise UserError(f"{' '.join(options.text)} hold no document to measure: give more text")
        found, left_out = measure(model, embeddings, tokens, texts)
        seen = occurrences(tokens, options.seen, trained_on=options.held_out) if options.seen else None
    except (UserError, ValueError) as error:
        parser.error(str(error))
    used = embeddings[torch.from_numpy(found.token_ids).to(embeddings.device)].double()
    rows = bands(found, seen, float((used - used.mean(0)).square().sum(1).mean()))
    head = ["tokens", "occurrences", "different", "cosine", "squared error", "nearest is right"]
    lines = table(
        head,
        [
            [name, *(str(row[key]) for key in ("occurrences", "tokens")),
             *(f"{row[key]:.4f}" for key in ("cosine", "squared error", "nearest"))]
            for name, row in rows.items()
        ],
    )  # fmt: skip
    print("\n".join(lines))
    if options.json:
        write_json(options.json, {"texts": len(texts), "left out": left_out, "bands": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
