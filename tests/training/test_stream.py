"""A stream's batches: the same text in the same order on any number of ranks and workers, resumed bit by bit."""

import collections
import gzip
import itertools
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytekernels import EOS
from tests.training.conftest import assert_same_batch, documents
from training import blocks, workers
from training.alignment import TokenBytes
from training.blocks import WHOLE, BlockMaker, Position, share_out
from training.corpus import prepare
from training.errors import UserError
from training.parts import find_parts, read_held_out
from training.stream import StreamBatches
from training.text import Skipped, is_held_out

WINDOW = 48
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return TokenBytes(tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Seven files of several kinds and very different sizes, 600 documents in all."""
    folder = tmp_path_factory.mktemp("text")
    texts = [f"{i}: {document.text.decode()}" for i, document in enumerate(documents(600, seed=1))]
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    zstandard = pytest.importorskip("zstandard")
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in texts[a:b]) for a, b in ((0, 200), (200, 250))]
    (folder / "a.jsonl").write_text(lines[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1].encode()))
    (folder / "c.jsonl.zst").write_bytes(
        zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in texts[250:400]).encode())
    )
    parquet.write_table(pyarrow.table({"text": texts[400:597]}), folder / "d.parquet", row_group_size=50)
    for i in range(597, 600):
        (folder / f"e{i}.txt").write_text(texts[i])
    return folder


@pytest.fixture(scope="module")
def parts(folder):
    return find_parts([str(folder / "*")])


def stream(parts, tokens, **changes) -> StreamBatches:
    numbers = dict(window=WINDOW, batch_bytes=200, seed=0, streams=4, shuffle_bytes=4 * 2000, workers=0)
    return StreamBatches(parts, tokens, **(numbers | changes))


def texts_by_stream(batches, streams: int) -> list[list[bytes]]:
    rows: list[list[bytes]] = [[] for _ in range(streams)]
    for number, batch in enumerate(batches):
        rows[number % streams] += [bytes(batch.ids[a + 1 : b].tolist()) for a, b in pairwise(batch.cu_seqlens.tolist())]
    return rows


def training_texts(parts) -> dict[str, bytes]:
    return {
        document.source: document.text
        for part in parts
        for _, document in part.documents(Skipped(), lambda number, source: not is_held_out(source))
    }


def first_epoch(batches: StreamBatches) -> list[list[bytes]]:
    """Windows of each stream's first epoch."""
    found: list[list[bytes]] = [[] for _ in range(batches.streams)]
    while batches.epoch == 0:
        number = batches.state_dict()["batches"]
        stream = str(number % batches.streams)
        ongoing = batches.state_dict()["streams"][stream]["position"][0] == 0
        batch = next(batches)
        if ongoing:
            for a, b in pairwise(batch.cu_seqlens.tolist()):
                found[int(stream)].append(bytes(batch.ids[a + 1 : b].tolist()))
    return found


# ------------------------------------------------------------------------------------------------------- shares


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=12), st.integers(1, 20))
def test_shares_are_equal_and_cover_each_part_once(sizes, streams):
    shares = share_out(sizes, streams)
    by_part = {part: [] for part in range(len(sizes))}
    for stream_shares in shares:
        portions = sum(sizes[part] * (high - low) / WHOLE for part, low, high in stream_shares)
        assert portions == pytest.approx(sum(sizes) / streams, rel=1e-6, abs=2 * len(sizes))
        for part, low, high in stream_shares:
            by_part[part].append((low, high))
    for intervals in by_part.values():
        assert intervals[0][0] == 0
        assert intervals[-1][1] == WHOLE
        assert all(one[1] == other[0] for one, other in pairwise(intervals))


def test_a_part_that_is_shared_gives_each_stream_as_many_records():
    shares = [stream_shares[0] for stream_shares in share_out([10**6], 64)]
    counts = [sum(share.holds(number) for number in range(1, 6401)) for share in shares]
    assert sum(counts) == 6400
    assert 95 <= min(counts) <= max(counts) <= 105


# -------------------------------------------------------------------------------------------------------- order


def test_an_epoch_is_the_training_documents(parts, tokens):
    rows = [row for rows in first_epoch(stream(parts, tokens)) for row in rows]
    expected = training_texts(parts)
    assert 500 < len(expected) < 600
    assert Counter(b"".join(rows)) == Counter(b"".join(text + bytes([EOS]) for text in expected.values()))
    assert sum(row.endswith(bytes([EOS])) for row in rows) == len(expected)
    # The last window of each document, with its end, stands in one document, and once.
    ends = Counter(row for row in rows if row.endswith(bytes([EOS])))
    assert all(any((text + bytes([EOS])).endswith(row) for text in expected.values()) for row in ends)
    starts = Counter(row.partition(b":")[0] for row in rows if row.partition(b":")[0].isdigit())
    assert starts == Counter(text.partition(b":")[0] for text in expected.values())


