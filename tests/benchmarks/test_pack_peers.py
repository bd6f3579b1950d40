"""The packing benchmark's providers against the specification, the text that it packs, and what a wrong one meets."""

import json

import numpy as np
import pytest
import torch

from benchmarks import bench_pack, harness, pack_peers
from benchmarks.bench_pack import Shape, cases
from benchmarks.pack_peers import OPS
from bytekernels import BOS
from bytekernels.ragged import lengths_of

CPU = torch.device("cpu")
SHAPES = [Shape(T=700, S=5), Shape(T=64, S=16, D=3), Shape(T=9, S=1, D=2)]


def case_of(op, shape=SHAPES[0]):
    (case,) = cases([op], shape, torch.uint8, CPU)
    return case


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_provider_passes_the_check(op, shape):
    case = case_of(op, shape)
    truth = harness.Truth.of(case)
    for name, provider in pack_peers.providers(pack_peers.PROVIDERS, CPU).items():
        if op in provider.functions:
            harness.check(case, provider, truth)
        else:
            assert name == "python"
            assert op == "pack_flat" or op.endswith("_into")


@pytest.mark.parametrize("op", OPS)
def test_a_value_that_is_off_by_one_is_refused(op):
    case = case_of(op)
    truth = harness.Truth.of(case)
    for name in truth.outputs:

        def off(name=name, **arguments):
            outputs = dict(pack_peers.OURS.functions[op](**arguments))
            outputs[name] = outputs[name].clone()
            outputs[name].view(-1)[3] = outputs[name].view(-1)[3] == 0
            return outputs

        with pytest.raises(AssertionError, match=f"{name}: 1 of "):
            harness.check(case, harness.Provider({op: off}), truth)


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("_into")])
def test_what_leaves_the_given_memory_alone_is_refused(op):
    case = case_of(op)
    before = case.arguments["out"].clone()
    truth = harness.Truth.of(case)
    (name,) = set(truth.outputs) - {"cu_seqlens"}
    idle = harness.Provider({op: lambda out, **others: truth.outputs | {name: out}})
    with pytest.raises(AssertionError, match=f"{name}: .* values differ"):
        harness.check(case, idle, truth)
    for provider in (pack_peers.NUMPY, pack_peers.EAGER, pack_peers.OURS):
        assert_writes_into_out(case, op, provider)
    assert torch.equal(case.arguments["out"], before)


def assert_writes_into_out(case, op, provider):
    arguments = harness._arguments(case, provider)
    outputs = provider.functions[op](**arguments)
    address = torch.as_tensor(arguments["out"]).data_ptr()
    assert address in [output.data_ptr() for output in outputs.values()]


def test_documents_and_windows_are_text_cut_at_tokens():
    shape = SHAPES[0]
    documents = case_of("pack").arguments["documents"]
    assert sum(map(len, documents)) + len(documents) == shape.T
    assert b"".join(documents).decode().split()

    arguments = case_of("align_pack").arguments
    lengths, text = arguments["token_lengths"].numpy().astype(np.int64), arguments["text"].numpy()
    token_ends = np.concatenate([[0], lengths.cumsum()])
    for first_byte, count, first_token, tokens in arguments["spans"].tolist():
        assert token_ends[first_token] == first_byte
        assert token_ends[first_token + tokens] == first_byte + count
    assert arguments["spans"][:, 1].sum() > 0.9 * (shape.T - shape.S)
    assert 2 < lengths.mean() < 8
    assert len(text) == shape.T


def test_work_is_that_of_the_arguments_and_the_outputs():
    def size(*values):
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))

    for op in ("pack_flat", "unpack", "targets", "token_ends", "row_index"):
        case = case_of(op)
        outputs = harness.Truth.of(case).outputs
        assert case.work["forward"].bytes == size(*case.arguments.values(), *outputs.values())
    case = case_of("pack_padded")  # of which the padding is not read
    values = harness.Truth.of(case).outputs["values"]
    assert case.work["forward"].bytes == 2 * size(values) + size(case.arguments["cu_seqlens"])
    case = case_of("align_pack")
    batch = harness.Truth.of(case).outputs
    taken = case.arguments["spans"]
    corpus = int(taken[:, 1].sum()) + int(taken[:, 3].sum()) * (4 + 2)
    assert case.work["forward"].bytes == corpus + size(taken, case.arguments["ends"], *batch.values())


def test_each_document_begins_with_bos_where_its_offset_says():
    outputs = harness.Truth.of(case_of("pack")).outputs
    assert set(outputs["ids"][outputs["cu_seqlens"][:-1].long()].tolist()) == {BOS}
    assert int(lengths_of(outputs["cu_seqlens"]).min()) > 1


def test_python_and_the_specification_run_when_they_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device, budget: 1e10)
    path = tmp_path / "report.json"
    flags = ["--quick", "--device", "cpu", "--op", "pack", "unpack", "--json", str(path)]
    assert bench_pack.main([*flags, "--provider", "python", "reference", "bytekernels"]) == 0
    report = json.loads(path.read_text())
    names = ("python", "reference", "bytekernels")
    assert [(row["op"], row["provider"]) for row in report["rows"]] == [
        (o, n) for o in ("pack", "unpack") for n in names
    ]
    assert {row["dtype"] for row in report["rows"]} == {"uint8"}
    assert "over python" in capsys.readouterr().out.splitlines()[-4]


def test_what_runs_on_the_cpu_alone_is_skipped_elsewhere():
    found = pack_peers.providers(["python", "numpy", "eager"], torch.device("cuda"))
    assert found["numpy"] == harness.Unavailable("NumPy runs on the CPU alone, not on cuda")
    assert found["python"] == harness.Unavailable("Python's loop runs on the CPU alone, not on cuda")
    assert found["eager"] is pack_peers.EAGER
