"""The next batches, built and sent to the device while the last one is trained on."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch

from bytekernels import AlignedBatch


class Source(Protocol):
    """Where batches come from: `training.data.Batches`."""

    def build_next(self, *, pin: bool, threads: int) -> AlignedBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prefetcher:
    """Batches of a source, on a device, up to ``depth`` of them built ahead by a thread.

    It stands in for its source: what it iterates over and `state_dict` are those of the batches that
    it has handed out, whatever has been built ahead. The source is its own until it is closed, and then stands
    somewhere ahead. The thread is started by the first `next`, and ends when the prefetcher is closed or forgotten.

    Args:
        batches: the source.
        device: where batches are handed out.
        depth: most batches ahead, the one under construction among them.

    Raises:
        ValueError: depth below 1.
    """

    def __init__(self, batches: Source, device: torch.device, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1 batch ahead, got {depth}")
        self._batches, self._depth = batches, depth
        self._path = _Upload(device) if device.type == "cuda" else _InPlace()
        self._state = batches.state_dict()
        self._thread: _Thread | None = None
        self._ended = ""  # why there is no next batch
        self._closed = False
        self._host_seconds = 0.0

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> AlignedBatch:
        """The next batch, which work on the device's current stream may read.

        Raises:
            RuntimeError: closed, or an error has ended it before.
            Exception: what building this batch raised in the thread.
        """
        if self._ended:
            raise RuntimeError(self._ended)
        if self._thread is None:
            self._thread = _Thread(self._batches, self._path, self._depth)
            self._stop = weakref.finalize(self, self._thread.stop)
        began = time.monotonic()
        ahead = self._thread.take()
        self._host_seconds += time.monotonic() - began
        if not isinstance(ahead, _Ahead):
            self._end(f"no batch after an error in building one ({ahead!r}): load_state_dict to start again")
            raise ahead
        self._state = ahead.state
        return self._path.receive(ahead.batch, ahead.sent)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch to be handed out begins."""
        return dict(self._state)

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state for `load_state_dict`, on any number of ranks, from the `state_dict` of every rank."""
        return self._batches.merge_states(states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a `state_dict` was taken; what was built ahead is dropped.

        Raises:
            RuntimeError: closed.
            ValueError: the source refuses the state; the prefetcher then goes on where it was.
        """
        if self._closed:
            raise RuntimeError(self._ended)
        self._end("")
        try:
            self._batches.load_state_dict(state)
        except BaseException:
            self._batches.load_state_dict(self._state)
            raise
        self._state = self._batches.state_dict()

    def waiting(self) -> float:
        """Seconds waited for data since the last call.

        They are the host's, blocked in `next`, and the device's, on batches not yet there. The device's are read when
        it has passed the wait, so they may be counted in a later call, and never cost a synchronisation. While the
        host waits the device may still be at work: on a GPU the sum is an upper bound of the time lost.
        """
        seconds, self._host_seconds = self._host_seconds + self._path.waited(), 0.0
        return seconds

    def close(self) -> None:
        """End the thread, and drop what was built ahead."""
        self._closed = True
        self._end("no batch from a closed Prefetcher: make another one")

    def _end(self, reason: str) -> None:
        self._ended = reason
        if self._thread is not None:
            self._stop()
            self._thread = None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Ahead(NamedTuple):
    """A batch, the mark of its upload, and the source's state after building it."""

    batch: AlignedBatch
    sent: Any
    state: dict[str, Any]


class _Thread:
    """Builds batches until it is stopped or building fails. It knows nothing of its Prefetcher, which may be collected.

    A permit is a batch that may be built; taking a batch gives one back. Both queues may be used by a finalizer in
    whichever thread the garbage collector runs, which locks of Python's own could not.
    """

    def __init__(self, batches: Source, path: "_InPlace | _Upload", depth: int) -> None:
        self.ready: SimpleQueue[_Ahead | BaseException] = SimpleQueue()
        self.permits: SimpleQueue[None] = SimpleQueue()
        self.stopped = False
        for _ in range(depth):
            self.permits.put(None)
        # A daemon, because the interpreter would wait for another kind before it runs the finalizer that stops it.
        self.thread = threading.Thread(target=self._run, args=(batches, path), name="prefetch", daemon=True)
        self.thread.start()

    def take(self) -> _Ahead | BaseException:
        ahead = self.ready.get()
        self.permits.put(None)
        return ahead

    def stop(self) -> None:
        self.stopped = True
        self.permits.put(None)
        if self.thread is not threading.current_thread():
            self.thread.join()

    def _run(self, batches: Source, path: "_InPlace | _Upload") -> None:
        try:
            with path.side():
                while True:
                    self.permits.get()
                    if self.stopped:
                        raise RuntimeError("the Prefetcher was closed while another thread waited for a batch")
                    # One thread: a second OpenMP team beside torch's would fight it for the cores.
                    batch, sent = path.send(batches.build_next(pin=path.pin, threads=1))
                    self.ready.put(_Ahead(batch, sent, batches.state_dict()))
        except BaseException as error:
            self.ready.put(error)


class _InPlace:
    """The way of batches that stay where they were built."""

    pin = False

    def side(self) -> AbstractContextManager:
        return nullcontext()

    def send(self, batch: AlignedBatch) -> tuple[AlignedBatch, Any]:
        return batch, None

    def receive(self, batch: AlignedBatch, sent: Any) -> AlignedBatch:
        return batch

    def waited(self) -> float:
        return 0.0


class _Upload:
    """The way of batches to a CUDA device: a copy from page-locked memory on a stream of its own.

    The building thread calls `send` inside `side`, the training thread the rest.
    """

    pin = True

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # those not yet read
        self.seconds = 0.0

    def side(self) -> AbstractContextManager:
        """Make the upload's stream, and its device, the calling thread's current ones."""
        return torch.cuda.stream(self.stream)

    def send(self, batch: AlignedBatch) -> tuple[AlignedBatch, Any]:
        there = batch.to(self.stream.device, non_blocking=True)
        sent = torch.cuda.Event()
        sent.record(self.stream)
        return there, sent

    def receive(self, batch: AlignedBatch, sent: Any) -> AlignedBatch:
        """Let the current stream wait for the copy, and the allocator for what that stream is to do with it."""
        current = torch.cuda.current_stream(self.stream.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(current)
        current.wait_event(sent)
        after.record(current)
        self.waits.append((before, after))
        for tensor in batch:
            if tensor is not None:
                tensor.record_stream(current)
        self._read()
        return batch

    def waited(self) -> float:
        """Seconds of the device's waits that have ended, since the last call."""
        self._read()
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _read(self) -> None:
        while self.waits and self.waits[0][1].query():
            before, after = self.waits.popleft()
            self.seconds += before.elapsed_time(after) / 1000
