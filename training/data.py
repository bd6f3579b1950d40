"""Prepared text on disk, and packed, document-aware batches of it.

A corpus is aligned once and then memory-mapped: the bytes of all documents, and the teacher's tokens with their
lengths in bytes. Documents are cut into windows at token ends; a batch is a packed row of windows.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bytekernels import EOS, pack_bytes, token_end_mask
from training.alignment import Aligned, TokenBytes
from training.errors import UserError
from training.text import HELD_OUT, Document, Skipped, hash_fraction, is_held_out

FORMAT = 1
MANIFEST = "manifest.json"
ENCODE_BYTES = 4 * 1024 * 1024
ENCODE_DOCUMENTS = 1024
CUT_TOKENS = 2**24

# ------------------------------------------------------------------------------------------------------ on disk


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
        arrays[name] = np.asarray(np.memmap(path, dtype, mode="r"))  # a plain view: slicing a memmap is slow
    return Split(**arrays)


def prepare(
    documents: Iterable[Document],
    tokenizer: Any,
    folder: str | Path,
    *,
    limit_bytes: int | None = None,
    skipped: Skipped | None = None,
) -> Corpus:
    """Aligns documents with a fast tokenizer's tokens and writes them to `folder`, a part of them held out.

    Documents that cannot be aligned exactly are counted in `skipped`, which ends up in the manifest. The manifest is
    written last and at once: a folder without one is not a corpus. Reading stops after `limit_bytes` of text.
    A document is held out by the hash of its source alone; where that holds out none of a few documents, the one
    with the smallest hash is.

    Raises:
        UserError: a slow tokenizer, or fewer than two documents, so that one split would be empty.
    """
    tokens = TokenBytes(tokenizer)
    skipped = Skipped() if skipped is None else skipped
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    text_hash = hashlib.blake2b(tokens.fingerprint.encode(), digest_size=16)
    spare: tuple[float, Document, Aligned] | None = None

    with ExitStack() as stack:
        writers = {name: _Writer(folder / name, stack) for name in SPLIT_NAMES}
        for document, aligned in _aligned(_limited(documents, limit_bytes), tokens, skipped):
            text_hash.update(document.text)
            if is_held_out(document.source):
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
    if not all(split["documents"] for split in counts.values()):
        found = sum(split["documents"] for split in counts.values())
        raise UserError(
            f"{found} usable documents (skipped: {skipped}) do not give both training and held-out text: give more"
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


def _limited(documents: Iterable[Document], limit_bytes: int | None) -> Iterator[Document]:
    total = 0
    for document in documents:
        total += len(document.text)
        if limit_bytes is not None and total > limit_bytes:
            return
        yield document


def _aligned(documents: Iterable[Document], tokens: TokenBytes, skipped: Skipped) -> Iterator[tuple[Document, Aligned]]:
    with tqdm(desc="aligning text with tokens", unit="B", unit_scale=True, disable=None) as progress:
        for chunk in _chunks(documents):
            found = tokens.encode([document.text.decode() for document in chunk])
            for document, aligned in zip(chunk, found, strict=True):
                progress.update(len(document.text))
                if aligned is None:
                    skipped.add("token ends not exact", document.source)
                elif not len(aligned.ids):
                    skipped.add("no text", document.source)
                elif aligned.lengths.max() > np.iinfo(np.uint16).max:
                    skipped.add("token above 65535 bytes", document.source)
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


# ------------------------------------------------------------------------------------------------------ windows


@dataclass(frozen=True)
class Windows:
    """W pieces of documents, in the order of the text, each beginning and ending on a token end.

    first_byte, first_token: int64 [W], positions in the split; bytes, tokens: int64 [W], sizes; last: bool [W], the
    piece ends its document. skipped_documents: how many documents hold a token longer than a window.
    """

    first_byte: np.ndarray
    bytes: np.ndarray
    first_token: np.ndarray
    tokens: np.ndarray
    last: np.ndarray
    skipped_documents: int

    def __len__(self) -> int:
        return len(self.bytes)


def cut_windows(split: Split, max_bytes: int) -> Windows:
    """Cuts every document, from its start, into windows of as many whole tokens as `max_bytes` holds."""
    pieces: list[np.ndarray] = []  # each [5, n]
    skipped_documents = 0
    first_document = 0
    while first_document < split.documents:
        token_limit = split.token_offsets[first_document] + CUT_TOKENS
        last_document = max(first_document + 1, int(np.searchsorted(split.token_offsets, token_limit, "right")) - 1)
        found, skipped = _cut_documents(split, first_document, last_document, max_bytes)
        pieces += found
        skipped_documents += skipped
        first_document = last_document
    cut = np.concatenate(pieces, axis=1) if pieces else np.empty((5, 0), dtype=np.int64)
    first_byte, n_bytes, first_token, n_tokens, last = cut[:, np.argsort(cut[0])]
    return Windows(first_byte, n_bytes, first_token, n_tokens, last.astype(bool), skipped_documents)


def _cut_documents(split: Split, first: int, stop: int, max_bytes: int) -> tuple[list[np.ndarray], int]:
    """Windows of the documents first … stop − 1, the k-th of every document at once."""
    token_offsets = split.token_offsets[first : stop + 1]
    base_token, base_byte = token_offsets[0], split.doc_offsets[first]
    lengths = split.token_lengths[base_token : token_offsets[-1]]
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # bytes before each token, and in all
    begin, end = token_offsets[:-1] - base_token, token_offsets[1:] - base_token

    too_long = np.flatnonzero(lengths > max_bytes)
    usable = np.ones(stop - first, dtype=bool)
    usable[np.searchsorted(end, too_long, "right")] = False
    skipped = int(stop - first - usable.sum())
    usable &= end > begin
    begin, end = begin[usable], end[usable]

    pieces = []
    while len(begin):
        cut = np.minimum(np.searchsorted(ends, ends[begin] + max_bytes, "right") - 1, end)
        last = cut == end
        pieces.append(
            np.stack([ends[begin] + base_byte, ends[cut] - ends[begin], begin + base_token, cut - begin, last])
        )
        begin, end = cut[~last], end[~last]
    return pieces, skipped


# ------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Batch:
    """S windows, packed: T bytes and M tokens.

    ids: uint8 [T], each window begins with BOS, and one that ends its document may end with EOS.
    cu_seqlens: int32 [S+1], where windows begin among the bytes.
    token_end: bool [T], the byte ends a token of the teacher's tokenizer; true at BOS and EOS.
    token_ids: int64 [M], the tokens in the order of their ends, with the teacher's BOS and EOS.
    token_cu: int32 [S+1], where windows begin among the tokens.
    """

    ids: Tensor
    cu_seqlens: Tensor
    token_end: Tensor
    token_ids: Tensor
    token_cu: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def _build_batch(corpus: Corpus, split: Split, windows: Windows, chosen: np.ndarray, eos: bool) -> Batch:
    ends_document = windows.last[chosen] & eos
    sequences, token_ids, token_lengths = [], [], []
    bos_id, eos_id, eos_length = np.array([corpus.bos_id]), np.array([corpus.eos_id]), np.array([1])
    for window, ends in zip(chosen.tolist(), ends_document.tolist(), strict=True):
        first_byte, first_token = windows.first_byte[window], windows.first_token[window]
        text = split.text[first_byte : first_byte + windows.bytes[window]].tobytes()
        tokens = slice(first_token, first_token + windows.tokens[window])
        sequences.append(text + bytes([EOS]) if ends else text)
        token_ids += [bos_id, split.token_ids[tokens]] + [eos_id] * ends
        token_lengths += [split.token_lengths[tokens]] + [eos_length] * ends

    ids, cu_seqlens = pack_bytes(sequences)
    tokens_per_window = torch.from_numpy(windows.tokens[chosen] + ends_document)
    lengths = torch.from_numpy(np.concatenate(token_lengths).astype(np.int32))
    return Batch(
        ids=ids,
        cu_seqlens=cu_seqlens,
        token_end=token_end_mask(lengths, _offsets(tokens_per_window), cu_seqlens, bos=True),
        token_ids=torch.from_numpy(np.concatenate(token_ids).astype(np.int64)),
        token_cu=_offsets(tokens_per_window + 1),
    )


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


class Batches:
    """An endless, resumable iterator over batches of a corpus's training documents.

    Every epoch visits each window once, in an order given by `seed` and the epoch. Windows are taken in that order
    for as long as they fit in `batch_bytes`; a batch never spans epochs, so an epoch's last one may be small. Of
    each `world_size` batches in a row, `rank` gets the one of its number: ranks share no window and lose none, all
    hold the same state, and it may be resumed with another number of ranks.

    Args:
        window: most bytes of a window, BOS and EOS included.
        batch_bytes: most bytes of a batch (T), at least `window`.
        eos: put EOS, a token of its own, after the last byte of each document.

    Raises:
        ValueError: sizes or ranks out of range.
        UserError: every document holds a token longer than a window.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        window: int,
        batch_bytes: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        eos: bool = True,
    ) -> None:
        _check_sizes(window, batch_bytes)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 … {world_size - 1} (world_size - 1), got {rank}")
        self.corpus, self.seed, self.rank, self.world_size, self.eos = corpus, seed, rank, world_size, eos
        self.window, self.batch_bytes = window, batch_bytes
        self.windows = cut_windows(corpus.train, window - 1 - eos)
        if not len(self.windows):
            raise UserError(f"every training document holds a token longer than a window of {window} bytes: widen it")
        self._sizes = _row_sizes(self.windows, eos)
        self.round_bytes = 0  # of the last batches of all ranks together
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self._epoch

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        round_of_batches = [self._next_windows() for _ in range(self.world_size)]
        self.round_bytes = sum(int(self._sizes[windows].sum()) for windows in round_of_batches)
        return _build_batch(self.corpus, self.corpus.train, self.windows, round_of_batches[self.rank], self.eos)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins; the same on every rank."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            ValueError: the state is of another corpus, window, seed or use of EOS.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(f"cannot resume batches with {name} = {value!r}: they were saved with {state[name]!r}")
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _identity(self) -> dict[str, Any]:
        return {"corpus": self.corpus.fingerprint, "window": self.window, "seed": self.seed, "eos": self.eos}

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = np.random.Generator(np.random.Philox([self.seed, epoch])).permutation(len(self.windows))
        self._ends = np.concatenate([[0], np.cumsum(self._sizes[self._order])])

    def _next_windows(self) -> np.ndarray:
        stop = _fill(self._ends, self._position, self.batch_bytes)
        chosen = self._order[self._position : stop]
        self._position = stop
        if stop == len(self._order):
            self._start_epoch(self._epoch + 1)
        return chosen


