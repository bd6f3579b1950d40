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

from training.checkpoint import read_summary, write_folder
from training.corpus import Corpus, prepare
from training.parallel import Ranks
from training.recipe import Recipe
from training.teacher import train_tokenizer
from training.text import Document, Skipped, python_docs, read_documents, resolve


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
            yield

    @cached_property
    def text(self) -> str:
        """A hash of which text is read: files with their sizes and times, or this Python's documentation."""
        files = [path for pattern in self.recipe.data.paths for path, _ in resolve(pattern)]
        stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return fingerprint(stamps, self.recipe.data.limit_bytes)

    def documents(self) -> Iterable[Document]:
        if self.recipe.data.paths:
            return read_documents(self.recipe.data.paths, self.skipped)
        return self._python_docs

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
        """The text, aligned with the tokenizer's tokens.

        Raises:
            UserError: text that can't be read, or too little of it.
        """
        key = fingerprint(self.text, tokenizer.backend_tokenizer.to_str())
        folder = self.cache / f"corpus-{key}"
        if self.ranks.is_main and read_summary(folder) is None:
            print("reading and aligning the text", flush=True)
            self.skipped = Skipped()
            limit = self.recipe.data.limit_bytes

            def make(partial: Path) -> None:
                prepare(self.documents(), tokenizer, partial, limit_bytes=limit, skipped=self.skipped)

            write_folder(folder, make, self.skipped.as_dict())
            if self.skipped.counts:
                print(f"documents skipped: {self.skipped}", flush=True)
        self.ranks.barrier()
        return Corpus.open(folder)
