"""A document gives the same result alone or packed among others.

In every kernel that is so bit for bit. Around them PyTorch multiplies matrices, takes another way for a few rows than
for many, and computes the last n % 32 numbers of a SiLU or sigmoid otherwise than the rest: there fp32 results agree
within rounding. Where neither can happen, which is where a document has 16 chunks or more, inner widths are multiples
of 32 and the dechunk is ``hold``, the whole model gives the same bits too (measured with AVX-512; ``causal`` takes a
sigmoid of one number per chunk). In bf16 no other bit was found in any model, but nothing rules one out.
"""

import pytest
import torch

import bytekernels
from models.byte_lm import core_settings
from tests.models.conftest import packed_bytes, small_model, small_teacher

LENGTHS = [7, 1, 0, 70, 3, 129]


def documents(cu_seqlens):
    """For each document its rows in the batch, and its own offsets."""
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        yield slice(start, end), torch.tensor([0, end - start], dtype=torch.int32)


def test_kernels_give_the_same_bits():
    def kernels(x, cu_seqlens):
        mixed = bytekernels.mamba2_mixer(x, *weights, cu_seqlens, head_dim=16, num_groups=1, eps=1e-5)
        routing = bytekernels.route(mixed[:, :16], mixed[:, 16:], cu_seqlens)
        chunks = bytekernels.gather_chunks(mixed, routing)
        u = bytekernels.dechunk(chunks, routing, weight=routing.prob[routing.index.long()], null=weights[-1])
        return mixed, routing.prob, routing.boundary, u

    torch.manual_seed(0)
    conv, bias, A, D, dt_bias, norm = (torch.randn(size) for size in ((48, 4), (48,), (2,), (2,), (2,), (32,)))
    weights = conv, bias, -A.exp(), D, dt_bias, norm
    _, cu_seqlens = packed_bytes(LENGTHS)
    x = torch.randn(sum(LENGTHS), 32 + 48 + 2)  # gate, inputs of the convolution, time steps
    packed = kernels(x, cu_seqlens)
    assert 1 < packed[2].sum() < len(x)
    for rows, own in documents(cu_seqlens):
        assert all(torch.equal(one, all_[rows]) for one, all_ in zip(kernels(x[rows], own), packed, strict=True))


def test_the_model_gives_the_same_logits_within_rounding(model):
    ids, cu_seqlens = packed_bytes(LENGTHS)
    packed = model(ids, cu_seqlens)
    for rows, own in documents(cu_seqlens):
        alone = model(ids[rows], own)
        torch.testing.assert_close(alone.logits, packed.logits[rows], atol=1e-5, rtol=1e-4)
        assert torch.equal(alone.routing.boundary, packed.routing.boundary[rows])


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="measured with AVX-512 only")
def test_the_model_gives_the_same_bits_from_sixteen_chunks_on():
    core = core_settings(small_teacher()) | {"intermediate_size": 64}
    model = small_model(core=core, bridge_inner=64, router_inner=32)
    ids, cu_seqlens = packed_bytes([64, 3, 65, 100, 0, 301])
    packed = model(ids, cu_seqlens)
    compared = [model(ids[rows], own).logits.equal(packed.logits[rows])
                for (rows, own), chunks in zip(documents(cu_seqlens), packed.routing.cu_chunks.diff(), strict=True)
                if chunks >= 16]  # fmt: skip
    assert compared == [True] * 4
