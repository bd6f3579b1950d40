"""Prepared text on disk: aligned with the teacher's tokens once, memory-mapped ever after.

A split holds the bytes of its documents, and their tokens with their lengths in bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from training.alignment import Aligned, TokenBytes
from training.errors import UserError
from training.text import HELD_OUT, Document, Skipped, hash_fraction, is_held_out

FORMAT = 1
MANIFEST = "manifest.json"
ENCODE_BYTES = 4 * 1024 * 1024
ENCODE_DOCUMENTS = 1024
MAX_TOKEN_BYTES = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class Split:
    """D documents of N bytes and M tokens, memory-mapped.

    text: uint8 [N]; doc_offsets: int64 [D+1], in bytes; token_ids: int32 [M]; token_lengths: uint16 [M], in bytes;
    token_offsets: int64 [D+1], in tokens.
    """

    text: np.ndarray
    doc_offsets: np.ndarray
    token_ids: np.ndarray
    token_lengths: np.ndarray
    token_offsets: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.doc_offsets) - 1


SPLIT_DTYPES = {
    "text": np.uint8,
    "doc_offsets": np.int64,
    "token_ids": np.int32,
    "token_lengths": np.uint16,
    "token_offsets": np.int64,
}
SPLIT_NAMES = ("train", "held_out")


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: documents to train on, documents held out by the hash of their source, and the manifest."""

    train: Split
    held_out: Split
    manifest: dict[str, Any]

    @property
    def bos_id(self) -> int:
        return self.manifest["bos_id"]

    @property
    def eos_id(self) -> int:
        return self.manifest["eos_id"]

    @property
    def fingerprint(self) -> str:
        """A hash of the text and of the tokenizer that cut it."""
        return self.manifest["fingerprint"]

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """Maps a folder that `prepare` has finished.

        Raises:
            UserError: no manifest (preparing was cut short), another format, or a file of the wrong size.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError:
            raise UserError(f"{folder} holds no prepared corpus (no {MANIFEST}): prepare it again") from None
        if manifest.get("format") != FORMAT:
            raise UserError(f"{folder} has corpus format {manifest.get('format')}, not {FORMAT}: prepare it again")
        splits = {name: _map_split(folder / name, manifest[name]) for name in SPLIT_NAMES}
        return cls(**splits, manifest=manifest)


def _map_split(folder: Path, counts: dict[str, int]) -> Split:
    offsets = counts["documents"] + 1
    sizes = {
        "text": counts["bytes"],
        "doc_offsets": offsets,
        "token_ids": counts["tokens"],
        "token_lengths": counts["tokens"],
        "token_offsets": offsets,
    }
    arrays = {}
    for name, dtype in SPLIT_DTYPES.items():
        path = folder / f"{name}.bin"
        if not path.is_file() or path.stat().st_size != sizes[name] * np.dtype(dtype).itemsize:
            raise UserError(f"{path} is not the file that its manifest describes: prepare the corpus again")
        # A plain view, because slicing a memmap is slow; nothing can't be mapped.
        arrays[name] = np.asarray(np.memmap(path, dtype, mode="r")) if sizes[name] else np.empty(0, dtype)
    return Split(**arrays)


def prepare(
    documents: Iterable[Document],
    tokenizer: Any,
    folder: str | Path,
    *,
    limit_bytes: int | None = None,
    skipped: Skipped | None = None,
    held_out_only: bool = False,
    identity: str = "",
) -> Corpus:
    """Aligns documents with a fast tokenizer's tokens and writes them to `folder`, a part of them held out.

    Documents that cannot be aligned exactly are counted in `skipped`, which ends up in the manifest. The manifest is
    written last and at once: a folder without one is not a corpus. Reading stops after `limit_bytes` of text.
    A document is held out by the hash of its source alone; where that holds out none of a few documents, the one
    with the smallest hash is.

    Args:
        held_out_only: put every document on the held-out side and leave the other empty.
        identity: of what else the corpus's fingerprint stands for.

    Raises:
        UserError: a slow tokenizer, or so few documents that a split which is wanted would be empty.
    """
    tokens = TokenBytes(tokenizer)
    skipped = Skipped() if skipped is None else skipped
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    text_hash = hashlib.blake2b((tokens.fingerprint + identity).encode(), digest_size=16)
    spare: tuple[float, Document, Aligned] | None = None

    with ExitStack() as stack:
        writers = {name: _Writer(folder / name, stack) for name in SPLIT_NAMES}
        for document, aligned in align_documents(_shown(limited(documents, limit_bytes)), tokens, skipped):
            text_hash.update(document.text)
            if held_out_only or is_held_out(document.source):
                writers["held_out"].add(document, aligned)
                continue
            # The document with the smallest hash so far waits: it may be needed on the other side.
            waiting = (hash_fraction(document.source, HELD_OUT), document, aligned)
            if spare is None or waiting[0] < spare[0]:
                spare, waiting = waiting, spare
            if waiting is not None:
                writers["train"].add(*waiting[1:])
        if spare is not None:
            writers["train" if writers["held_out"].documents else "held_out"].add(*spare[1:])

    counts = {name: writer.counts() for name, writer in writers.items()}
    wanted = ("held_out",) if held_out_only else SPLIT_NAMES
    if not all(counts[name]["documents"] for name in wanted):
        found = sum(split["documents"] for split in counts.values())
        raise UserError(
            f"{found} usable documents (skipped: {skipped}) do not give "
            f"{'held-out text' if held_out_only else 'both training and held-out text'}: give more"
        )
    manifest = {
        "format": FORMAT,
        **counts,
        "vocab_size": len(tokens),
        "bos_id": tokens.bos_id,
        "eos_id": tokens.eos_id,
        "tokenizer": tokens.fingerprint,
        "fingerprint": text_hash.hexdigest(),
        "skipped": skipped.as_dict(),
    }
    unfinished = folder / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
    os.replace(unfinished, folder / MANIFEST)
    return Corpus.open(folder)


def _shown(documents: Iterable[Document]) -> Iterator[Document]:
    with tqdm(desc="aligning text with tokens", unit="B", unit_scale=True, disable=None) as progress:
        for document in documents:
            progress.update(len(document.text))
            yield document


def until(documents: Iterable[Document], enough_bytes: int) -> Iterator[Document]:
    """Documents until their texts have `enough_bytes` together."""
    total = 0
    for document in documents:
        yield document
        total += len(document.text)
        if total >= enough_bytes:
            return


def limited(documents: Iterable[Document], limit_bytes: int | None) -> Iterator[Document]:
    """Documents for as long as their texts stay within `limit_bytes` together."""
    total = 0
    for document in documents:
        total += len(document.text)
        if limit_bytes is not None and total > limit_bytes:
            return
        yield document


def align_documents(
    documents: Iterable[Document], tokens: TokenBytes, skipped: Skipped, longest: int = MAX_TOKEN_BYTES
) -> Iterator[tuple[Document, Aligned]]:
    """Documents with their tokens; those that cannot be aligned, or hold a token above `longest` bytes, are counted."""
    for chunk in _chunks(documents):
        found = tokens.encode([document.text.decode() for document in chunk])
        for document, aligned in zip(chunk, found, strict=True):
            if aligned is None:
                skipped.add("token ends not exact", document.source)
            elif not len(aligned.ids):
                skipped.add("no text", document.source)
            elif aligned.lengths.max() > longest:
                skipped.add(f"token above {longest} bytes", document.source)
            else:
                yield document, aligned


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents, each of ENCODE_BYTES or a little more, so that memory stays bounded."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= ENCODE_BYTES or len(chunk) >= ENCODE_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Writer:
    """Appends documents to the files of a split, which `stack` closes."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        folder.mkdir(exist_ok=True)
        self.files = {}
        for name in SPLIT_DTYPES:
            path = folder / f"{name}.bin"
            # A new file, never the old one cut to nothing: a run that has it mapped goes on reading.
            path.unlink(missing_ok=True)
            self.files[name] = stack.enter_context(open(path, "xb"))  # noqa: SIM115
        self.documents = self.bytes = self.tokens = 0
        self._write_offsets()

    def add(self, document: Document, aligned: Aligned) -> None:
        self.files["text"].write(document.text)
        self.files["token_ids"].write(aligned.ids.astype(SPLIT_DTYPES["token_ids"]).tobytes())
        self.files["token_lengths"].write(aligned.lengths.astype(SPLIT_DTYPES["token_lengths"]).tobytes())
        self.documents += 1
        self.bytes += len(document.text)
        self.tokens += len(aligned.ids)
        self._write_offsets()

    def _write_offsets(self) -> None:
        self.files["doc_offsets"].write(np.int64(self.bytes).tobytes())
        self.files["token_offsets"].write(np.int64(self.tokens).tobytes())

    def counts(self) -> dict[str, int]:
        return {"documents": self.documents, "bytes": self.bytes, "tokens": self.tokens}
