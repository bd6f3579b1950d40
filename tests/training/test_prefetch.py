"""Prefetched batches are the source's own, whatever is in flight; the thread ends, and tells what went wrong."""

import gc
import json
import subprocess
import sys
import threading
import traceback
import weakref
from pathlib import Path

import pytest
import torch

from bytekernels import AlignedBatch
from tests.training.conftest import assert_same_batch
from training import prefetch
from training.data import Batches
from training.prefetch import Prefetcher

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PATIENCE = 20  # seconds for what takes milliseconds


def batches_of(corpus, seed=3):
    return Batches(corpus, window=64, batch_bytes=256, seed=seed)


class Numbers:
    """A source whose n-th batch is n, which fails at ``fails``, and can be held back."""

    def __init__(self, fails: int = -1) -> None:
        self.at, self.fails, self.options = 0, fails, []
        self.built = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def build_next(self, **options) -> AlignedBatch:
        assert self.gate.wait(PATIENCE)
        if self.at == self.fails:
            raise ZeroDivisionError(f"batch {self.at}")
        self.at += 1
        self.options.append(options)
        self.built.release()
        return AlignedBatch(*[torch.tensor([self.at - 1])] * 5, None)

    def state_dict(self):
        return {"at": self.at}

    def merge_states(self, states):
        return {"at": max(state["at"] for state in states)}

    def load_state_dict(self, state):
        if state["at"] < 0:
            raise ValueError("at is negative")
        self.at = state["at"]


def number(batch: AlignedBatch) -> int:
    return int(batch.ids)


def wait_until_full(source: Numbers, count: int) -> None:
    for _ in range(count):
        assert source.built.acquire(timeout=PATIENCE)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_batches_and_states_are_the_sources(corpus, depth):
    plain = batches_of(corpus)
    with Prefetcher(batches_of(corpus), CPU, depth) as ahead:
        assert ahead.state_dict() == plain.state_dict()
        for _ in range(110):  # past two epochs
            assert_same_batch(next(ahead), next(plain))
            assert ahead.state_dict() == plain.state_dict()
    assert plain.epoch >= 2


def test_a_state_is_of_what_was_taken_and_can_be_loaded(corpus):
    plain = batches_of(corpus)
    expected = [next(plain) for _ in range(12)]
    with Prefetcher(batches_of(corpus), CPU, 3) as ahead:
        for _ in range(4):
            next(ahead)
        state = json.loads(json.dumps(ahead.state_dict()))
        for batch in expected[4:8]:
            assert_same_batch(next(ahead), batch)
        ahead.load_state_dict(state)  # while others are in flight
        assert ahead.state_dict() == state
        for batch in expected[4:]:
            assert_same_batch(next(ahead), batch)
    with Prefetcher(batches_of(corpus), CPU, 3) as other:
        other.load_state_dict(state)
        assert_same_batch(next(other), expected[4])


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_are_ahead_and_one_thread_builds(depth):
    source = Numbers()
    with Prefetcher(source, CPU, depth) as ahead:
        assert source.at == 0  # nothing before the first is asked for
        for n in range(4):
            assert number(next(ahead)) == n
            wait_until_full(source, depth + 1 if n == 0 else 1)
            assert source.at == n + 1 + depth
            assert not source.built.acquire(timeout=0.01)
    assert source.options == [{"pin": False, "threads": 1}] * source.at


def test_an_error_comes_with_its_batch_and_its_place():
    source = Numbers(fails=2)
    with Prefetcher(source, CPU, 3) as ahead:
        assert [number(next(ahead)) for _ in range(2)] == [0, 1]
        with pytest.raises(ZeroDivisionError, match="batch 2") as caught:
            next(ahead)
        assert "build_next" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert ahead.state_dict() == {"at": 2}
        with pytest.raises(RuntimeError, match=r"after an error .*ZeroDivisionError.* load_state_dict to start again"):
            next(ahead)
        source.fails = -1
        ahead.load_state_dict(ahead.state_dict())
        assert [number(next(ahead)) for _ in range(3)] == [2, 3, 4]


