"""Speed and memory of packing: ours, NumPy, plain PyTorch, and on request a Python loop over bytes.

``python benchmarks/bench_pack.py [--json FILE.json] [--plot FILE.png]``; with the loop, which takes seconds for a MiB:
``python benchmarks/bench_pack.py --shape T=1048576,S=128 --provider python numpy eager bytekernels``
"""

import dataclasses
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import numpy as np
import torch
from torch import Tensor

from benchmarks import command, pack_peers, shapes
from benchmarks.harness import Case
from benchmarks.report import advantages
from bytekernels.align import roofline as align_roofline
from bytekernels.pack import roofline
from bytekernels.ragged import cu_seqlens_of, lengths_of
from bytekernels.roofline import Work


@dataclass(frozen=True)
class Shape(shapes.Shape):
    """What is packed.

    Attributes:
        T: bytes, each sequence's BOS included.
        S: sequences, their lengths drawn.
        D: bytes of a row of unpack and pack_padded, which have T rows.
    """

    T: int
    S: int
    D: int = 1

    def problem(self) -> str | None:
        if self.T < 4 * self.S:
            return f"T={self.T} bytes are too few for S={self.S} sequences with a BOS each: raise T to 4S or lower S"
        return None


SHAPES = {"cpu": Shape(T=64 * 2**20, S=8192), "cuda": Shape(T=64 * 2**20, S=8192)}
QUICK_SHAPE = Shape(T=8192, S=16)
DTYPES = {"uint8": torch.uint8}
VOCABULARY = 4096  # tokens of the tokenizer that cuts the text
ENDED = 1 / 4  # of the sequences of align_pack end their document


