"""linear_kl's benchmark: its truth against the specification, its providers against the truth, and memory."""

import dataclasses
import sys
import types

import pytest
import torch
from torch.nn import functional as F

import bytekernels
from benchmarks import harness, kl_peers, memory
from benchmarks.bench_linear_kl import Shape, cases
from bytekernels.linear_kl import reference
from bytekernels.testing import assert_close

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape(n=300, V=77, d=16, e=24)  # rows of three parts of the truth


def case_of(op, dtype=torch.float32, shape=SHAPE):
    (case,) = cases([op], shape, dtype, CPU)
    return case


@pytest.mark.parametrize("op", kl_peers.OPS)
def test_the_truth_is_the_specifications(op):
    case = case_of(op)

    def whole(**arguments):
        return dict(loss=reference.divergence(**arguments, reverse=op == "reverse", temperature=1.0))

    truth = harness.Truth.of(case)
    expected = harness.Truth.of(dataclasses.replace(case, reference=harness.Provider({op: whole})))
    assert sorted(truth.gradients) == ["student_W", "student_h"]
    assert_close(truth.outputs["loss"], expected.outputs["loss"])
    for name, value in truth.gradients.items():
        assert_close(value, expected.gradients[name], what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", kl_peers.OPS)
def test_every_provider_passes_the_check(op, dtype):
    case = case_of(op, dtype)
    truth = harness.Truth.of(case)
    for provider in kl_peers.providers(["eager", "bytekernels"], CPU).values():
        harness.check(case, provider, truth)


@pytest.mark.parametrize("op", kl_peers.OPS)
def test_the_other_direction_is_refused(op):
    case = case_of(op)
    (other,) = set(kl_peers.OPS) - {op}
    wrong = harness.Provider({op: kl_peers.OURS.functions[other]})
    with pytest.raises(AssertionError, match="loss: relative error"):
        harness.check(case, wrong, harness.Truth.of(case))


class JSDByDefinition:
    """liger-kernel's loss where beta is 0 or 1, from its documentation."""

    def __init__(self, jsd_beta, accum_dtype):
        assert accum_dtype == torch.float32
        self.beta = jsd_beta

    def __call__(self, student_input, student_weight, teacher_input, teacher_weight, shift_labels):
        assert shift_labels is None
        student = (student_input @ student_weight.T).log_softmax(-1)
        teacher = (teacher_input @ teacher_weight.T).log_softmax(-1)
        of, to = {0.0: (teacher, student), 1.0: (student, teacher)}[self.beta]
        return F.kl_div(to, of, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("op", kl_peers.OPS)
def test_liger_is_called_for_the_same_divergence(op, monkeypatch):
    module = types.ModuleType("liger_kernel.transformers.fused_linear_jsd")
    module.LigerFusedLinearJSD = JSDByDefinition
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    case = case_of(op)
    harness.check(case, kl_peers.providers(["liger"], CUDA)["liger"], harness.Truth.of(case))


def test_liger_says_why_it_cannot_run(monkeypatch):
    assert "CUDA" in kl_peers.providers(["liger"], CPU)["liger"].reason
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert "pip install liger-kernel" in kl_peers.providers(["liger"], CUDA)["liger"].reason


def test_a_call_takes_less_memory_than_one_tensor_of_all_logits_and_a_quarter_of_the_plain_form():
    case = case_of("reverse", shape=Shape(n=2048, V=16384, d=32, e=32))
    all_logits = 4 * 2048 * 16384 / memory.MIB

    def few_rows(**arguments):
        return dict(loss=bytekernels.linear_kl(**arguments, chunk_rows=256))

    def peak(provider):
        return memory.peak(harness.call_of(case, provider, "both", {"loss": torch.tensor(1.0)}), CPU)

    plain = peak(kl_peers.EAGER)
    if plain is None:
        pytest.skip("no /proc/self/clear_refs")
    assert plain > 4 * all_logits
    chunks = peak(harness.Provider({"reverse": few_rows}))
    assert chunks < min(all_logits, plain / 4)
