"""Writing with a token head against a search through the vocabulary, byte by byte and from scratch."""

import numpy as np
import pytest
import torch

from bytekernels import BOS, EOS, routing_of
from models import ByteLM, Sampling, TokenHeadWriter
from models.suffix import Vocabulary
from tests.models.conftest import CHUNK, STRINGS, SUFFIX, small_model

VOCABULARY = Vocabulary(STRINGS, bos_id=48, eos_id=49)
PROMPTS = ["hello world", "", "dfeg", "漢hell"]


class Tokens:
    def __init__(self, ids: list[int]) -> None:
        self.ids = np.array(ids, np.int32)
        self.lengths = np.array([len(STRINGS[i]) for i in ids], np.int32)


def encode(texts):
    """The longest string first, from the left; None for a text that has a byte of no string."""
    found = []
    for text in texts:
        rest, ids = text.encode(), []
        while rest:
            fitting = [(len(string), -i) for i, string in enumerate(STRINGS) if rest.startswith(string)]
            if not fitting:
                break
            ids.append(-max(fitting)[1])
            rest = rest[len(STRINGS[ids[-1]]) :]
        found.append(None if rest else Tokens(ids))
    return found


@pytest.fixture(params=[{}, SUFFIX, CHUNK | {"dechunk": "hold"}], ids=["plain", "suffix", "chunk"])
def model(request) -> ByteLM:
    found = small_model(**request.param)
    with torch.no_grad():
        found.token_head.weight.normal_(std=2.0)  # so that it does not say the same after every text
    return found


@torch.no_grad()
def distribution(model: ByteLM, text: bytes, bits: list[bool]) -> dict[tuple[int, bool], float]:
    """P(next byte, does a chunk end on it) by a search through the vocabulary."""
    ids = torch.tensor([BOS, *text], dtype=torch.uint8)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    routing = routing_of(torch.tensor([True, *bits]), cu_seqlens)
    chunks = model.core(model.encoder.chunks(ids, cu_seqlens, routing), routing.cu_chunks)
    strings = [*STRINGS, *[b""] * (49 - len(STRINGS)), bytes([EOS])]
    weights = model.token_head(chunks[-1]).double().exp()
    begun = text[len(text) - bits[::-1].index(True) if True in bits else 0 :]
    found: dict[tuple[int, bool], float] = {}
    for string, weight in zip(strings, weights.tolist(), strict=True):
        if len(string) > len(begun) and string.startswith(begun):
            pair = string[len(begun)], len(string) == len(begun) + 1
            found[pair] = found.get(pair, 0.0) + weight
    return found


def test_each_byte_is_the_likeliest_with_its_bit(model):
    written = TokenHeadWriter(model, VOCABULARY, encode).write(PROMPTS, max_new_bytes=12)
    assert len({one.new for one in written}) > 1
    for prompt, one in zip(PROMPTS, written, strict=True):
        assert one.prompt == prompt.encode() and len(one.boundaries) == len(one.prompt) + len(one.new)
        text, bits = one.prompt, list(one.boundaries[: len(one.prompt)])
        assert not bits or bits[-1]
        for byte, bit in zip(one.new, one.boundaries[len(bits) :], strict=True):
            wanted = distribution(model, text, bits)
            assert wanted[byte, bit] == pytest.approx(max(wanted.values()), rel=1e-4)
            text, bits = text + bytes([byte]), [*bits, bit]
        assert one.finish_reason == "length" if len(one.new) == 12 else "eos"
        if one.finished:
            wanted = distribution(model, text, bits)
            assert wanted[EOS, True] == pytest.approx(max(wanted.values()), rel=1e-4)


def test_draws_follow_the_distribution(model):
    writer = TokenHeadWriter(model, VOCABULARY, encode)
    counts: dict[tuple[int, bool], int] = {}
    for seed in range(400):
        (one,) = writer.write(["hello"], max_new_bytes=1, sampling=Sampling(temperature=1.0, seed=seed))
        pair = (EOS, True) if one.finished else (one.new[0], one.boundaries[-1])
        counts[pair] = counts.get(pair, 0) + 1
    wanted = distribution(model, b"hello", [False, False, False, True, True])
    total = sum(wanted.values())
    assert counts.keys() <= wanted.keys()
    for pair, weight in wanted.items():
        share = weight / total
        assert abs(counts.get(pair, 0) / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5 + 0.005


def test_stop_strings_and_lengths(model):
    writer = TokenHeadWriter(model, VOCABULARY, encode)
    (whole,) = writer.write(["hello world"], max_new_bytes=12)
    stop = whole.new[2:4]
    (cut,) = writer.write(["hello world"], max_new_bytes=12, stop=stop)
    assert cut.new == whole.new[: whole.new.index(stop)] and cut.stop == stop and cut.finish_reason == "stop"
    assert cut.boundaries == whole.boundaries[: len(cut.boundaries)]
    (none,) = writer.write(["hello world"], max_new_bytes=0)
    assert none.new == b"" and none.finish_reason == "length"
    assert writer.write([]) == []


def test_a_full_core_ends_a_text(model):
    model.core.backbone.config.max_position_embeddings = 6
    (one,) = TokenHeadWriter(model, VOCABULARY, encode).write(["hello"], max_new_bytes=200)
    assert one.finish_reason in ("length", "eos") and sum(one.boundaries) <= 6


def test_mistakes():
    with pytest.raises(ValueError, match=r"no token head \(stage 2 drops it\)"):
        TokenHeadWriter(small_model(token_head=False), VOCABULARY, encode)
    with pytest.raises(ValueError, match="are not its bytes: leave this prompt out"):
        TokenHeadWriter(small_model(), VOCABULARY, encode).write(["ABC"])
