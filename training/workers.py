"""Worker processes that make blocks, started as plain commands: they import neither torch nor the parent's main module.

Run by the parent alone: ``python -m training.workers FILE_DESCRIPTOR PARENT``.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from training.blocks import Block, BlockMaker, Position
from training.corpus import SPLIT_DTYPES, Split
from training.errors import UserError

ORPHAN_SECONDS = 1.0  # between two looks at whether the parent is still there

Request = tuple[int, Position, int]  # a block's stream, position and size
Requests = SimpleQueue[tuple[Request, "Future[Block]"] | None]


class Maker(Protocol):
    """Where blocks are asked for."""

    def submit(self, stream: int, position: Position, size: int) -> "Future[Block]": ...

    def close(self) -> None: ...


def start(maker: BlockMaker, workers: int) -> list[Maker]:
    """As many worker processes, or the calling thread for none of them."""
    return [Process(maker) for _ in range(workers)] if workers else [InPlace(maker)]


class InPlace:
    """Blocks made by whoever asks for them."""

    def __init__(self, maker: BlockMaker) -> None:
        self._maker = maker

    def submit(self, stream: int, position: Position, size: int) -> "Future[Block]":
        made: Future[Block] = Future()
        made.set_result(self._maker.make(stream, position, size))
        return made

    def close(self) -> None:
        pass


class Process:
    """A worker process and the thread that talks with it. Blocks are made in the order in which they were asked for.

    It is killed when this object is closed or forgotten, and ends by itself soon after its parent has.
    """

    def __init__(self, maker: BlockMaker) -> None:
        ours, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        # A worker is one core's work.
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "training.workers", str(theirs.fileno()), str(os.getpid())]
        # A job's signals go to all its processes. The parent decides: it may still want to write a checkpoint. A worker
        # has them blocked from its first moment on, because it inherits the mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self._requests: Requests = SimpleQueue()
        arguments = (ours, self.process, maker, self._requests)
        threading.Thread(target=_talk, args=arguments, name="data-worker", daemon=True).start()
        self._stop = weakref.finalize(self, _end, self.process, self._requests)

    def submit(self, stream: int, position: Position, size: int) -> "Future[Block]":
        made: Future[Block] = Future()
        self._requests.put(((stream, position, size), made))
        return made

    def close(self) -> None:
        self._stop()


def _end(process: subprocess.Popen, requests: Requests) -> None:
    process.kill()
    process.wait()
    requests.put(None)


def _talk(connection: Connection, process: subprocess.Popen, maker: BlockMaker, requests: Requests) -> None:
    """Passes requests on and blocks back. Once the worker has died every request is answered with that."""
    ended: Exception | None = None
    first = True
    while (asked := requests.get()) is not None:
        request, made = asked
        try:
            if ended is not None:
                raise ended
            if first:
                connection.send(maker)
                first = False
            connection.send(request)
            made.set_result(_receive(connection))
        except (EOFError, OSError):
            ended = _death(process)
            made.set_exception(ended)
        except Exception as error:
            made.set_exception(error)
    connection.close()


def _death(process: subprocess.Popen) -> UserError:
    status = process.wait()
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return UserError(
        f"a data worker {how}: look for its last words above; if memory ran out, lower data.workers or "
        "data.shuffle_bytes"
    )


# ---------------------------------------------------------------------------------------- both ends of the connection


def _send(connection: Connection, block: Block) -> None:
    arrays = [getattr(block.split, name) for name in SPLIT_DTYPES]
    connection.send(([len(array) for array in arrays], block.after, block.skipped))
    for array in arrays:
        connection.send_bytes(array)


def _receive(connection: Connection) -> Block:
    message = connection.recv()
    if isinstance(message, Exception):
        raise message
    lengths, after, skipped = message
    arrays = {}
    for (name, dtype), length in zip(SPLIT_DTYPES.items(), lengths, strict=True):
        arrays[name] = np.empty(length, dtype)
        connection.recv_bytes_into(arrays[name])
    return Block(Split(**arrays), after, skipped)


def serve(connection: Connection) -> None:
    """Makes blocks until the other end is closed."""
    maker: BlockMaker = connection.recv()
    while True:
        request: Request = connection.recv()
        try:
            block = maker.make(*request)
        except UserError as error:
            connection.send(error)
        except Exception:
            connection.send(RuntimeError(f"a data worker failed:\n{traceback.format_exc()}"))
        else:
            _send(connection, block)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def main(arguments: Sequence[str]) -> None:
    descriptor, parent = map(int, arguments)
    # Besides the end of the connection, which a process forked by the parent would hold open.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone, or wants no more
        serve(Connection(descriptor))


if __name__ == "__main__":
    main(sys.argv[1:])