def held_out_batches(corpus: Corpus, *, window: int, batch_bytes: int, limit_bytes: int) -> list[Batch]:
    """Batches of about `limit_bytes` of held-out text, the same on every call and machine, without EOS.

    Windows are drawn without replacement from all held-out documents; a split smaller than `limit_bytes` is used
    whole.
    """
    _check_sizes(window, batch_bytes)
    split = corpus.held_out
    windows = cut_windows(split, window - 1)
    if not len(windows):
        raise UserError(f"every held-out document holds a token longer than a window of {window} bytes: widen it")
    order = np.random.Generator(np.random.Philox(0)).permutation(len(windows))
    order = order[: max(1, int(np.searchsorted(np.cumsum(windows.bytes[order]), limit_bytes, "right")))]
    ends = np.concatenate([[0], np.cumsum(_row_sizes(windows, eos=False)[order])])
    batches, position = [], 0
    while position < len(order):
        stop = _fill(ends, position, batch_bytes)
        batches.append(_build_batch(corpus, split, windows, order[position:stop], eos=False))
        position = stop
    return batches


def _row_sizes(windows: Windows, eos: bool) -> np.ndarray:
    """Bytes of each window in a batch, with BOS and EOS: int64 [W]."""
    return windows.bytes + 1 + (windows.last & eos)


def _fill(ends: np.ndarray, position: int, batch_bytes: int) -> int:
    """The first window after `position` that no longer fits; ends [W+1] is the running total of sizes."""
    return int(np.searchsorted(ends, ends[position] + batch_bytes, "right")) - 1


def _check_sizes(window: int, batch_bytes: int) -> None:
    if window < 3:
        raise ValueError(f"window must hold BOS, a byte and EOS: at least 3 bytes, got {window}")
    if batch_bytes < window:
        raise ValueError(f"batch_bytes {batch_bytes} is smaller than a window of {window} bytes: raise it")