def cases(ops: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Iterator[Case]:
    """The ops on text, or on random bytes where their values do not matter.

    The truth is the specification, which makes new tensors where an op's name ends in ``_into``.
    """
    batch = _Batch(shape, device, seed)
    made: dict[str, Callable[[], tuple[dict[str, Any], Work]]] = {
        "pack": batch.of_pack,
        "pack_flat": batch.of_pack_flat,
        "pack_padded": batch.of_pack_padded,
        "unpack": batch.of_unpack,
        "targets": batch.of_targets,
        "token_ends": batch.of_token_ends,
        "row_index": batch.of_row_index,
        "align_pack": batch.of_align_pack,
    }
    for op in ops:
        arguments, work = made[op.removesuffix("_into")]()
        case = Case(op, str(shape), dtype, arguments, pack_peers.TRUTH, {"forward": work})
        if op.endswith("_into"):
            case = dataclasses.replace(case, arguments=arguments | dict(out=batch.room_for(op)), updated=("out",))
        yield case


class _Batch:
    """Arguments of one shape, and the least that a call with them must do."""

    def __init__(self, shape: Shape, device: torch.device, seed: int) -> None:
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.cu_seqlens = shapes.drawn_sequences(shape, self.generator)
        self.longest = int(lengths_of(self.cu_seqlens).max())
        self.row = (shape.D,) if shape.D > 1 else ()

    def of_pack(self) -> tuple[dict[str, Any], Work]:
        text = _text(self.shape.T).text.tobytes()
        ends = self._ends_without_bos().tolist()
        documents = [text[begin:end] for begin, end in itertools.pairwise(ends)]
        return dict(documents=documents, device=self.device), roofline.pack_bytes(self.shape.T, self.shape.S)

    def of_pack_flat(self) -> tuple[dict[str, Any], Work]:
        flat = torch.from_numpy(_text(self.shape.T).text[: self.shape.T - self.shape.S]).to(self.device)
        work = roofline.pack_bytes(self.shape.T, self.shape.S, offsets=True)
        return dict(flat=flat, offsets=self._ends_without_bos()), work

    def of_pack_padded(self) -> tuple[dict[str, Any], Work]:
        padded = self._bytes(self.shape.S, self.longest, *self.row)
        work = roofline.pack_padded(self.shape.T, self.shape.S, self.shape.D)
        return dict(padded=padded, cu_seqlens=self.cu_seqlens, length=self.longest), work

    def of_unpack(self) -> tuple[dict[str, Any], Work]:
        values = self._bytes(self.shape.T, *self.row)
        work = roofline.unpack(self.shape.T, self.shape.S, self.longest, self.shape.D)
        return dict(values=values, cu_seqlens=self.cu_seqlens, length=self.longest), work

    def of_targets(self) -> tuple[dict[str, Any], Work]:
        boundary = self._bytes(self.shape.T) < 256 / 5  # a chunk of five bytes, on average
        arguments = dict(ids=self._bytes(self.shape.T), cu_seqlens=self.cu_seqlens, boundary=boundary)
        return arguments, roofline.next_byte_targets(self.shape.T, self.shape.S)

    def of_token_ends(self) -> tuple[dict[str, Any], Work]:
        text = _text(self.shape.T)
        spans, rows = self._spans(text)
        token_lengths = torch.from_numpy(text.token_lengths[: spans[:, 3].sum()].astype(np.int32))
        offsets = (cu_seqlens_of(torch.from_numpy(lengths)) for lengths in (spans[:, 3], spans[:, 1] + 1))
        token_cu, cu_seqlens = (cu.to(self.device) for cu in offsets)
        arguments = dict(token_lengths=token_lengths.to(self.device), token_cu=token_cu, cu_seqlens=cu_seqlens)
        return arguments, roofline.token_end_mask(rows, len(token_lengths), len(spans))

    def of_row_index(self) -> tuple[dict[str, Any], Work]:
        arguments = dict(cu_seqlens=self.cu_seqlens, total=self.shape.T)
        return arguments, roofline.row_index(self.shape.T, self.shape.S)

    def of_align_pack(self) -> tuple[dict[str, Any], Work]:
        """The corpus is on the host; windows of it, in any order, go to the device."""
        text = _text(self.shape.T)
        spans, rows = self._spans(text)
        order = torch.randperm(len(spans), generator=torch.Generator().manual_seed(0))
        ends = torch.rand(len(spans), generator=torch.Generator().manual_seed(1)) < ENDED
        added, tokens = int(ends.sum()), int(spans[:, 3].sum()) + len(spans)
        arguments = dict(
            text=torch.from_numpy(text.text),
            token_ids=torch.from_numpy(text.token_ids),
            token_lengths=torch.from_numpy(text.token_lengths),
            spans=torch.from_numpy(spans)[order],
            ends=ends,
            bos_id=text.bos_id,
            eos_id=text.eos_id,
            device=self.device,
        )
        return arguments, align_roofline.align_pack(rows + added, tokens + added, len(spans), ended=added)

    def room_for(self, op: str) -> Tensor:
        """Memory that an op writes into, in use already."""
        sizes = {
            "pack_into": (self.shape.T,),
            "pack_padded_into": (self.shape.T, *self.row),
            "unpack_into": (self.shape.S, self.longest, *self.row),
        }
        return torch.full(sizes[op], 0xAA, dtype=torch.uint8, device=self.device)

    def _bytes(self, *sizes: int) -> Tensor:
        return torch.randint(256, sizes, dtype=torch.uint8, generator=self.generator, device=self.device)

    def _ends_without_bos(self) -> Tensor:
        """Offsets of the documents, before BOS is put before each: int32 [S+1]."""
        return self.cu_seqlens - torch.arange(self.shape.S + 1, dtype=torch.int32, device=self.device)

    def _spans(self, text: "_Text") -> tuple[np.ndarray, int]:
        """int64 [S, 4]: the text from its start, cut at token ends near the drawn ones; and its bytes with BOS."""
        token_ends = np.concatenate([[0], np.cumsum(text.token_lengths, dtype=np.int64)])
        wanted = self._ends_without_bos().cpu().numpy()
        tokens = np.searchsorted(token_ends, wanted, side="right") - 1
        ends = token_ends[tokens]
        spans = np.stack([ends[:-1], np.diff(ends), tokens[:-1], np.diff(tokens)], axis=1)
        return np.ascontiguousarray(spans), int(ends[-1]) + self.shape.S


@dataclass(frozen=True)
class _Text:
    """Text uint8 [N], the whole tokens in it int32 [n], their lengths in bytes uint16 [n]."""

    text: np.ndarray
    token_ids: np.ndarray
    token_lengths: np.ndarray
    bos_id: int
    eos_id: int


@functools.lru_cache(maxsize=1)
def _text(total: int) -> _Text:
    """Real text, cut by a real tokenizer: Python's documentation as often as T holds it, in a byte-level BPE."""
    once = _documentation()
    times = -(-total // len(once.text))
    token_lengths = np.tile(once.token_lengths, times)
    tokens = np.searchsorted(np.cumsum(token_lengths, dtype=np.int64), total, side="right")
    return dataclasses.replace(
        once,
        text=np.tile(once.text, times)[:total],
        token_ids=np.tile(once.token_ids, times)[:tokens],
        token_lengths=token_lengths[:tokens],
    )


@functools.cache
def _documentation() -> _Text:
    """The topics of Python's ``help()``, one after another."""
    from pydoc_data.topics import topics

    from training.alignment import TokenBytes  # brings in transformers, which the other benchmarks do without
    from training.teacher import train_tokenizer
    from training.text import Document

    texts = [inspect.cleandoc(topics[name]) for name in sorted(topics)]
    documents = [Document(str(number), text.encode()) for number, text in enumerate(texts)]
    tokens = TokenBytes(train_tokenizer(documents, VOCABULARY))
    aligned = [found for found in tokens.encode(texts) if found is not None]
    assert len(aligned) == len(texts), "a byte-level tokenizer cuts any text exactly"
    return _Text(
        text=np.frombuffer(b"".join(document.text for document in documents), dtype=np.uint8),
        token_ids=np.concatenate([found.ids for found in aligned]),
        token_lengths=np.concatenate([found.lengths for found in aligned]).astype(np.uint16),
        bos_id=tokens.bos_id,
        eos_id=tokens.eos_id,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    benchmark = command.Benchmark(
        prog="bench_pack.py",
        description=__doc__.splitlines()[0],
        letters="T bytes, S sequences, D bytes of a row of unpack and pack_padded",
        shapes=SHAPES,
        quick_shape=QUICK_SHAPE,
        ops=pack_peers.OPS,
        provider_names=pack_peers.PROVIDERS,
        on_request=pack_peers.ON_REQUEST,
        cases=cases,
        providers=pack_peers.providers,
        paragraph=advantages,
        dtypes=DTYPES,
    )
    return command.main(benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
