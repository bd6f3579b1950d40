"""A model whose chunks are held to the teacher's vocabulary: who reads them, and what they need."""

from itertools import pairwise

import pytest
import torch

import bytekernels
from bytekernels import BOS
from models import ByteLMConfig
from models.scoring import Scorer
from models.suffix import Vocabulary
from tests.models.conftest import CONSTRAINED, STRINGS, packed_tokens, small_model


@pytest.fixture
def pair():
    """A model, and the same without the constraint."""
    model, free = small_model(**CONSTRAINED), small_model(**CONSTRAINED)
    free.load_state_dict(model.state_dict())
    free.config.constrain_chunks = False
    return model, free


@pytest.fixture
def packed():
    ids, cu_seqlens, _ = packed_tokens([60, 1, 45, 30])
    return ids, cu_seqlens


def test_forward_route_and_prefill_have_the_same_chunks(pair, packed):
    model, free = pair
    routed = free(*packed).routing
    ends = bytekernels.constrain_ends(*packed, routed.prob.logit(), model.prefixes)
    assert not torch.equal(ends, routed.boundary)
    output = model(*packed)
    for found in (output.routing, model.route(*packed)):
        assert torch.equal(found.boundary, ends)
        assert torch.equal(found.prob, routed.prob)
    assert output.chunks.shape[0] == int(ends.sum())
    last = packed[1][1:].long() - 1
    read = model.prefill(*packed).boundary
    inner = torch.ones_like(read)
    inner[last] = False
    assert torch.equal(read[inner], ends[inner])
    assert read[last].tolist() == [False, True, False, False]  # BOS alone is a chunk; the others' bits are to be drawn


def test_given_chunks_are_not_changed(pair, packed):
    model, free = pair
    given = torch.rand(len(packed[0]), generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal(model(*packed, given).logits, free(*packed, given).logits)


def test_its_chunks_are_strings_wherever_bytes_are(pair, packed):
    boundary = pair[0](*packed).routing.boundary
    chunks = 0
    for start, stop in pairwise(packed[1].tolist()):
        ends = [t + 1 for t in range(start, stop - 1) if boundary[t]]
        for begin, end in pairwise([start, *ends, stop]):
            chunk, following = (bytes(packed[0][a : min(b, stop)].tolist()) for a, b in ((begin, end), (end, end + 1)))
            if chunk not in STRINGS:
                had_to = not any(string.startswith(chunk + following) for string in STRINGS)
                alone = len(chunk) == 1 and not any(string.startswith(chunk) for string in STRINGS)
                assert alone or (had_to and any(string.startswith(chunk) for string in STRINGS))
            chunks += chunk in STRINGS
    assert chunks > 20


def test_a_cost_makes_fewer_chunks(packed):
    ends = []
    for cost in (0.0, 1.0, 10.0):
        model = small_model(**CONSTRAINED, chunk_cost=cost)
        model.router.k_proj.down.weight.data.neg_()  # neighbours are unlike each other: ends are likely
        routing = model.route(*packed)
        expected = bytekernels.constrain_ends(*packed, routing.prob.logit() - cost, model.prefixes)
        assert torch.equal(routing.boundary, expected)
        ends.append(int(routing.boundary.sum()))
    assert ends[0] > ends[1] >= ends[2]


def test_a_contexts_chunks_do_not_tell_of_what_follows():
    model = small_model(**CONSTRAINED, chunk_cost=10.0)  # as few chunks as can be
    context = torch.tensor([3])

    def bits(text, context=None):
        ids, cu_seqlens = bytekernels.pack_bytes([text])
        found = model(ids, cu_seqlens, context=context).routing.boundary
        assert torch.equal(found, model.route(ids, cu_seqlens, context).boundary)
        return "".join(".|"[bit] for bit in found)[1:]

    assert bits(b"hello")[:4] == "...|" and bits(b"helor")[:3] == "|.|"
    assert bits(b"hello", context)[:2] == "|." and bits(b"helor", context)[:3] == "|.|"
    read = model.prefill(*bytekernels.pack_bytes([b"hel"])).boundary
    assert read.tolist() == [True, True, False, False]


@torch.no_grad()
def test_scores_go_along_the_constrained_path(pair):
    model, free = pair
    text = b"hello worldhellhello"
    (found,) = Scorer(model).score([("", text)])
    ids = torch.tensor([BOS, *text], dtype=torch.uint8)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    routed = free.route(ids, cu_seqlens)
    boundary = bytekernels.constrain_ends(ids, cu_seqlens, routed.prob.logit(), model.prefixes)
    assert not torch.equal(boundary, routed.boundary)
    log_p = free(ids, cu_seqlens, boundary).logits.log_softmax(-1)
    bits = boundary.tolist()
    steps = [log_p[t, int(ids[t + 1]) + 256 * bits[t + 1]] for t in range(len(text) - 1)]
    last = log_p[len(text) - 1, [text[-1], 256 + text[-1]]].logsumexp(0)
    assert found.log_likelihood == pytest.approx(float(sum(steps) + last), rel=1e-5)


def test_strings_with_reserved_bytes_are_no_tokens():
    """A text has none of them: BOS is a chunk of its own."""
    vocabulary = Vocabulary([b"h", b"\xfeh", b"e\xff", b"", b""], bos_id=3, eos_id=4)
    tree = vocabulary.by_prefix(5)
    assert [int(node) >= 0 for node in tree.nodes] == [True, False, False, False, True]
    ids = torch.tensor([BOS, *b"hh"], dtype=torch.uint8)
    found = bytekernels.constrain_ends(ids, torch.tensor([0, 3]).int(), -torch.ones(3), tree)
    assert found.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"suffix_bytes": 0, "marginal_head": False}, "got suffix_bytes=0"),
        ({"lookahead": False, "suffix_scope": "sequence", "marginal_head": False}, "got lookahead=False"),
        ({"draft_head": True}, "got draft_head=True"),
        ({"dechunk": "lookahead"}, "got dechunk='lookahead'"),
    ],
)
def test_what_it_needs_is_named(other, message):
    with pytest.raises(ValueError, match=f"constrain_chunks=True .*{message}"):
        ByteLMConfig(**{**CONSTRAINED, **other})
