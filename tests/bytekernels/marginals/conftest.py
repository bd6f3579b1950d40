"""Vocabularies, and what is asked of them: nodes by their strings, the distribution after a prefix, every token."""

import functools

import pytest
import torch

import bytekernels
from bytekernels.testing import merged_strings
from tests.bytekernels.conftest import FAST, Fast
from training.alignment import TokenBytes

SMALL = [b"a", b"", b"ab", b"abc", b"b", b"ab", b"\xff", b"bcab", b"abd", b"cc"]  # "ab" twice, one special
TEXT = ["The quick brown fox jumps over the lazy dog; 日本語のテキスト and a 👩\u200d👧 family, 12345 more."] * 4
REFERENCE = Fast("reference", "cpu", (torch.float32, torch.float16, torch.bfloat16, torch.float64), 60)


@pytest.fixture(params=[pytest.param(REFERENCE, id="reference"), *FAST])
def each(request) -> Fast:
    """Each implementation, the specification too."""
    return request.param


def byte_level() -> list[bytes]:
    """The tokens of a byte-level BPE, an EOS among them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    return _strings(tokenizer)


def sentencepiece() -> list[bytes]:
    """As SentencePiece has them: pieces with ▁ for the space, <0xNN> for every byte, some bytes twice."""
    from tokenizers import Tokenizer, models

    words = {piece for word in TEXT[0].split() for n in range(1, len(word) + 1) for piece in (word[:n], "▁" + word[:n])}
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", *sorted(words)]
    return _strings(Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)))


def _strings(tokenizer) -> list[bytes]:
    from transformers import PreTrainedTokenizerFast

    tokens = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))
    return [tokens[i] for i in range(len(tokens))]


VOCABULARIES = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "merged": functools.partial(merged_strings, 5000),
}


@functools.cache
def vocabulary_of(name: str) -> tuple[list[bytes], bytekernels.SortedVocabulary]:
    strings = VOCABULARIES[name]()
    return strings, bytekernels.SortedVocabulary(strings)


def nodes_of(prefixes, vocabulary):
    """Node of each prefix, walked one byte at a time."""
    nodes = []
    for prefix in prefixes:
        node = torch.zeros(1, dtype=torch.int32)
        for byte in prefix:
            node = vocabulary.child(node, torch.tensor([byte]))
        nodes.append(node)
    return torch.cat(nodes)


def spread_logits(rows, vocabulary, dtype=torch.float32, seed=0, spread=6.0):
    """Random logits, a few columns of which are rare far beyond what a difference of running sums would keep."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, vocabulary, generator=generator)
    logits[:, :: max(1, vocabulary // 7)] = -45.0
    return logits.to(dtype)


def marginals(fast, logits, vocabulary, chunk_of, prefix):
    """On the implementation's device, back on the CPU."""
    arguments = (tensor.to(fast.device) for tensor in (chunk_of, prefix))
    with fast.force():
        return bytekernels.byte_marginals(logits.to(fast.device), vocabulary.to(fast.device), *arguments).cpu()


def products_along(fast, logits, vocabulary, tokens):
    """log P of each of the tokens' strings [n], the sum of the rows along it, for logits [1, V]: float64."""
    edges = vocabulary.edges.long()
    parent, byte = edges >> 8, edges & 255
    end = vocabulary.nodes[tokens].long()
    asked = torch.zeros(len(edges), dtype=torch.bool)  # the nodes strictly above the ends
    node = end
    while bool((node > 0).any()):
        node = parent[node[node > 0]]
        asked[node] = True
    rows = asked.nonzero().flatten().int()
    out = marginals(fast, logits, vocabulary, torch.zeros_like(rows), rows).double()
    place = asked.long().cumsum(0) - 1
    reached = torch.zeros(len(edges), dtype=torch.float64)  # of going on to each node
    for first, last in zip(vocabulary.levels[1:], vocabulary.levels[2:], strict=False):
        nodes = torch.arange(first, last)
        nodes = nodes[asked[parent[nodes]]]
        reached[nodes] = reached[parent[nodes]] + out[place[parent[nodes]], byte[nodes]]
    return reached[parent[end]] + out[place[parent[end]], 256 + byte[end]]
