"""Speed and memory of byte marginals and what walks a vocabulary: ours, running sums in PyTorch, the specification.

``python benchmarks/bench_marginals.py [--shape V=49152,M=512] [--json FILE.json] [--plot FILE.png]``
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch
from torch import Tensor

from benchmarks import command, marginal_peers, shapes
from benchmarks.harness import Case
from benchmarks.report import advantages
from bytekernels import BOS, SortedVocabulary, SuffixState, SuffixTrie
from bytekernels.constrain import roofline as constrain_roofline
from bytekernels.marginals import roofline
from bytekernels.ragged import cu_seqlens_of
from bytekernels.roofline import Work
from bytekernels.suffix import roofline as suffix_roofline
from bytekernels.testing import merged_strings

SPREAD = 3.0  # of the logits: their standard deviation


@dataclass(frozen=True)
class Shape(shapes.Shape):
    """What is asked for.

    Attributes:
        V: strings of the vocabulary.
        M: chunks, tokens drawn from it; byte_marginals is asked for at each of their bytes.
        T: bytes of longest_suffix, token_prefix and constrain_ends, tokens again.
        S: sequences of these, their lengths drawn, and of longest_suffix_step.
    """

    V: int
    M: int
    T: int = 65536
    S: int = 16


SHAPES = {"cpu": Shape(V=49152, M=512), "cuda": Shape(V=128256, M=8192, T=2**20, S=64)}
QUICK_SHAPE = Shape(V=600, M=9, T=300, S=3)


def cases(ops: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Iterator[Case]:
    """The ops on text of tokens drawn from a vocabulary; the truth is the specification."""
    text = _Text(shape, dtype, device, seed)
    made: dict[str, Callable[[], tuple[dict[str, Any], Work]]] = {
        "byte_marginals": text.of_byte_marginals,
        "token_prefix": text.of_token_prefix,
        "constrain_ends": text.of_constrain_ends,
        "longest_suffix": text.of_longest_suffix,
        "longest_suffix_step": text.of_longest_suffix_step,
    }
    for op in ops:
        arguments, work = made[op]()
        step = dict(updated=("recent", "counts"), calls=3) if op.endswith("_step") else {}
        yield Case(op, str(shape), dtype, arguments, marginal_peers.TRUTH, {"forward": work}, **step)


class _Text:
    """Arguments of one shape, and the least that a call with them must do."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        self.strings = merged_strings(shape.V, seed)

    def of_byte_marginals(self) -> tuple[dict[str, Any], Work]:
        """A row for BOS and for each byte of M - 1 tokens: a chunk ends on BOS and on each token."""
        tokens = self._tokens(self.shape.M - 1)
        lengths = torch.tensor([1, *map(len, tokens)])
        text = torch.tensor(list(bytes([BOS]) + b"".join(tokens)), dtype=torch.uint8)
        boundary = torch.zeros(len(text), dtype=torch.bool)
        boundary[lengths.cumsum(0) - 1] = True
        vocabulary = SortedVocabulary(self.strings)
        cu_seqlens = cu_seqlens_of(torch.tensor([len(text)], dtype=torch.int32))
        arguments = dict(
            logits=(SPREAD * torch.randn(self.shape.M, self.shape.V, generator=self.generator)).to(self.dtype),
            chunk_of=boundary.cumsum(0).to(torch.int32) - 1,
            **marginal_peers.prefixes(text, cu_seqlens, boundary, vocabulary),
        )
        work = roofline.byte_marginals(len(text), self.shape.M, self.shape.V, self.dtype)
        return self._moved(arguments) | dict(vocabulary=vocabulary.to(self.device)), work

    def of_token_prefix(self) -> tuple[dict[str, Any], Work]:
        boundary = torch.rand(self.shape.T, generator=self.generator) < 1 / 4
        return self._with_vocabulary(boundary=boundary), roofline.token_prefix(self.shape.T, self.shape.S)

    def of_constrain_ends(self) -> tuple[dict[str, Any], Work]:
        log_odds = 4 * torch.randn(self.shape.T, generator=self.generator) - 3  # some one in four is above 0
        work = constrain_roofline.constrain_ends(self.shape.T, self.shape.S)
        return self._with_vocabulary(log_odds=log_odds), work

    def _with_vocabulary(self, **rows: Tensor) -> dict[str, Any]:
        ids, cu_seqlens = self._sequences()
        arguments = self._moved(dict(ids=ids, cu_seqlens=cu_seqlens, **rows))
        return arguments | dict(vocabulary=SortedVocabulary(self.strings).to(self.device))

    def of_longest_suffix(self) -> tuple[dict[str, Any], Work]:
        ids, cu_seqlens = self._sequences()
        arguments = self._moved(dict(ids=ids, cu_seqlens=cu_seqlens))
        work = suffix_roofline.longest_suffix(self.shape.T, self.shape.S)
        return arguments | dict(trie=SuffixTrie(self.strings).to(self.device)), work

    def of_longest_suffix_step(self) -> tuple[dict[str, Any], Work]:
        ids, cu_seqlens = self._sequences()
        trie = SuffixTrie(self.strings)
        state = SuffixState.after(ids, cu_seqlens, trie)
        arguments = self._moved(dict(ids=ids[: self.shape.S], recent=state.recent, counts=state.counts))
        return arguments | dict(trie=trie.to(self.device)), suffix_roofline.longest_suffix_step(self.shape.S)

    def _tokens(self, count: int) -> list[bytes]:
        """Of the vocabulary, early ones more often."""
        drawn = torch.rand(count, generator=self.generator, dtype=torch.float64) ** 2 * self.shape.V
        return [self.strings[i] for i in drawn.long()]

    def _sequences(self) -> tuple[Tensor, Tensor]:
        text = b"".join(self._tokens(self.shape.T))[: self.shape.T]
        return torch.tensor(list(text), dtype=torch.uint8), shapes.drawn_sequences(self.shape, self.generator)

    def _moved(self, arguments: dict[str, Tensor]) -> dict[str, Any]:
        return {name: value.to(self.device) for name, value in arguments.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    benchmark = command.Benchmark(
        prog="bench_marginals.py",
        description=__doc__.splitlines()[0],
        letters="V strings of the vocabulary, M chunks of byte_marginals, T bytes and S sequences of the others",
        shapes=SHAPES,
        quick_shape=QUICK_SHAPE,
        ops=marginal_peers.OPS,
        provider_names=marginal_peers.PROVIDERS,
        on_request=(),
        cases=cases,
        providers=marginal_peers.providers,
        paragraph=advantages,
    )
    return command.main(benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
