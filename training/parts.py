"""The parts that text comes in: files, and shards or rows of Hugging Face datasets.

A part can be read from any of its records on, by any process.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from training.errors import UserError
from training.text import (
    TEXT_COLUMNS,
    Document,
    Skipped,
    UnreadableFile,
    encoded,
    first_line,
    is_held_out,
    records,
    resolve,
    text_of,
)

HUB = "hf:"
MAX_ROW_PARTS = 4096
ROWS_AT_ONCE = 256
SHARD_BYTES = 2**28  # of a shard whose dataset doesn't say
OPEN_PARTS = 16

Wanted = Callable[[int, str], bool]  # of a record's number and source


class Part(Protocol):
    """Records that are read one after another.

    Attributes:
        size: about how much there is to read, in bytes; at least 1.
    """

    @property
    def size(self) -> int: ...

    @property
    def identity(self) -> list[Any]:
        """What tells this part from others, the same on every machine: plain values."""
        ...

    def documents(self, skipped: Skipped, wanted: Wanted, start: int = 0) -> Iterator[tuple[int, Document]]:
        """(number from 1, document) of the records after number `start` that are wanted; others are left unread.

        Raises:
            UnreadableFile: the rest of the part is lost.
            UserError: the reader that it needs is not installed.
        """
        ...


@dataclass(frozen=True)
class FilePart:
    """A file, known by its name relative to the pattern that found it."""

    path: Path
    name: str
    size: int

    @property
    def identity(self) -> list[Any]:
        return [self.name, self.size]

    def documents(self, skipped: Skipped, wanted: Wanted, start: int = 0) -> Iterator[tuple[int, Document]]:
        def asked(number: int) -> bool:
            return wanted(number, f"{self.name}:{number}")

        for number, text in records(self.path, skipped, start=start, wanted=asked):
            yield number, Document(f"{self.name}:{number}", text)


@dataclass(frozen=True)
class Hub:
    """A split of a dataset, read through the `datasets` package.

    Attributes:
        name: on the Hugging Face Hub, or a folder: of data files, or written by `save_to_disk`.
        config: the dataset's configuration, None for its only or default one.
        split: such as ``train``, or ``train[:10%]`` of a dataset that is downloaded.
        download: fetch the whole split before it is read; else it is read as it comes over the network.
    """

    name: str
    config: str | None
    split: str
    download: bool

    @property
    def label(self) -> str:
        """Its name in documents' names: of a folder the last part alone, so that it may lie anywhere."""
        name = Path(self.name).resolve().name if Path(self.name).is_dir() else self.name
        return ":".join([name, *([self.config] if self.config else []), self.split])

    def parts(self) -> list[Part]:
        """Ranges of rows of a dataset that is on disk, else the dataset's own shards."""
        dataset = _load(self)
        if hasattr(dataset, "num_rows"):
            count = min(MAX_ROW_PARTS, dataset.num_rows)
            bounds = [dataset.num_rows * i // count for i in range(count + 1)] if count else [0]
            row = max(1, dataset.data.nbytes // max(1, dataset.num_rows))
            return [RowsPart(self, first, stop, (stop - first) * row) for first, stop in itertools.pairwise(bounds)]
        shards = dataset.num_shards
        size = (dataset.info.dataset_size or shards * SHARD_BYTES) // shards
        return [ShardPart(self, shard, shards, max(1, size)) for shard in range(shards)]


@dataclass(frozen=True)
class RowsPart:
    """The rows `first` … `stop` − 1 of a dataset on disk, reached directly."""

    hub: Hub
    first: int
    stop: int
    size: int

    @property
    def identity(self) -> list[Any]:
        return [self.hub.label, self.first, self.stop]

    def documents(self, skipped: Skipped, wanted: Wanted, start: int = 0) -> Iterator[tuple[int, Document]]:
        dataset, label = _load(self.hub), self.hub.label
        for begin in range(self.first + start, self.stop, ROWS_AT_ONCE):
            near = range(begin, min(begin + ROWS_AT_ONCE, self.stop))
            rows = [row for row in near if wanted(row - self.first + 1, f"{label}:{row + 1}")]
            try:
                values = dataset[rows][dataset.column_names[0]] if rows else []
            except Exception as error:  # whatever a reader of anybody's format raises
                raise UnreadableFile(f"cannot read {label} from row {begin + 1} on: {first_line(error)}") from error
            for row, value in zip(rows, values, strict=True):
                if (document := _document(value, skipped, f"{label}:{row + 1}")) is not None:
                    yield row - self.first + 1, document


@dataclass(frozen=True)
class ShardPart:
    """One of a streamed dataset's own shards, read from its beginning."""

    hub: Hub
    shard: int
    shards: int
    size: int

    @property
    def identity(self) -> list[Any]:
        return [self.hub.label, self.shard, self.shards]

    def documents(self, skipped: Skipped, wanted: Wanted, start: int = 0) -> Iterator[tuple[int, Document]]:
        label, number = f"{self.hub.label}:{self.shard}", start
        rows = _load(self.hub).shard(num_shards=self.shards, index=self.shard)
        try:
            for record in rows.skip(start) if start else rows:
                number += 1
                source = f"{label}:{number}"
                if wanted(number, source) and (document := _document(text_of(record), skipped, source)) is not None:
                    yield number, document
        except Exception as error:  # whatever a reader of anybody's format raises
            raise UnreadableFile(f"cannot read {label} after record {number}: {first_line(error)}") from error


def _document(value: object, skipped: Skipped, source: str) -> Document | None:
    text = encoded(value, skipped, source)
    if text is not None and not text.strip():
        skipped.add("no text", source)
        return None
    return None if text is None else Document(source, text)


@functools.cache
def _load(hub: Hub) -> Any:
    """The dataset, with its text column alone where its columns are known."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"reading {HUB}{hub.name} needs datasets: pip install datasets") from None
    datasets.disable_progress_bars()
    try:
        if (Path(hub.name) / "state.json").is_file() or (Path(hub.name) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(hub.name)
            dataset = found[hub.split] if isinstance(found, dict) else found
        else:
            dataset = datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=not hub.download)
    except Exception as error:  # whatever a builder raises
        raise UserError(f"cannot load {HUB}{hub.name}, split {hub.split}: {first_line(error)}") from error
    names = dataset.column_names
    if names is None:
        return dataset
    column = next((c for c in TEXT_COLUMNS if c in names), None)
    if column is None:
        raise UserError(f"{HUB}{hub.name} has no column 'text' or 'content', but {', '.join(names)}: rename one")
    return dataset.select_columns([column])


def find_parts(data: Sequence[str], *, split: str = "train", download: bool = False) -> list[Part]:
    """The parts of what `data` names: files, globs, and ``hf:NAME`` or ``hf:NAME:CONFIG``.

    Raises:
        UserError: a file or dataset that isn't there, an ending that is not known, a dataset without a text column,
            or no `datasets` package.
    """
    parts: list[Part] = []
    for name in data:
        if name.startswith(HUB):
            dataset, _, config = name.removeprefix(HUB).partition(":")
            parts += Hub(dataset, config or None, split, download).parts()
        else:
            parts += [FilePart(path, short, max(1, path.stat().st_size)) for path, short in resolve(name)]
    return parts


def identity_of(parts: Sequence[Part]) -> str:
    """A hash of which text this is, the same on every machine."""
    return hashlib.sha256(json.dumps([part.identity for part in parts]).encode()).hexdigest()[:16]


def read_part(part: Part, skipped: Skipped, wanted: Wanted, start: int = 0) -> Iterator[tuple[int, Document]]:
    """`Part.documents`, which ends where the rest of the part is lost, and that is counted."""
    try:
        yield from part.documents(skipped, wanted, start)
    except UnreadableFile as error:
        skipped.add("the rest of it is lost", str(error))


def read_all(parts: Sequence[Part], skipped: Skipped) -> Iterator[Document]:
    """All documents, part after part."""
    for part in parts:
        for _, document in read_part(part, skipped, lambda number, source: True):
            yield document


def read_held_out(parts: Sequence[Part], skipped: Skipped) -> Iterator[Document]:
    """The documents that are set aside for evaluation, in turn from a few parts of a shuffled order."""
    order = np.random.Generator(np.random.Philox(0)).permutation(len(parts))
    waiting = (read_part(parts[i], skipped, lambda number, source: is_held_out(source)) for i in order)
    running = list(itertools.islice(waiting, OPEN_PARTS))
    while running:
        for part in tuple(running):
            found = next(part, None)
            if found is not None:
                yield found[1]
            else:
                running.remove(part)
                running += itertools.islice(waiting, 1)
