"""Where a run's text and teacher come from, and where they are kept between runs."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from training.alignment import TokenBytes
from training.checkpoint import read_summary, write_folder
from training.corpus import Corpus, limited, prepare, until
from training.data import Batches
from training.errors import UserError
from training.parallel import Ranks
from training.parts import HUB, FilePart, Part, find_parts, read_all, read_held_out
from training.recipe import Recipe
from training.stream import StreamBatches
from training.teacher import train_tokenizer
from training.text import Document, Skipped, python_docs, read_documents

TOKENIZER_BYTES = 2**28  # of a stream, for the tokenizer of a teacher that is made on the spot


def fingerprint(*values: Any) -> str:
    """A short hash of plain values and dataclasses, for names in the cache."""
    plain = [dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value for value in values]
    return hashlib.sha256(json.dumps(plain, default=str).encode()).hexdigest()[:12]


class Sources:
    """A run's text, cut by a tokenizer, and the tokenizer of a teacher that is made on the spot.

    What takes long is kept in a cache under a name that changes with whatever it depends on. Rank 0 makes, the others
    wait and load.

    Args:
        recipe: the run's numbers.
        cache: folder of the cache.
        ranks: this process among its peers.
    """

    def __init__(self, recipe: Recipe, cache: Path, ranks: Ranks) -> None:
        self.recipe, self.cache, self.ranks = recipe, cache, ranks
        self.skipped = Skipped()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the cache on rank 0, so that two runs never make the same thing at once."""
        if not self.ranks.is_main:
            yield
            return
        self.cache.mkdir(parents=True, exist_ok=True)
        with (self.cache / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another run that uses {self.cache}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                print(f"{self.cache} takes no locks ({error.strerror}): start one run at a time", flush=True)
            yield

    @cached_property
    def text(self) -> str:
        """A hash of which text is read: files with their sizes and times, datasets, or this Python's documentation."""
        files = [part.path for part in self.parts if isinstance(part, FilePart)]
        stamps: list[Any] = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        stamps += [part.identity for part in self.parts if not isinstance(part, FilePart)]
        return fingerprint(stamps, self.recipe.data.limit_bytes)

    @cached_property
    def parts(self) -> list[Part]:
        """The files and datasets that the recipe names.

        Raises:
            UserError: one of them is not there or not readable, or a stream has none.
        """
        data = self.recipe.data
        if data.stream and not data.paths:
            raise UserError("a stream needs text: give --data files or datasets, or set data.stream=false")
        return find_parts(data.paths, split=data.split, download=data.download)

    def documents(self) -> Iterable[Document]:
        data = self.recipe.data
        if not data.paths:
            return self._python_docs
        if data.stream:
            return limited(read_all(self.parts, self.skipped), TOKENIZER_BYTES)
        if any(path.startswith(HUB) for path in data.paths):
            return read_all(self.parts, self.skipped)
        return read_documents(data.paths, self.skipped)

    @cached_property
    def _python_docs(self) -> list[Document]:
        limit = self.recipe.data.limit_bytes
        return list(python_docs() if limit is None else python_docs(limit_bytes=limit))

    def own_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of a teacher that is made on the spot: byte-level BPE, trained on the run's text."""
        folder = self.cache / f"tokenizer-{fingerprint(self.text, self.recipe.teacher.vocab_size)}"
        if self.ranks.is_main and read_summary(folder) is None:
            print("training the teacher's tokenizer", flush=True)
            tokenizer = train_tokenizer(self.documents(), self.recipe.teacher.vocab_size)
            write_folder(folder, tokenizer.save_pretrained, {})
        self.ranks.barrier()
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def corpus(self, tokenizer: PreTrainedTokenizerFast) -> Corpus:
        """The text, aligned with the tokenizer's tokens; of a stream the held-out part alone, as much as is asked for.

        Raises:
            UserError: text that can't be read, or too little of it.
        """
        data = self.recipe.data
        needed = max(data.measure_bytes, data.score_bytes)
        form = ("held-out", needed) if data.stream else ()
        folder = self.cache / f"corpus-{fingerprint(self.text, tokenizer.backend_tokenizer.to_str(), *form)}"
        if self.ranks.is_main and read_summary(folder) is None:
            print(f"reading and aligning {'held-out' if data.stream else 'the'} text", flush=True)
            self.skipped = Skipped()

            def make(partial: Path) -> None:
                if data.stream:
                    documents = until(read_held_out(self.parts, self.skipped), needed)
                    only = {"held_out_only": True, "identity": self.text}
                    prepare(documents, tokenizer, partial, skipped=self.skipped, **only)
                else:
                    limit = data.limit_bytes
                    prepare(self.documents(), tokenizer, partial, limit_bytes=limit, skipped=self.skipped)

            write_folder(folder, make, self.skipped.as_dict())
            if self.skipped.counts:
                print(f"documents skipped: {self.skipped}", flush=True)
        self.ranks.barrier()
        return Corpus.open(folder)

    def batches(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        *,
        batch_bytes: int,
        seed: int,
        limit_bytes: int | None = None,
    ) -> Batches | StreamBatches:
        """This rank's training batches: of the corpus (``limit_bytes`` of it), or of the stream that it holds out from.

        Raises:
            UserError: streams that the ranks can't share, or windows that are too small.
        """
        data = self.recipe.data
        common = {
            "window": data.window,
            "batch_bytes": batch_bytes,
            "seed": seed,
            "rank": self.ranks.rank,
            "world_size": self.ranks.size,
        }
        if not data.stream:
            return Batches(corpus, **common, limit_bytes=limit_bytes)
        buffer = {"streams": data.streams, "shuffle_bytes": data.shuffle_bytes, "workers": data.workers}
        return StreamBatches(self.parts, TokenBytes(tokenizer), **common, **buffer)