def test_a_refused_state_changes_nothing():
    with Prefetcher(Numbers(), CPU, 2) as ahead:
        assert number(next(ahead)) == 0
        with pytest.raises(ValueError, match="at is negative"):
            ahead.load_state_dict({"at": -1})
        assert number(next(ahead)) == 1


def test_after_closing_there_is_no_thread_and_no_batch():
    source = Numbers()
    ahead = Prefetcher(source, CPU, 2)
    next(ahead)
    thread = ahead._thread.thread
    wait_until_full(source, 3)
    ahead.close()
    ahead.close()
    assert not thread.is_alive()
    for use in (lambda: next(ahead), lambda: ahead.load_state_dict({"at": 0})):
        with pytest.raises(RuntimeError, match="closed Prefetcher: make another"):
            use()


def test_closing_wakes_whoever_waits_for_a_batch():
    source, found = Numbers(), []
    waiter = prefetch._Thread(source, prefetch._InPlace(), 0)  # no permit: nothing will ever be built
    taker = threading.Thread(target=lambda: found.append(waiter.take()))
    taker.start()
    waiter.stop()
    taker.join(PATIENCE)
    assert "closed while another thread waited" in str(found[0])


@pytest.mark.parametrize("cycle", [False, True])
def test_a_forgotten_prefetcher_ends_its_thread(cycle):
    source = Numbers()
    ahead = Prefetcher(source, CPU, 2)
    next(ahead)
    wait_until_full(source, 3)
    thread, gone = ahead._thread.thread, weakref.ref(ahead)
    if cycle:
        ahead.itself = ahead
    del ahead
    gc.collect()
    assert gone() is None
    assert not thread.is_alive()


def test_the_collector_may_run_in_the_thread_itself(monkeypatch):
    """A cycle that holds the last reference is collected wherever Python allocates, in the building thread too."""
    source = Numbers()
    ahead = Prefetcher(source, CPU, 1)
    ahead.itself = ahead
    next(ahead)
    wait_until_full(source, 2)
    thread = ahead._thread.thread
    build, gone, lost = source.build_next, weakref.ref(ahead), []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: lost.append(error.exc_value))

    def collect(**options):
        gc.collect()
        return build(**options)

    gc.disable()
    try:
        source.build_next = collect
        ahead._thread.permits.put(None)
        del ahead
        thread.join(PATIENCE)
    finally:
        gc.enable()
    assert gone() is None
    assert not thread.is_alive()
    assert lost == []


