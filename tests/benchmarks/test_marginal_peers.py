"""The benchmark of byte marginals and longest suffixes: its providers against the specification, and wrong ones."""

import pytest
import torch

from benchmarks import harness, marginal_peers
from benchmarks.bench_marginals import Shape, cases
from benchmarks.marginal_peers import OPS

CPU = torch.device("cpu")
SHAPE = Shape(V=600, M=9, T=300, S=3)


def case_of(op, dtype=torch.float32):
    (case,) = cases([op], SHAPE, dtype, CPU)
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_every_provider_passes_the_check(op, dtype):
    case = case_of(op, dtype)
    truth = harness.Truth.of(case)
    for name, provider in marginal_peers.providers(marginal_peers.PROVIDERS, CPU).items():
        if op in provider.functions:
            harness.check(case, provider, truth)
        else:
            assert name == "reference"


def test_rows_and_chunks_are_those_of_the_tokens():
    arguments = case_of("byte_marginals").arguments
    assert arguments["logits"].shape == (SHAPE.M, SHAPE.V)
    assert arguments["chunk_of"].unique().tolist() == list(range(SHAPE.M))
    assert arguments["prefix"].min() == 0


def test_a_byte_that_is_impossible_is_not_taken_for_a_possible_one():
    case = case_of("byte_marginals")
    truth = harness.Truth.of(case)
    impossible = truth.outputs["marginals"].isinf().nonzero()[0].tolist()

    def likely(**arguments):
        outputs = marginal_peers.OURS.functions["byte_marginals"](**arguments)
        outputs["marginals"][tuple(impossible)] = -20.0
        return outputs

    with pytest.raises(AssertionError, match="marginals: relative error"):
        harness.check(case, harness.Provider({"byte_marginals": likely}), truth)


@pytest.mark.parametrize("op", [op for op in OPS if op != "byte_marginals"])
def test_a_value_that_is_off_by_a_bit_is_refused(op):
    case = case_of(op)
    truth = harness.Truth.of(case)
    for name in truth.outputs:

        def off(name=name, **arguments):
            outputs = marginal_peers.OURS.functions[op](**arguments)
            outputs[name] = outputs[name].clone()
            values = outputs[name].view(-1)
            values[1] = values[1] ^ 1
            return outputs

        with pytest.raises(AssertionError, match=f"{name}: 1 of "):
            harness.check(case, harness.Provider({op: off}), truth)