def test_held_out_documents_never_come_up(parts, tokens):
    held_out = {document.text.partition(b":")[0] for document in read_held_out(parts, Skipped())}
    assert 5 < len(held_out) < 40
    rows = [row for rows in first_epoch(stream(parts, tokens)) for row in rows]
    assert not held_out & {row.partition(b":")[0] for row in rows}


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_order_does_not_depend_on_the_number_of_ranks(parts, tokens, world_size):
    alone = stream(parts, tokens)
    ranks = [stream(parts, tokens, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(200):  # past the end of some stream's epoch
        for rank in ranks:
            assert_same_batch(next(rank), next(alone))
    state = alone.state_dict()
    assert StreamBatches.merge_states([rank.state_dict() for rank in ranks]) == state
    assert any(place["position"][0] for place in state["streams"].values())


def test_epochs_and_seeds_differ(parts, tokens):
    batches = stream(parts, tokens)
    first = first_epoch(batches)[0]
    state = batches.state_dict()
    assert state["streams"]["0"]["position"][0] >= 1
    other = first_epoch(stream(parts, tokens, seed=1))[0]
    assert first != other
    assert sorted(first) == sorted(other)


def test_batches_are_full_and_blocks_mix_documents(parts, tokens):
    sizes = [len(next(batches).ids) for batches in [stream(parts, tokens, shuffle_bytes=4 * 20_000)] for _ in range(60)]
    assert max(sizes) <= 200
    assert np.mean(sizes) > 160
    order = [int(row.partition(b":")[0]) for row in first_epoch(stream(parts, tokens))[0] if row[:1].isdigit()]
    assert order != sorted(order)


# ------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("after", [1, 37, 150])
def test_resuming_continues_exactly(parts, tokens, after):
    batches = stream(parts, tokens)
    for _ in range(after):
        next(batches)
    state = json.loads(json.dumps(batches.state_dict()))
    expected = [next(batches) for _ in range(60)]
    resumed = stream(parts, tokens)
    next(resumed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for batch in expected:
        assert_same_batch(next(resumed), batch)
    assert resumed.skipped == batches.skipped


def test_resuming_on_other_numbers_of_ranks(parts, tokens):
    alone = stream(parts, tokens)
    expected = [next(alone) for _ in range(21 + 2 * 20 + 4 * 20 + 20)]
    at, state = 0, None
    for world_size, rounds in ((1, 21), (2, 20), (4, 20), (1, 20)):
        ranks = [stream(parts, tokens, rank=rank, world_size=world_size) for rank in range(world_size)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        for _ in range(rounds):
            # Ranks take batches by number; a round that begins at an odd one begins with another rank.
            for turn in range(world_size):
                assert_same_batch(next(ranks[(at + turn) % world_size]), expected[at + turn])
            at += world_size
        state = json.loads(json.dumps(StreamBatches.merge_states([rank.state_dict() for rank in ranks])))


def test_resuming_something_else_is_refused(parts, tokens, mixed_tokenizer):
    state = stream(parts, tokens).state_dict()
    for change, message in [
        ({"window": 64}, "window = 64: they were saved with 48"),
        ({"seed": 1}, "seed = 1: they were saved with 0"),
        ({"streams": 8}, "num_streams = 8: they were saved with 4"),
        ({"eos": False}, "eos = False: they were saved with True"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream(parts, tokens, **change).load_state_dict(state)
    with pytest.raises(ValueError, match="with text = "):
        stream(parts[:-1], tokens).load_state_dict(state)
    with pytest.raises(ValueError, match="with tokenizer = "):
        stream(parts, TokenBytes(mixed_tokenizer)).load_state_dict(state)
    half = stream(parts, tokens, rank=0, world_size=2).state_dict()
    with pytest.raises(ValueError, match="the state has no stream 1, which rank 0 reads: merge_states first"):
        stream(parts, tokens).load_state_dict(half)
    with pytest.raises(ValueError, match="1 states hold 2 of 4 streams"):
        StreamBatches.merge_states([half])
    later = stream(parts, tokens, rank=1, world_size=2)
    next(later)
    with pytest.raises(ValueError, match="batches is 0 and 2"):
        StreamBatches.merge_states([half, later.state_dict()])


# ------------------------------------------------------------------------------------------------------ workers


def test_workers_change_nothing(parts, tokens):
    alone, shared = stream(parts, tokens), stream(parts, tokens, workers=2)
    for _ in range(150):
        assert_same_batch(next(shared), next(alone))
    state = shared.state_dict()
    assert state == alone.state_dict()
    following = next(shared)
    shared.load_state_dict(state)
    assert_same_batch(next(shared), following)
    shared.close()
    assert_same_batch(next(shared), [next(alone), next(alone)][1])


def test_a_worker_that_dies_is_an_error_and_no_hang(parts, tokens):
    batches = stream(parts, tokens, workers=1)
    next(batches)
    process = batches._makers[0].process
    process.kill()
    with pytest.raises(UserError, match=r"a data worker was killed by signal 9: .* lower data\.workers"):
        collections.deque(itertools.islice(batches, 500), maxlen=0)
    with pytest.raises(UserError, match="killed by signal 9"):
        next(batches)


def test_workers_end_with_their_owner(parts, tokens):
    batches = stream(parts, tokens, workers=2)
    next(batches)
    processes = [maker.process for maker in batches._makers]
    assert all(process.poll() is None for process in processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)  # a job's signal is the parent's to answer
    next(batches)
    del batches
    assert all(process.poll() is not None for process in processes)


def test_workers_end_with_a_killed_parent(tmp_path, folder, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    script = f"""
import time
from transformers import PreTrainedTokenizerFast
from training.alignment import TokenBytes
from training.parts import find_parts
from training.stream import StreamBatches
tokens = TokenBytes(PreTrainedTokenizerFast.from_pretrained({str(tmp_path)!r}))
parts = find_parts([{str(folder / "*")!r}])
batches = StreamBatches(
    parts, tokens, window=48, batch_bytes=200, seed=0, streams=4, shuffle_bytes=8000, workers=2
)
next(batches)
print(*(maker.process.pid for maker in batches._makers), flush=True)
time.sleep(100)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(runs(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_failure_in_a_worker_is_told(parts, tokens):
    maker = BlockMaker(parts, tokens, seed=0, streams=1, longest=46)
    maker.shares = []
    process = workers.Process(maker)
    with pytest.raises(RuntimeError, match=r"(?s)a data worker failed:.*IndexError"):
        process.submit(0, Position(), 100).result()
    process.close()


def test_a_worker_imports_no_torch():
    command = (
        "import sys, training.workers; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0


def test_tokens_can_be_sent_to_another_process(tokens):
    again = pickle.loads(pickle.dumps(tokens))
    text = "the function returns <|endoftext|> a value"
    assert again.fingerprint == tokens.fingerprint
    assert np.array_equal(again.encode([text])[0].ids, tokens.encode([text])[0].ids)


# --------------------------------------------------------------------------------------------------- unreadable


@pytest.fixture
def damaged(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good = [json.dumps({"text": f"the function returns {i}"}) for i in range(300)]
    bad = [b"{not json", b'{"text": "\xff\xfe"}', b'{"text": 7}', b'{"text": "  "}', b'{"text": ' + b"9" * 5000 + b"}"]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join([*bad, *(line.encode() for line in good)]))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress("\n".join(good).encode())[:-400])
    (tmp_path / "bytes.txt").write_bytes(b"bad \xff")
    (tmp_path / "untitled.parquet").touch()
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "untitled.parquet")
    table = pyarrow.table({"text": [f"a value is given {i} {i * i}" for i in range(400)]})
    parquet.write_table(
        table, tmp_path / "damaged.parquet", row_group_size=100, compression="none", use_dictionary=False
    )
    content = bytearray((tmp_path / "damaged.parquet").read_bytes())
    third = parquet.read_metadata(tmp_path / "damaged.parquet").row_group(2).column(0).data_page_offset
    content[third : third + 40] = b"\xff" * 40
    (tmp_path / "damaged.parquet").write_bytes(content)
    (tmp_path / "gone.txt").write_text("an error")
    parts = find_parts([str(tmp_path / "*")])
    (tmp_path / "gone.txt").unlink()
    return parts


REASONS = {"bad JSON": 2, "invalid UTF-8": 2, "no text": 2, "the rest of it is lost": 4}


@pytest.mark.parametrize("processes", [0, 1])
def test_what_cannot_be_read_is_counted_and_logged(damaged, tokens, caplog, processes):
    batches = stream(damaged, tokens, streams=1, shuffle_bytes=2000, workers=processes)
    with caplog.at_level(logging.INFO, logger="training.text"):
        rows = first_epoch(batches)[0]
    assert batches.skipped == REASONS
    messages = "\n".join(record.getMessage() for record in caplog.records)
    for source in ("bad.jsonl:1:", "bad.jsonl:2:", "bad.jsonl:3:", "bad.jsonl:4:", "bad.jsonl:5:", "bytes.txt:1:"):
        assert source in messages
    for name in ("cut.jsonl.gz", "untitled.parquet", "damaged.parquet", "gone.txt"):
        assert name in messages
    assert sum(row.endswith(bytes([EOS])) for row in rows) > 290 + 190  # all of bad.jsonl, half of damaged.parquet
    # Each epoch counts them again, and the counts are part of the state.
    state = batches.state_dict()
    assert state["streams"]["0"]["skipped"] == REASONS
    resumed = stream(damaged, tokens, streams=1)
    resumed.load_state_dict(state)
    assert resumed.skipped == REASONS
    while batches.epoch == 1:
        next(batches)
    assert batches.skipped == {reason: 2 * count for reason, count in REASONS.items()}


def test_what_cannot_be_aligned_is_counted(tmp_path, tokens, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["no", "is it", "where"]))
    encode = TokenBytes.encode

    def refuse_no(self, texts):
        return [None if text == "no" else found for text, found in zip(texts, encode(self, texts), strict=True)]

    monkeypatch.setattr(TokenBytes, "encode", refuse_no)
    batches = stream(find_parts([str(tmp_path / "a.jsonl")]), tokens, streams=1)
    assert first_epoch(batches)[0]
    assert batches.skipped == {"token ends not exact": 1}


def test_a_token_longer_than_a_window_is_counted(tmp_path, tokens):
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [" function" * 3, *"abcd"])
    )
    longest = max(tokens.sizes[found.ids].max() for found in tokens.encode([" function"]))
    assert longest > 2
    batches = stream(find_parts([str(tmp_path / "long.jsonl")]), tokens, streams=1, window=int(longest) + 1)
    assert sorted(first_epoch(batches)[0]) == [letter.encode() + bytes([EOS]) for letter in "abcd"]
    assert batches.skipped == {f"token above {longest - 1} bytes": 1}


@pytest.mark.parametrize("processes", [0, 1])
def test_a_stream_without_text_is_refused(tmp_path, tokens, processes):
    (tmp_path / "a.jsonl").write_text('{"text": "is it"}\n{bad\n')
    batches = stream(find_parts([str(tmp_path / "a.jsonl")]), tokens, workers=processes)
    with pytest.raises(UserError, match=r"data stream \d of 4 found no text .* lower data\.streams") as error:
        list(itertools.islice(batches, 4))
    assert "\n" not in str(error.value)


def test_wrong_numbers_are_refused(parts, tokens):
    with pytest.raises(UserError, match="data.streams = 4 can't be shared evenly by 3 ranks: .* such as 6"):
        stream(parts, tokens, rank=0, world_size=3)
    with pytest.raises(ValueError, match=r"rank must be in 0 … 1"):
        stream(parts, tokens, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_bytes 40 is smaller"):
        stream(parts, tokens, batch_bytes=40)
    with pytest.raises(UserError, match="no text to stream"):
        stream([], tokens)


# ------------------------------------------------------------------------------------------- memory and held out


def test_memory_is_bounded_by_the_blocks(tmp_path, tokens):
    """Ten times as much text takes no more memory."""
    peaks = []
    for count in (600, 6000):
        path = tmp_path / f"{count}.jsonl"
        text = "the function returns a value " * 10
        path.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(count)))
        batches = stream(find_parts([str(path)]), tokens, batch_bytes=4096, streams=2, shuffle_bytes=40_000)
        tracemalloc.start()
        while batches.epoch == 0:
            next(batches)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_held_out_text_makes_a_corpus_of_its_own(parts, tokenizer, tmp_path):
    corpus = prepare(read_held_out(parts, Skipped()), tokenizer, tmp_path, held_out_only=True, identity="these")
    assert corpus.train.documents == 0
    assert 5 < corpus.held_out.documents < 40
    other = prepare(read_held_out(parts, Skipped()), tokenizer, tmp_path / "b", held_out_only=True, identity="those")
    assert other.fingerprint != corpus.fingerprint
    with pytest.raises(UserError, match="0 usable documents .* do not give held-out text: give more"):
        prepare([], tokenizer, tmp_path / "c", held_out_only=True)


def test_held_out_text_comes_from_many_parts(tmp_path, monkeypatch):
    for name in range(40):
        lines = (json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(200))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    found = read_held_out(find_parts([str(tmp_path / "*")]), Skipped())
    first = [next(found).source.partition(":")[0] for _ in range(16)]
    assert len(set(first)) > 8
    rest = [document.source for document in found]
    assert len(set(rest)) == len(rest) > 80


def test_blocks_are_a_function_of_their_arguments(parts, tokens):
    maker = BlockMaker(parts, tokens, seed=0, streams=4, longest=46)
    positions, found = [Position()], []
    while positions[-1].epoch < 2:
        found.append(maker.make(1, positions[-1], 1000))
        positions.append(found[-1].after)
    fresh = BlockMaker(parts, tokens, seed=0, streams=4, longest=46)
    for position, block in reversed(list(zip(positions, found, strict=False))):
        again = fresh.make(1, position, 1000)
        assert again.after == block.after
        assert again.split.text.tobytes() == block.split.text.tobytes()
    assert blocks.Position() == positions[0]