def test_an_interpreter_with_batches_in_flight_exits():
    program = """
import torch
from tests.training.test_prefetch import CPU, Numbers, Prefetcher, wait_until_full
source = Numbers()
full, building = Prefetcher(source, CPU, 2), Prefetcher(Numbers(), CPU, 10**6)
next(full), next(building)
wait_until_full(source, 3)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_waiting_is_the_time_in_next(monkeypatch):
    clock = iter([10.0, 10.5, 20.0, 22.0, 30.0, 30.0])
    monkeypatch.setattr(prefetch.time, "monotonic", lambda: next(clock))
    with Prefetcher(Numbers(), CPU) as ahead:
        next(ahead)
        next(ahead)
        assert ahead.waiting() == 2.5
        assert ahead.waiting() == 0
        next(ahead)
        assert ahead.waiting() == 0


def test_a_depth_of_none_is_refused():
    with pytest.raises(ValueError, match="depth must be at least 1 batch ahead, got 0"):
        Prefetcher(Numbers(), CPU, 0)


# ------------------------------------------------------------------------------------------------------ on a device


class FakeCuda:
    """torch.cuda as a list of what was done, in order, and on which stream."""

    def __init__(self) -> None:
        self.done: list[tuple] = []
        self.local = threading.local()

    def Stream(self, device):
        return self.make(name="side", device=device)

    def make(self, **values):
        stream = type("FakeStream", (), values)()
        stream.wait_event = lambda event: self.done.append((stream.name, "wait", event))
        return stream

    def stream(self, stream):
        cuda = self

        class Current:
            def __enter__(self):
                cuda.local.name = stream.name

            def __exit__(self, *error):
                cuda.local.name = "none"

        return Current()

    def current_stream(self, device):
        return self.make(name="training", device=device)

    def Event(self, enable_timing=False):
        event = type("FakeEvent", (), {"passed": False})()
        event.record = lambda stream: self.done.append((stream.name, "record", event))
        event.query = lambda: event.passed
        event.elapsed_time = lambda other: 250.0
        return event


class FakeBatch(tuple):
    """One tensor that knows who uses it."""

    def __new__(cls, cuda: FakeCuda) -> "FakeBatch":
        tensor = type("FakeTensor", (), {})()
        tensor.record_stream = lambda stream: cuda.done.append((stream.name, "use", tensor))
        batch = super().__new__(cls, (tensor, None))
        batch.to = lambda device, non_blocking: cuda.done.append((cuda.local.name, "copy", non_blocking)) or batch
        return batch


def test_an_upload_is_waited_for_on_the_device_only(monkeypatch):
    cuda, source = FakeCuda(), Numbers()
    monkeypatch.setattr(prefetch.torch, "cuda", cuda)
    source.build_next = lambda **options: source.options.append(options) or FakeBatch(cuda)
    with Prefetcher(source, torch.device("cuda", 1), 1) as ahead:
        (tensor, _) = next(ahead)
        path = ahead._path
        assert path.stream.device == torch.device("cuda", 1)
        ahead._thread.stop()  # so that the list stands still
        mine = [entry for entry in cuda.done if entry[0] == "training"]
        (before, after), (copied, copy_event) = path.waits[0], (cuda.done[0], cuda.done[1])
        assert copied == ("side", "copy", True)
        assert copy_event[:2] == ("side", "record")
        assert mine == [
            ("training", "record", before),
            ("training", "wait", copy_event[2]),
            ("training", "record", after),
            ("training", "use", tensor),
        ]
        assert source.options[0] == {"pin": True, "threads": 1}
        ahead._host_seconds = 0.0
        assert ahead.waiting() == 0  # the device has not come there
        after.passed = True
        assert ahead.waiting() == 0.25
        assert ahead.waiting() == 0


@pytest.fixture
def no_syncs():
    """A function after which whatever waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_batches_arrive_on_a_gpu(corpus, no_syncs):
    device = torch.device("cuda")
    plain = batches_of(corpus)
    weight = torch.randn(2048, 2048, device=device)
    work, kept = torch.cuda.Stream(), []
    work.wait_stream(torch.cuda.current_stream())
    with Prefetcher(batches_of(corpus), device, 2) as ahead, torch.cuda.stream(work):
        for step in range(60):
            batch = next(ahead)
            assert batch.ids.is_cuda
            weight = torch.nn.functional.normalize(weight @ weight)  # the stream falls behind: it reads the batch late
            kept.append([tensor if tensor is None else tensor.clone() for tensor in batch])
            del batch  # now its memory may be handed out again, once the stream has read it
            if step == 10:
                no_syncs()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for tensors in kept:
        assert_same_batch(AlignedBatch(*tensors), next(plain))


@pytest.mark.gpu
def test_little_is_waited_for_on_a_gpu(corpus):
    device = torch.device("cuda")
    weight = torch.randn(4096, 4096, device=device)
    with Prefetcher(batches_of(corpus), device, 2) as ahead:
        for step in range(60):
            if step == 10:
                torch.cuda.synchronize()
                ahead.waiting()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
            batch = next(ahead)
            for _ in range(4):
                weight = torch.nn.functional.normalize(weight @ weight) + batch.ids[0]
        end.record()
        torch.cuda.synchronize()
        assert ahead.waiting() < 0.2 * begin.elapsed_time(end) / 1000
