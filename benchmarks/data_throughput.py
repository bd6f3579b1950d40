"""Text to batches, prepared and streamed: ``python benchmarks/data_throughput.py``.

The text is the documentation of this Python installation, in JSONL files; bytes are those of batches.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from training.alignment import TokenBytes
from training.corpus import prepare
from training.data import Batches
from training.parts import find_parts
from training.stream import StreamBatches
from training.teacher import train_tokenizer
from training.text import python_docs, read_documents


def time_batches(batches: Batches | StreamBatches, num_bytes: int) -> str:
    """Seconds until the first batch, then MB/s over `num_bytes` by the clock and by this process's own CPU time."""
    began = time.monotonic()
    batches.build_next(threads=1)
    first, cpu = time.monotonic(), time.process_time()
    done = 0
    while done < num_bytes:
        done += len(batches.build_next(threads=1).ids)
    clock, cpu = time.monotonic() - first, time.process_time() - cpu
    speed = f"{done / 1e6 / clock:.1f} MB/s ({done / 1e6 / cpu:.1f} per CPU s)"
    return f"first batch after {first - began:.2f} s, then {speed}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=int, default=30_000_000, help="bytes of text")
    parser.add_argument("--bytes", type=int, default=30_000_000, help="batches' bytes that are timed")
    parser.add_argument("--files", type=int, default=8, help="files that the text lies in")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    sizes = {"window": 4096, "batch_bytes": 65536, "seed": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = list(python_docs(limit_bytes=options.text))
        files = [folder / f"{i}.jsonl" for i in range(options.files)]
        for i, file in enumerate(files):
            lines = (json.dumps({"text": d.text.decode()}) + "\n" for d in documents[i :: options.files])
            file.write_text("".join(lines))
        total = sum(len(document.text) for document in documents)
        tokenizer = train_tokenizer(documents, 4096)
        print(f"{total / 1e6:.1f} MB of text, {platform.processor() or platform.machine()}, torch {torch.__version__}")

        began, cpu = time.monotonic(), time.process_time()
        corpus = prepare(read_documents([str(folder / "*.jsonl")]), tokenizer, folder / "corpus")
        clock, cpu = time.monotonic() - began, time.process_time() - cpu
        print(f"preparing: {total / 1e6 / clock:.1f} MB/s ({total / 1e6 / cpu:.1f} per CPU s)", flush=True)
        print(f"prepared: {time_batches(Batches(corpus, **sizes), options.bytes)}")
        for workers in options.workers:
            parts, tokens = find_parts([str(folder / "*.jsonl")]), TokenBytes(tokenizer)
            batches = StreamBatches(parts, tokens, **sizes, streams=options.streams, workers=workers)
            print(f"streamed, {workers} workers: {time_batches(batches, options.bytes)}", flush=True)
            batches.close()


if __name__ == "__main__":
    main()
