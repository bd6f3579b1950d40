"""A stage's training state on disk, written beside the training by all ranks, whole or not there.

Tensors go through Distributed Checkpoint, so that a state saved by some number of ranks is loaded by any other. A
folder is called ``step-…`` when every rank has written, and only then; it keeps a hash of each of its files.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from training.checkpoint import COMPLETE, reason_of, sync
from training.errors import UserError
from training.parallel import Ranks

NAME = re.compile(r"step-(\d+)")
SUMS = ".sums"  # ending of a rank's list of hashes
BLOCK = 2**24


class Saved(NamedTuple):
    """What a snapshot says of one tensor."""

    size: torch.Size
    dtype: torch.dtype


class Snapshots:
    """The newest training states of a stage, in a folder that all ranks see.

    Args:
        folder: of this stage alone; made when it is needed.
        ranks: this process among its peers; all of them call :meth:`save` and :meth:`load` together.
        keep: how many are kept.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int = 2) -> None:
        self.folder, self.ranks, self.keep = folder, ranks, keep
        self._writing: Future | None = None
        # Said by Distributed Checkpoint wherever there is one process: there is nothing to be done about it.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

    def newest(self) -> Path | None:
        """The newest whole snapshot."""
        whole = _whole(self.folder)
        return whole[-1] if whole else None

    def about(self) -> dict[str, Any]:
        """What was said about the newest snapshot; nothing where there is none."""
        path = self.newest()
        return self._summary(path)["about"] if path else {}

    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Copy the tensors, and write them while training goes on; a write that is still under way is waited for.

        Args:
            step: optimizer steps done; names the snapshot.
            tensors: plain ones, the same on every rank, and DTensors, of which each rank writes its part.
            about: plain values that JSON takes; rank 0's are kept.

        Raises:
            UserError: this write could not begin, or the one before failed. Older snapshots are whole.
        """
        self.wait()
        partial = self.folder / f".step-{step:09d}.partial"
        writer = _Writer(partial, self.ranks.rank, self.folder / f"step-{step:09d}", about, self.keep)
        try:
            if self.ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.ranks.barrier()
            saving = dcp.async_save(
                dict(tensors),
                storage_writer=writer,
                process_group=self.ranks.saving,
                no_dist=self.ranks.size == 1,
            )
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._failure(error) from error
        assert isinstance(saving, Future)
        self._writing = saving

    def poll(self) -> None:
        """Find out, without waiting, whether the last write has failed.

        Raises:
            UserError: it has. Older snapshots are whole.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the last :meth:`save` is on disk.

        Raises:
            UserError: it failed. Older snapshots are whole.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._failure(error) from error

    def _failure(self, error: BaseException) -> UserError:
        if self.ranks.is_main:
            for partial in self.folder.glob(".step-*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
        newest = self.newest()
        intact = f"{newest} is whole, and --resume goes on from it" if newest else "there is no older one"
        return UserError(f"cannot write a checkpoint in {self.folder}: {_root_cause(error)} ({intact})")

    def load(self, blank: Callable[[Mapping[str, Saved]], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Any] | None:
        """The newest snapshot's tensors and what was said about it; None where there is none.

        Args:
            blank: makes, from what the snapshot holds, tensors to be filled: those of this rank's state.

        Raises:
            UserError: a file is missing or damaged, or a wanted tensor is not there or has another size.
        """
        path: Path | None = None
        if self.ranks.is_main:  # others may not see yet what is there
            for partial in self.folder.glob(".step-*.partial"):  # of a run that was killed
                shutil.rmtree(partial, ignore_errors=True)
            path = self.newest()
        path = self.ranks.gather(path)[0]
        if path is None:
            return None
        summary = self._summary(path)
        self._check(path, summary["files"])
        reader = FileSystemReader(path)
        tensors = blank(_contents(reader.read_metadata()))
        try:
            dcp.load(tensors, storage_reader=reader, process_group=self.ranks.saving, no_dist=self.ranks.size == 1)
        except (RuntimeError, ValueError, CheckpointException) as error:
            raise UserError(f"checkpoint {path} does not fit this run: {_root_cause(error)}") from None
        return tensors, summary["about"]

    def _summary(self, path: Path) -> dict[str, Any]:
        try:
            digest, content = (path / COMPLETE).read_text().split("\n", 1)
        except (OSError, ValueError):
            digest, content = "", ""
        if digest != _digest(content):
            raise self._damaged(path, COMPLETE)
        return json.loads(content)

    def _check(self, path: Path, files: Mapping[str, str]) -> None:
        """Hold every file to its hash; the ranks share them out."""
        mine = sorted(files)[self.ranks.rank :: self.ranks.size]
        found = [name for name in mine if not (path / name).is_file() or _hash(path / name) != files[name]]
        damaged = [name for names in self.ranks.gather(found) for name in names]
        if damaged:
            raise self._damaged(path, damaged[0])

    def _damaged(self, path: Path, name: str) -> UserError:
        older = [step for step in _whole(self.folder) if step != path]
        then = f"from {older[-1].name}, which is older" if older else "from the stage's beginning"
        return UserError(
            f"checkpoint {path} is damaged: {name} is missing or not what was written; "
            f"remove that folder to go on {then}"
        )


def _whole(folder: Path) -> list[Path]:
    """Snapshots that have their mark, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    steps = [path for path in found if NAME.fullmatch(path.name) and (path / COMPLETE).is_file()]
    return sorted(steps, key=lambda path: int(path.name[5:]))


def _digest(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _contents(metadata: Metadata) -> dict[str, Saved]:
    return {
        name: Saved(entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _root_cause(error: BaseException) -> str:
    """The first reason on any rank, in a line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return reason_of(error)


class _Writer(FileSystemWriter):
    """Writes files with their hashes; when all ranks have, the coordinator makes the folder whole."""

    def __init__(self, partial: Path, rank: int, target: Path, about: Mapping[str, Any], keep: int) -> None:
        super().__init__(partial, sync_files=True)
        self._partial, self._rank, self._target, self._about, self._keep = partial, rank, target, about, keep

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        names = {result.storage_data.relative_path for result in written.wait()}
        sums = self._partial / f"rank-{self._rank}{SUMS}"
        sums.write_text(json.dumps({name: _hash(self._partial / name) for name in sorted(names)}))
        sync(sums)
        return written

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        files = {".metadata": _hash(self._partial / ".metadata")}
        for sums in self._partial.glob(f"*{SUMS}"):
            files |= json.loads(sums.read_text())
            sums.unlink()
        written = {result.storage_data.relative_path for of_rank in results for result in of_rank}
        if unseen := written - files.keys():
            raise OSError(
                f"the first process does not see {min(unseen)}: all processes must share {self._target.parent}"
            )
        mark = self._partial / COMPLETE
        content = json.dumps({"files": files, "about": self._about})
        mark.write_text(f"{_digest(content)}\n{content}")
        sync(mark)
        sync(self._partial)
        shutil.rmtree(self._target, ignore_errors=True)
        self._partial.rename(self._target)
        sync(self._target.parent)
        for old in _whole(self._target.parent)[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
